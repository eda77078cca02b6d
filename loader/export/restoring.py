"""Rebuilds the official shards, byte for byte, from a GGUF of type Q8_0 that `export` wrote.

Q8_0 keeps the int8 values and the scales, the frame of a shard follows from its shape, and the
fields of the GGUF hold the config. So a GGUF can be proven to be the official checkpoint, and be
converted back into it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from grokfetch.errors import (
    CheckpointInvalid,
    Contradiction,
    GrokfetchError,
    Inexact,
    ManifestInvalid,
    StorageFailed,
    storage_errors,
    storage_failed,
)
from grokfetch.events import Progress
from grokfetch.folder import advisory
from grokfetch.folder.atomic import flush, make_folder
from grokfetch.folder.known import EXPORT
from grokfetch.folder.store import Store
from grokfetch.torrent.read_back import Hashers
from loader.export.gguf import Entry, read
from loader.export.layout import CONFIG_KEY, gguf_name, is_transposed, split_name, transposed_shape
from loader.export.matrices import (
    BLOCK,
    BLOCK_LENGTH,
    Data,
    bfloat16_scales,
    bytes_of,
    transposed_back,
)
from loader.export.target_file import TargetFile
from loader.weights.pages import Pages
from loader.weights.schema import GrokConfig, ParamSpec, parameters
from loader.weights.shard_writer import frame_layout

__all__ = ["FOLDER", "Exported", "Rebuilt", "digests", "open_exported", "write_shards"]

SCHEMA: Final = 1
SLAB: Final = 1 << 22
"""Weights that a thread transposes at once."""

FOLDER: Final = PurePosixPath("ckpt-0")
"""Where the shards go in OUT, as in the official release."""


_Part = tuple[int, Callable[[], Data]]
"""Some bytes of a shard: their number, and a function that makes them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """A GGUF that we wrote: its config and fields, and the file and entry of each tensor."""

    config: GrokConfig
    fields: Mapping[str, Any]
    tensors: Mapping[str, tuple[Path, Entry]]

    def shard(
        self, spec: ParamSpec, start: int = 0, stop: int | None = None
    ) -> Iterator[memoryview]:
        """Bytes of the official shard of a parameter, in order; by default all of them.

        Args:
            spec: the parameter.
            start: the first byte.
            stop: the byte after the last one.

        Raises:
            Inexact: the tensor was not made from an official shard.
            StorageFailed: the file cannot be read.
        """
        path, entry = self.tensors[gguf_name(spec)]
        stop = sys.maxsize if stop is None else stop
        try:
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            at = 0
            for nbytes, make in _parts(spec, entry, mapped, path):
                if start < at + nbytes and at < stop:
                    yield bytes_of(make())[max(0, start - at) : stop - at]
                at += nbytes
        except OSError as error:
            raise storage_failed(error, path, reading=True) from error
        except Inexact as error:
            raise Inexact(
                f"{entry.name} was not made from an official shard: {error.what}", path=path
            ) from None


def open_exported(path: Path) -> Exported:
    """A GGUF that `export` wrote; if it is split, all its files.

    Raises:
        CheckpointInvalid: it is not one, or a tensor is missing or has another shape.
        Inexact: it is of a type that does not keep int8 and scales.
        StorageFailed: it cannot be read.
    """
    first = read(path)
    try:
        config = GrokConfig.from_mapping(json.loads(first.fields[CONFIG_KEY]))
    except (KeyError, TypeError, ValueError, ManifestInvalid) as error:
        raise CheckpointInvalid(
            "grokfetch did not write this GGUF, or it is not the first file of a split one: it "
            f"has no config of a checkpoint ({error})",
            path=path,
            hint="name the first file of what grokfetch export wrote",
        ) from None
    count = first.fields.get("split.count", 1)
    files = [first, *(read(split_name(path, number, count)) for number in range(1, count))]
    tensors = {name: (file.path, entry) for file in files for name, entry in file.tensors.items()}
    for spec in parameters(config):
        _check(spec, path, tensors)
    return Exported(config, first.fields, tensors)


def _check(spec: ParamSpec, path: Path, tensors: Mapping[str, tuple[Path, Entry]]) -> None:
    name = gguf_name(spec)
    if name not in tensors:
        raise CheckpointInvalid(f"it has no tensor {name}", path=path)
    _, entry = tensors[name]
    if entry.shape != transposed_shape(spec):
        raise CheckpointInvalid(
            f"{name} must have the shape {transposed_shape(spec)}, found {entry.shape}", path=path
        )
    wanted = "F32" if spec.scale_groups is None else "Q8_0"
    if entry.kind != wanted:
        raise Inexact(
            f"{name} is {entry.kind}: only an export of type q8_0 keeps int8 and scales",
            path=path,
            hint="to check that its bytes are as they were written: grokfetch verify FOLDER, with "
            "its folder",
        )


def _parts(spec: ParamSpec, entry: Entry, mapped: mmap.mmap, path: Path) -> Iterator[_Part]:
    """The parts of a shard in order."""
    around = frame_layout(spec.dtype, spec.shape, spec.scale_shape).around
    if spec.scale_groups is None:
        arrays = [_floats(spec, entry, mapped, path)]
    else:
        arrays = _int8_and_scales(spec, spec.scale_groups, entry, mapped, path)
    for before, parts in zip(around, (*arrays, ()), strict=True):
        yield len(before), partial(bytes, before)
        yield from parts


def _floats(spec: ParamSpec, entry: Entry, mapped: mmap.mmap, path: Path) -> Iterator[_Part]:
    table = np.ndarray(entry.shape, "<f4", mapped, entry.offset)
    if is_transposed(spec):
        yield entry.nbytes, lambda: table.T
        return
    flat = table.reshape(len(table), -1)
    width = flat.shape[1] * flat.itemsize

    def rows(start: int, count: int) -> Data:
        Pages(path, mapped, entry.offset + start * width, count * width).bring()
        return flat[start : start + count]

    step = max(1, SLAB // width)
    for start in range(0, len(flat), step):
        count = min(step, len(flat) - start)
        yield count * width, partial(rows, start, count)


def _int8_and_scales(
    spec: ParamSpec, groups: int, entry: Entry, mapped: mmap.mmap, path: Path
) -> list[Iterator[_Part]]:
    rows, columns = spec.shape[-2:]
    stack = np.ndarray((entry.nbytes // BLOCK.itemsize,), BLOCK, mapped, entry.offset)
    experts = stack.reshape(-1, columns, rows // BLOCK_LENGTH)
    step = max(BLOCK_LENGTH, SLAB // columns // BLOCK_LENGTH * BLOCK_LENGTH)
    slabs = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    each = entry.nbytes // len(experts)

    def int8(number: int, slab: slice) -> Data:
        Pages(path, mapped, entry.offset + number * each, each).bring()
        return transposed_back(experts[number], slab)

    return [
        (
            ((slab.stop - slab.start) * columns, partial(int8, number, slab))
            for number in range(len(experts))
            for slab in slabs
        ),
        ((2 * groups * columns, partial(bfloat16_scales, blocks, groups)) for blocks in experts),
    ]


@dataclasses.dataclass(frozen=True, slots=True)
class Rebuilt:
    """A shard that was rebuilt in memory: its sha256 in hexadecimal, or why there is none."""

    spec: ParamSpec
    sha256: str | None
    detail: str = ""


def digests(exported: Exported) -> Iterator[Rebuilt]:
    """Rebuild every shard on all cores and hash it; they come in any order."""

    def job(spec: ParamSpec, _buffer: memoryview) -> Rebuilt:
        hasher = hashlib.sha256()
        try:
            for data in exported.shard(spec):
                hasher.update(data)
        except GrokfetchError as error:
            return Rebuilt(spec, None, error.what)
        return Rebuilt(spec, hasher.hexdigest())

    with Hashers[Rebuilt]() as hashers:
        yield from hashers.run(partial(job, spec) for spec in parameters(exported.config))


def write_shards(exported: Exported, store: Store) -> Iterator[Progress]:
    """Write every shard into a folder whose exclusive lock is held; complete ones are kept.

    Raises:
        Contradiction: another export was begun there.
        StorageFailed: other files are in the way, or writing fails.
        Inexact: a tensor was not made from an official shard.
    """
    specs = parameters(exported.config)
    _begin(exported, store)
    stopped = threading.Event()

    def job(spec: ParamSpec, _buffer: memoryview) -> ParamSpec:
        path = store.root / FOLDER / spec.file
        if path.exists():
            return spec
        try:
            beside, offset = path.with_name(f"{path.name}.part"), 0
            size = frame_layout(spec.dtype, spec.shape, spec.scale_shape).size
            with TargetFile(beside, size) as file:
                for data in exported.shard(spec):
                    if stopped.is_set():
                        return spec
                    offset += file.write(data, offset)
                file.flush()
            beside.replace(path)
        except OSError as error:
            raise storage_failed(error, path) from error
        return spec

    total = sum(spec.nbytes for spec in specs)
    done = 0
    with Hashers[ParamSpec]() as hashers:
        try:
            for spec in hashers.run(partial(job, spec) for spec in specs):
                done += spec.nbytes
                yield Progress(done, total, "exporting")
        finally:
            stopped.set()
    flush(store.root / FOLDER)


def _begin(exported: Exported, store: Store) -> None:
    """Make sure that what is in the folder is ours, and from the same GGUF."""
    stamps = [
        [path.name, os.stat(path).st_size, os.stat(path).st_mtime_ns]  # noqa: PTH116
        for path in sorted({path for path, _ in exported.tensors.values()})
    ]
    plan = hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
    state = store.state / EXPORT
    known = advisory.read(state, SCHEMA, lambda fields: str(fields["plan"]))
    if known not in (None, plan):
        raise Contradiction(
            "another export was begun here",
            path=store.root,
            hint="choose another OUT, or remove this one",
        )
    folder = store.root / FOLDER
    if known is None and folder.exists():
        raise StorageFailed(
            "a folder is where the shards must go", path=folder, hint="choose another OUT"
        )
    # Without this the next export would take our own folder for somebody else's.
    advisory.write_first(state, SCHEMA, {"plan": plan, "done": {}})
    with storage_errors(folder):
        make_folder(folder)
