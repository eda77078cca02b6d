"""The tensors of a checkpoint, found from the frames of its shards if no manifest names them.

The frames are read through the store's door: of files still to be fetched, only the pieces with a
frame come: the first, the last and, for a quantised tensor, one in between. Names follow from the
order of the files, and sizes from the shapes; the width of a head does not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import PurePosixPath

from grokfetch.errors import GrokfetchError, ManifestInvalid, NoModel, StorageFailed
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import ManifestFile, ManifestTensor, Scales
from loader.weights.schema import LAYER, OUTER, GrokConfig, layer_prefix, parameters
from loader.weights.shard_reader import read_slices
from loader.weights.shard_values import Shard

__all__ = ["entry", "is_shard", "named", "read_headers", "stand_in"]

AT_ONCE = 32
"""Shards whose frames are waited for at the same time."""

CHUNK = 4096
"""Bytes read from a file at once; the longest part of an official frame has 200."""


def is_shard(name: str) -> bool:
    """Whether a file has the name of an official shard."""
    return re.fullmatch(r"tensor\d{5}_\d{3}", name) is not None


def read_headers(
    store: Store, files: Sequence[ManifestFile]
) -> Iterator[tuple[PurePosixPath, Shard | GrokfetchError]]:
    """The content of the shards, in the order of `files`, or what is wrong with each.

    Args:
        store: its door is asked for every byte; if a fetch fills the store, the fetch brings them.
        files: the shards, as the manifest in force has them.

    Raises:
        NotProven: bytes are not proven, and will not be.
        GrokfetchError: the fetch has failed, and with what.
    """
    # All first pieces are asked for before the first is waited for.
    for start in (lambda _file: 0, lambda file: max(file.size - 1, 0)):
        for file in files:
            store.expect(file.path, start(file), min(1, file.size), at_once=True)
    with ThreadPoolExecutor(AT_ONCE, "headers") as pool:
        yield from zip(
            (file.path for file in files), pool.map(partial(_header, store), files), strict=True
        )


def _header(store: Store, file: ManifestFile) -> Shard | GrokfetchError:
    part = _Proven(store, file)
    try:
        return read_slices(part, file.path)
    except GrokfetchError as error:
        if part.refused is not None:
            raise part.refused from None
        return error


class _Proven:
    """A file of a store, as `loader.weights.shard_reader.Slices`; only proven bytes are read."""

    def __init__(self, store: Store, file: ManifestFile) -> None:
        self._store = store
        self._file = file
        self._start, self._data = 0, b""
        self.refused: GrokfetchError | None = None

    def __len__(self) -> int:
        return self._file.size

    def __getitem__(self, part: slice, /) -> bytes:
        first = part.start - self._start
        if first < 0 or part.stop - self._start > len(self._data):
            self._read(part.start, max(part.stop, self._end(part.start)))
            first = 0
        return self._data[first : first + part.stop - part.start]

    def _end(self, start: int) -> int:
        """How far to read from a byte: no further than the end of its own piece."""
        stop = min(start + CHUNK, self._file.size)
        layout = self._store.layout()
        file = None if layout is None else layout.file(self._file.path)
        if layout is None or file is None:
            return stop
        piece = layout.pieces_over(file, start, 1)[0]
        return min(stop, (piece + 1) * layout.piece_length - file.start)

    def _read(self, start: int, stop: int) -> None:
        try:
            self._store.require(self._file.path, start, stop - start)
        except GrokfetchError as error:
            self.refused = error
            raise
        path = self._store.payload(self._file.path)
        try:
            with path.open("rb", buffering=0) as opened:
                opened.seek(start)
                self._start, self._data = start, opened.read(stop - start)
        except OSError as error:
            raise StorageFailed(f"cannot be read: {error.strerror}", path=path) from error


# --- what they are ------------------------------------------------------------------------------


def named(shards: Mapping[PurePosixPath, Shard]) -> tuple[ManifestTensor, ...]:
    """The tensors of a whole checkpoint, named by the order of its files.

    Args:
        shards: all of them, by path.

    Raises:
        NoModel: they are not those of a model of Grok-1's kind.
    """
    files = sorted(shards)
    layers, more = divmod(len(files) - len(OUTER), len(LAYER))
    if layers < 1 or more:
        raise NoModel(f"{len(files)} shards are not those of a model of Grok-1's kind")
    specs = parameters(GrokConfig(num_layers=layers))
    for spec, path in zip(specs, files, strict=True):
        if path.name != spec.file or path.parent != files[0].parent:
            raise NoModel(f"{spec.file} is missing among the shards, or lies elsewhere", path=path)
    pairs = zip(specs, files, strict=True)
    tensors = tuple(entry(spec.name, path, shards[path]) for spec, path in pairs)
    stand_in(tensors)
    return tensors


def entry(name: str, path: PurePosixPath, shard: Shard) -> ManifestTensor:
    """The manifest entry for the tensor in a shard."""
    scales = None if shard.scales is None else Scales(shard.scales.shape, shard.scales.offset)
    array = shard.array
    return ManifestTensor(name, path, array.dtype, array.shape, array.offset, scales)


def stand_in(tensors: Iterable[ManifestTensor]) -> GrokConfig:
    """Hyperparameters that give only the right shapes and names.

    Shapes tell only the width of all heads together, and nothing else about attention; a model
    cannot be run with these.

    Raises:
        NoModel: the tensors are not those of a model of Grok-1's kind.
    """
    entries = {tensor.name: tensor for tensor in tensors}
    fields = {kind.field: kind.name for kind in OUTER}
    fields |= {kind.field: layer_prefix(0) + kind.name for kind in LAYER}
    try:
        vocab, width = entries[fields["embedding"]].shape
        experts, _, ff = entries[fields["gate"]].shape
        [_, queries] = entries[fields["query"]].shape
        [_, keys] = entries[fields["key"]].shape
        config = GrokConfig(
            vocab_size=vocab,
            emb_size=width,
            widening_factor=ff * 3 / 2 / width,
            key_size=keys,
            num_q_heads=queries // keys,
            num_kv_heads=1,
            num_layers=(len(entries) - len(OUTER)) // len(LAYER),
            num_experts=experts,
            num_selected_experts=1,
        )
        specs = parameters(config)
    except (KeyError, ValueError, ZeroDivisionError, ManifestInvalid) as error:
        raise NoModel(f"the tensors are not those of a model of Grok-1's kind: {error}") from None
    for spec in specs:
        found = entries.get(spec.name)
        scales = None if found is None or found.scales is None else found.scales.shape
        if found is None or (found.dtype, found.shape, scales) != (
            spec.dtype,
            spec.shape,
            spec.scale_shape,
        ):
            raise NoModel(f"{spec.name} is not as in a model of Grok-1's kind")
    return config
