"""What a checkpoint must be: files, sizes, digests, tensors, model, tokenizer. Pure: no I/O here.

A manifest is one JSON object. `manifests/README.md` describes every field; `parse` is the only
reader and refuses whatever it does not understand, naming the field.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from grokfetch.errors import Contradiction, ManifestInvalid
from grokfetch.manifest.fields import Field, parsed
from grokfetch.torrent.names import unsafe_name

__all__ = [
    "ITEM_SIZES",
    "SCHEMA",
    "Manifest",
    "ManifestFile",
    "ManifestTensor",
    "Scales",
    "TokenizerSource",
    "bind",
    "common_tail",
    "encode",
    "parse",
    "plain",
]

SCHEMA = 1

ITEM_SIZES = {"float32": 4, "bfloat16": 2, "int8": 1}
"""Bytes of one element, for the dtypes an official shard can hold."""


@dataclasses.dataclass(frozen=True, slots=True)
class ManifestFile:
    """One payload file: path relative to the checkpoint folder, size in bytes, sha256 if known."""

    path: PurePosixPath
    size: int
    sha256: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Scales:
    """The bfloat16 scales of a quantised tensor: shape, and byte offset in the tensor's file."""

    shape: tuple[int, ...]
    offset: int


@dataclasses.dataclass(frozen=True, slots=True)
class ManifestTensor:
    """One tensor: its file, dtype, shape, and the byte offset of its payload in that file."""

    name: str
    file: PurePosixPath
    dtype: str
    shape: tuple[int, ...]
    offset: int
    scales: Scales | None = None

    def spans(self) -> Iterator[tuple[int, int]]:
        """(offset, length) in bytes of the payload, then of the scales if there are any."""
        yield self.offset, math.prod(self.shape) * ITEM_SIZES[self.dtype]
        if self.scales is not None:
            yield self.scales.offset, math.prod(self.scales.shape) * ITEM_SIZES["bfloat16"]


@dataclasses.dataclass(frozen=True, slots=True)
class TokenizerSource:
    """The SentencePiece model: name beside the payload, size, sha256, where it is published."""

    path: PurePosixPath
    size: int
    sha256: str
    url: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Manifest:
    """A checkpoint described.

    `info_hash` is the torrent's (40 hexadecimal digits for BitTorrent v1, 64 for v2) and makes its
    piece hashes speak for this manifest; None where there is no torrent. `mirrors` are URLs in
    which `{path}` stands for a file's path. `model` holds the hyperparameters as
    `loader.weights.schema.GrokConfig` reads them; None for a torrent that is not a checkpoint.
    `measured` is the date on which the digests were taken from files that lay on somebody's disk:
    they then prove only that a file is unchanged since.
    """

    name: str
    files: tuple[ManifestFile, ...]
    licence: str | None = None
    info_hash: str | None = None
    magnet: str | None = None
    mirrors: tuple[str, ...] = ()
    tensors: tuple[ManifestTensor, ...] = ()
    model: Mapping[str, int | float] | None = None
    tokenizer: TokenizerSource | None = None
    measured: str | None = None

    @property
    def size(self) -> int:
        """Bytes of all payload files together."""
        return sum(file.size for file in self.files)

    @property
    def digests(self) -> dict[PurePosixPath, str]:
        """The sha256 of those files of which it is known, by path."""
        return {file.path: file.sha256 for file in self.files if file.sha256 is not None}

    def file(self, path: PurePosixPath) -> ManifestFile | None:
        """The entry of `path`, None if the manifest does not name it."""
        return next((file for file in self.files if file.path == path), None)

    def moved(self, places: Mapping[PurePosixPath, PurePosixPath]) -> Manifest:
        """The same manifest with other paths for some files.

        Args:
            places: from the paths here to the others; a path that is not in it stays.
        """
        if not places:
            return self
        source = self.tokenizer
        return dataclasses.replace(
            self,
            files=tuple(
                dataclasses.replace(file, path=places.get(file.path, file.path))
                for file in self.files
            ),
            tensors=tuple(
                dataclasses.replace(tensor, file=places.get(tensor.file, tensor.file))
                for tensor in self.tensors
            ),
            tokenizer=source
            and dataclasses.replace(source, path=places.get(source.path, source.path)),
        )


def plain(name: str, info_hash: str, magnet: str | None, files: Iterable[ManifestFile]) -> Manifest:
    """The manifest of a torrent of which only the files are known."""
    return Manifest(name, tuple(files), info_hash=info_hash, magnet=magnet)


# --- matching a torrent ------------------------------------------------------------------------


def bind(manifest: Manifest, files: Iterable[tuple[PurePosixPath, int]]) -> Manifest:
    """The manifest with the paths under which a torrent, or a folder, holds its files.

    Files are matched by name and size whatever folder they lie in; of several that fit, the one
    that shares the longest tail of its path. Files that the manifest does not know are appended.

    Args:
        manifest: what the payload must be.
        files: path and size in bytes of every file there is.

    Raises:
        Contradiction: a file is missing, has another size, or two fit equally well.
    """
    listed = list(files)
    by_name: defaultdict[str, list[tuple[PurePosixPath, int]]] = defaultdict(list)
    for path, size in listed:
        by_name[path.name].append((path, size))
    place = {file.path: _place(file, by_name[file.path.name]) for file in manifest.files}
    taken = set(place.values())
    extra = [ManifestFile(path, size) for path, size in listed if path not in taken]
    bound = manifest.moved(place)
    return dataclasses.replace(bound, files=(*bound.files, *extra))


def _place(file: ManifestFile, candidates: list[tuple[PurePosixPath, int]]) -> PurePosixPath:
    if not candidates:
        raise Contradiction(f"{file.path} of the manifest is missing")
    fitting = [path for path, size in candidates if size == file.size]
    if not fitting:
        sizes = " or ".join(f"{size:,}" for _, size in candidates)
        raise Contradiction(f"{file.path} must have {file.size:,} bytes, but has {sizes} here")
    ranked = sorted(fitting, key=lambda path: common_tail(path, file.path), reverse=True)
    if len(ranked) > 1 and common_tail(ranked[0], file.path) == common_tail(ranked[1], file.path):
        raise Contradiction(f"both {ranked[0]} and {ranked[1]} match {file.path} of the manifest")
    return ranked[0]


def common_tail(one: PurePosixPath, other: PurePosixPath) -> int:
    """How many parts two paths have in common at their ends."""
    same = 0
    for mine, theirs in zip(reversed(one.parts), reversed(other.parts), strict=False):
        if mine != theirs:
            break
        same += 1
    return same


# --- JSON --------------------------------------------------------------------------------------


def encode(manifest: Manifest) -> bytes:
    """The manifest as JSON, one line per file and tensor, so that diffs are readable."""
    top: dict[str, object] = {
        "schema": SCHEMA,
        "name": manifest.name,
        "licence": manifest.licence,
        "info_hash": manifest.info_hash,
        "magnet": manifest.magnet,
        "mirrors": list(manifest.mirrors),
        "measured": manifest.measured,
        "model": None if manifest.model is None else dict(manifest.model),
        "tokenizer": None if manifest.tokenizer is None else _entry(manifest.tokenizer),
    }
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in top.items()]
    for key, entries in (("files", manifest.files), ("tensors", manifest.tensors)):
        rows = ",\n  ".join(json.dumps(_entry(entry)) for entry in entries)
        lines.append(f'"{key}": [\n  {rows}\n ]' if rows else f'"{key}": []')
    return ("{\n " + ",\n ".join(lines) + "\n}\n").encode()


def _entry(entry: ManifestFile | ManifestTensor | Scales | TokenizerSource) -> dict[str, object]:
    fields: dict[str, object] = {}
    for field in dataclasses.fields(entry):
        value = getattr(entry, field.name)
        if isinstance(value, PurePosixPath):
            value = str(value)
        elif isinstance(value, Scales):
            value = _entry(value)
        if value is not None:
            fields[field.name] = value
    return fields


def parse(text: bytes, origin: str) -> Manifest:
    """Read a manifest and check everything that can be checked without the files.

    Args:
        text: the JSON.
        origin: where it came from, for the error message.

    Raises:
        ManifestInvalid: naming the field that is malformed, missing or contradicts another.
    """
    try:
        return _manifest(parsed(text, "manifest", SCHEMA))
    except ManifestInvalid as error:
        raise ManifestInvalid(error.what, path=origin, hint=error.hint) from None


def _manifest(top: Field) -> Manifest:
    manifest = Manifest(
        name=top.get("name").string(),
        licence=top.optional("licence", Field.string),
        info_hash=top.optional("info_hash", _info_hash),
        magnet=top.optional("magnet", _magnet),
        mirrors=tuple(
            top.optional("mirrors", lambda field: [_url(i) for i in field.items()]) or ()
        ),
        files=tuple(_file(item) for item in top.get("files").items()),
        tensors=tuple(top.optional("tensors", lambda field: [*map(_tensor, field.items())]) or ()),
        model=top.optional("model", _model),
        tokenizer=top.optional("tokenizer", _tokenizer),
        measured=top.optional("measured", _date),
    )
    _check_files(manifest)
    _check_tensors(manifest)
    return manifest


def _check_files(manifest: Manifest) -> None:
    seen: set[str] = set()
    for index, file in enumerate(manifest.files):
        # Two names that differ only in case are one file on many file systems.
        key = str(file.path).casefold()
        if key in seen:
            raise ManifestInvalid(f"files[{index}].path {file.path} appears twice")
        seen.add(key)


def _check_tensors(manifest: Manifest) -> None:
    sizes = {file.path: file.size for file in manifest.files}
    names: set[str] = set()
    for index, tensor in enumerate(manifest.tensors):
        field = f"tensors[{index}]"
        if tensor.name in names:
            raise ManifestInvalid(f"{field}.name {tensor.name} appears twice")
        names.add(tensor.name)
        if tensor.file not in sizes:
            raise ManifestInvalid(f"{field}.file {tensor.file} is not among files")
        for offset, length in tensor.spans():
            if offset + length > sizes[tensor.file]:
                raise ManifestInvalid(
                    f"{field}: bytes {offset:,} to {offset + length:,} "
                    f"are beyond the {sizes[tensor.file]:,} of {tensor.file}"
                )


def _file(field: Field) -> ManifestFile:
    return ManifestFile(
        _path(field.get("path")), field.get("size").integer(), field.optional("sha256", _sha256)
    )


def _tensor(field: Field) -> ManifestTensor:
    dtype = field.get("dtype").string()
    if dtype not in ITEM_SIZES:
        field.get("dtype").refuse(f"must be one of {', '.join(ITEM_SIZES)}")
    return ManifestTensor(
        name=field.get("name").string(),
        file=_path(field.get("file")),
        dtype=dtype,
        shape=_shape(field.get("shape")),
        offset=field.get("offset").integer(),
        scales=field.optional("scales", _scales),
    )


def _scales(field: Field) -> Scales:
    return Scales(_shape(field.get("shape")), field.get("offset").integer())


def _tokenizer(field: Field) -> TokenizerSource:
    return TokenizerSource(
        _path(field.get("path")),
        field.get("size").integer(),
        _sha256(field.get("sha256")),
        field.optional("url", _url),
    )


def _model(field: Field) -> dict[str, int | float]:
    model = field.members()
    for key, value in model.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            field.get(key).refuse("must be a number")
    return model


def _shape(field: Field) -> tuple[int, ...]:
    return tuple(item.integer() for item in field.items())


def _sha256(field: Field) -> str:
    return field.matching(r"[0-9a-f]{64}", "must be 64 lowercase hexadecimal digits")


def _info_hash(field: Field) -> str:
    return field.matching(
        r"[0-9a-f]{40}|[0-9a-f]{64}", "must be 40 or 64 lowercase hexadecimal digits"
    )


def _magnet(field: Field) -> str:
    return field.matching(r"magnet:\?\S+", "must be a magnet link")


def _date(field: Field) -> str:
    return field.matching(r"\d{4}-\d\d-\d\d", "must be a date like 2024-03-17")


def _url(field: Field) -> str:
    return field.matching(r"https?://\S+", "must be an http or https address")


def _path(field: Field) -> PurePosixPath:
    reason = unsafe_name(field.string())
    if reason is not None:
        field.refuse(f"must be a plain relative path: {reason}")
    return PurePosixPath(field.string())
