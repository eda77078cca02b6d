"""Which part of a checkpoint is asked for. Pure: no I/O here.

A request names layers, experts and globs, which narrow each other, or an extract that somebody has
worked out; a selection is the union of all requests made for a folder, so that a later one extends
what was asked for before. What is asked for is spans of bytes in files, and those become pieces:
each that holds a byte asked for.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from grokfetch.errors import SelectionInvalid
from grokfetch.manifest.fields import Field, parsed
from grokfetch.manifest.schema import ITEM_SIZES, Manifest, ManifestTensor
from grokfetch.torrent.layout import Layout

__all__ = [
    "ON_DEMAND",
    "SCHEMA",
    "Extract",
    "Request",
    "Selection",
    "Spans",
    "decode",
    "encode",
    "extended",
    "parse_numbers",
    "pieces_of",
    "spans",
    "urgency",
]

SCHEMA = 2
"""Version 1 knew no extracts."""

Spans = Mapping[PurePosixPath, tuple[tuple[int, int], ...]]
"""For each file asked for: start and stop of spans in bytes, in order and not adjacent."""

ON_DEMAND = "what was read"
"""The name of an extract that grows with what is read from a checkpoint."""

BANDS = 7
"""Levels of urgency, from 7, the most urgent, to 1."""


@dataclasses.dataclass(frozen=True, slots=True)
class Extract:
    """Bytes worked out elsewhere, such as one host's share, and in words what they are.

    spans: as `Spans`, with each file's path.
    """

    what: str
    spans: tuple[tuple[PurePosixPath, tuple[tuple[int, int], ...]], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
    """What one run asks for; None and no globs leave that unlimited.

    layers: decoder layers; tensors outside the layers come along. experts: of each mixture of
    experts; everything else comes along. only: globs, one of which must match a tensor's name or
    its file's path. extract: just these bytes; the others are then unlimited.
    """

    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None
    only: tuple[str, ...] = ()
    extract: Extract | None = None

    @property
    def on_demand(self) -> bool:
        """Whether it grows with what is read."""
        return self.extract is not None and self.extract.what == ON_DEMAND

    def __str__(self) -> str:
        if self.extract is not None:
            return self.extract.what
        parts = []
        if self.layers is not None:
            parts.append(f"layers {_ranges(self.layers)}")
        if self.experts is not None:
            parts.append(f"experts {_ranges(self.experts)}")
        if self.only:
            parts.append(" or ".join(self.only))
        return ", ".join(parts) or "everything"


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """All requests for a folder; together they ask for the union."""

    requests: tuple[Request, ...]

    def extended(self, request: Request) -> Selection:
        """The selection with one more request, unless it has it already."""
        if request in self.requests:
            return self
        if request.on_demand and request.extract is not None and self.on_demand:
            return self.grown(dict(request.extract.spans))
        return Selection((*self.requests, request))

    @property
    def on_demand(self) -> bool:
        """Whether a part of it grows with what is read."""
        return any(request.on_demand for request in self.requests)

    def grown(self, more: Spans) -> Selection:
        """The selection with more bytes that were read."""
        held: dict[PurePosixPath, list[tuple[int, int]]] = {}
        for request in self.requests:
            if request.on_demand and request.extract is not None:
                held.update((path, list(parts)) for path, parts in request.extract.spans)
        for path, parts in more.items():
            held.setdefault(path, []).extend(parts)
        spans = tuple((path, _merged(parts)) for path, parts in held.items())
        others = (request for request in self.requests if not request.on_demand)
        return Selection((*others, Request(extract=Extract(ON_DEMAND, spans))))

    def __str__(self) -> str:
        return "; ".join(map(str, self.requests))


def extended(
    earlier: Selection | None, request: Request | None, *, everything: bool
) -> Selection | None:
    """What a request and the earlier ones ask for together; None for everything.

    Args:
        earlier: what was asked for before.
        request: what is asked for now; None for nothing more, an empty one for everything.
        everything: whether no selection means that everything was asked for before.
    """
    if request is None:
        return earlier
    if request == Request() or (earlier is None and everything):
        return None
    return (earlier or Selection(())).extended(request)


def parse_numbers(text: str) -> tuple[int, ...]:
    """Numbers and ranges like "0-3,7" in ascending order, each once.

    Raises:
        SelectionInvalid: it is something else.
    """
    numbers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise SelectionInvalid(f"not numbers or ranges like 0-3,7: {text!r:.80}")
        numbers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return tuple(sorted(numbers))


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


# --- from tensors to bytes ---------------------------------------------------------------------


def spans(manifest: Manifest, selection: Selection) -> Spans:
    """The bytes asked for.

    Of a tensor of which only some experts are asked for, everything in its file but the other
    experts' weights is: so that the frame can be read.

    Raises:
        SelectionInvalid: a request names what the checkpoint does not have, or matches nothing.
    """
    parts_by_path: dict[PurePosixPath, list[tuple[int, int]]] = {}
    for request in selection.requests:
        matches = False
        for path, start, stop in _request_spans(manifest, request):
            matches = True
            parts_by_path.setdefault(path, []).append((start, stop))
        if not matches and not request.on_demand:
            raise SelectionInvalid(f"nothing in {manifest.name} matches: {request}")
    return {path: _merged(parts) for path, parts in parts_by_path.items()}


def _request_spans(
    manifest: Manifest, request: Request
) -> Iterator[tuple[PurePosixPath, int, int]]:
    _check(manifest, request)
    if request.extract is None:
        yield from _matching_spans(manifest, request)
    else:
        for path, parts in request.extract.spans:
            yield from ((path, start, stop) for start, stop in parts)


def _matching_spans(
    manifest: Manifest, request: Request
) -> Iterator[tuple[PurePosixPath, int, int]]:
    sizes = {file.path: file.size for file in manifest.files}
    for tensor in manifest.tensors:
        layer = layer_of(tensor)
        if request.layers is not None and layer is not None and layer not in request.layers:
            continue
        if not _matches(request, tensor.name, tensor.file):
            continue
        size = sizes[tensor.file]
        if request.experts is None or not _by_expert(manifest, tensor):
            yield tensor.file, 0, size
            continue
        each = math.prod(tensor.shape[1:]) * ITEM_SIZES[tensor.dtype]
        yield tensor.file, 0, tensor.offset
        for expert in request.experts:
            yield tensor.file, tensor.offset + expert * each, tensor.offset + (expert + 1) * each
        yield tensor.file, tensor.offset + tensor.shape[0] * each, size
    if request.layers is None and request.experts is None:
        tensor_files = {tensor.file for tensor in manifest.tensors}
        for file in manifest.files:
            if file.path not in tensor_files and _matches(request, "", file.path):
                yield file.path, 0, file.size


def layer_of(tensor: ManifestTensor) -> int | None:
    """The decoder layer that a tensor belongs to, None if it is outside of the layers."""
    match = re.search(r"decoder_layer_(\d+)/", tensor.name)
    return None if match is None else int(match[1])


def _by_expert(manifest: Manifest, tensor: ManifestTensor) -> bool:
    """Whether the first axis of a tensor is the experts."""
    experts = None if manifest.model is None else manifest.model.get("num_experts")
    return "/moe/" in tensor.name and len(tensor.shape) == 3 and tensor.shape[0] == experts


def _matches(request: Request, name: str, path: PurePosixPath) -> bool:
    texts = (name, str(path), path.name)
    return not request.only or any(
        fnmatchcase(text, glob) for glob in request.only for text in texts
    )


def _check(manifest: Manifest, request: Request) -> None:
    if request.extract is not None:
        _check_extract(manifest, request.extract)
    known = {
        "layers": {layer for layer in map(layer_of, manifest.tensors) if layer is not None},
        "experts": {
            expert
            for tensor in manifest.tensors
            if _by_expert(manifest, tensor)
            for expert in range(tensor.shape[0])
        },
    }
    for kind, asked in (("layers", request.layers), ("experts", request.experts)):
        if asked is None:
            continue
        if not known[kind]:
            raise SelectionInvalid(
                f"the manifest of {manifest.name} names no {kind}",
                hint="choose files with --only GLOB",
            )
        unknown = set(asked) - known[kind]
        if unknown:
            raise SelectionInvalid(
                f"{manifest.name} has {kind} {_ranges(sorted(known[kind]))}, "
                f"not {_ranges(sorted(unknown))}"
            )


def _check_extract(manifest: Manifest, extract: Extract) -> None:
    sizes = {file.path: file.size for file in manifest.files}
    for path, parts in extract.spans:
        if max((stop for _, stop in parts), default=1) > sizes.get(path, 0):
            raise SelectionInvalid(
                f"{extract.what}: belongs to another checkpoint, because {path} is too short here"
            )


def _merged(parts: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for start, stop in sorted(parts):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        else:
            merged.append((start, stop))
    return tuple(merged)


def pieces_of(layout: Layout, asked: Spans) -> frozenset[int]:
    """The pieces that contain a byte that is asked for."""
    return frozenset(
        piece
        for file in layout.payload
        for start, stop in asked.get(file.path, ())
        for piece in layout.pieces_over(file, start, stop - start)
    )


def urgency(manifest: Manifest, layout: Layout, pieces: Iterable[int]) -> dict[int, int]:
    """The urgency of each piece, 7 to 1: tensors outside of the layers first, then layer by layer.

    So that a part of the model is usable before all of it is there. Without tensors all are equal.
    """
    order: dict[int, int] = {}
    ranked = sorted(
        manifest.tensors, key=lambda tensor: -1 if (at := layer_of(tensor)) is None else at
    )
    wanted = set(pieces)
    for tensor in ranked:
        file = layout.file(tensor.file)
        if file is not None:
            for piece in layout.pieces_over(file):
                if piece in wanted:
                    order.setdefault(piece, len(order))
    count = max(len(order), 1)
    return {piece: BANDS - order.get(piece, count - 1) * BANDS // count for piece in wanted}


# --- JSON --------------------------------------------------------------------------------------


def encode(selection: Selection) -> bytes:
    """The selection as JSON."""
    requests = [
        {
            "layers": request.layers,
            "experts": request.experts,
            "only": request.only,
            "extract": None if request.extract is None else _extract_fields(request.extract),
        }
        for request in selection.requests
    ]
    return json.dumps({"schema": SCHEMA, "requests": requests}).encode() + b"\n"


def _extract_fields(extract: Extract) -> dict[str, object]:
    return {"what": extract.what, "spans": {str(path): parts for path, parts in extract.spans}}


def decode(text: bytes) -> Selection:
    """Read a selection.

    Raises:
        ManifestInvalid: it is malformed, or of a later version.
    """
    top = parsed(text, "selection", SCHEMA)
    return Selection(tuple(map(_request, top.get("requests").items())))


def _request(field: Field) -> Request:
    def numbers(part: Field) -> tuple[int, ...]:
        return tuple(item.integer() for item in part.items())

    return Request(
        field.optional("layers", numbers),
        field.optional("experts", numbers),
        tuple(field.optional("only", lambda part: [item.string() for item in part.items()]) or ()),
        field.optional("extract", _extract),
    )


def _extract(field: Field) -> Extract:
    files = field.get("spans")
    return Extract(
        field.get("what").string(),
        tuple(
            (PurePosixPath(path), tuple(map(_span, files.get(path).items())))
            for path in files.members()
        ),
    )


def _span(field: Field) -> tuple[int, int]:
    numbers = [item.integer() for item in field.items()]
    if len(numbers) != 2 or numbers[0] >= numbers[1]:
        field.refuse("must be start and stop of a span")
    return numbers[0], numbers[1]
