"""The tensors of a folder, each opened, and its bytes required, when it is first asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePosixPath

from grokfetch.errors import NoModel, NotProven
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import ManifestTensor
from grokfetch.open_files import allow_open_files, open_files_for
from loader.weights.binding import entries, stored_parameter
from loader.weights.headers import stand_in
from loader.weights.host_share import Share, Span, tensor_spans
from loader.weights.schema import GrokConfig, ParamSpec
from loader.weights.shard_values import ArraySpan
from loader.weights.tensor import Index, Tensor, index_spans

__all__ = ["Opened", "model_of"]


def model_of(store: Store) -> GrokConfig:
    """The hyperparameters of the model that the store's manifest describes.

    Raises:
        StateMissing: the folder has no manifest.
        NoModel: the manifest names files only.
        ManifestInvalid: its model section is not a configuration.
    """
    manifest = store.manifest()
    if manifest.model is None:
        raise NoModel("the manifest describes files, not a model", path=store.root)
    return GrokConfig.from_mapping(manifest.model)


class Opened(Mapping[str, Tensor]):
    """The tensors of a store, each opened when it is first asked for.

    Args:
        store: the checkpoint directory.
        share: the part of the weights that will be read, all by default.
        proven: False to accept files that no hash vouches for, if their structure is right.
        by_parts: require only the frame and the scales of a tensor when it is asked for, and parts
            of its weight when they are read.

    Attributes:
        by_parts: as it was given.
        config: the hyperparameters.
        by_shapes: whether `config` was guessed from shapes, so that only its shapes are right: the
            manifest names tensors but no model.

    Raises:
        StateMissing: the folder has no manifest.
        NoModel: the manifest names files only.
        ManifestInvalid: its model section is not a configuration.
        CheckpointInvalid: manifest and parameters name different tensors.
    """

    def __init__(
        self, store: Store, share: Share | None, *, proven: bool = True, by_parts: bool = False
    ) -> None:
        self._store = store
        self._share = share
        self._proven = proven
        self.by_parts = by_parts
        self.by_shapes = store.manifest().model is None and bool(store.manifest().tensors)
        self.config = stand_in(store.manifest().tensors) if self.by_shapes else model_of(store)
        known = entries(store.manifest(), self.config)
        self._entries = {spec.name: (spec, entry, size) for spec, entry, size in known}
        allow_open_files(open_files_for(len(self._entries)))
        self._asked = store.asked()
        self._open: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._open:
            spec, entry, size = self._entries[name]
            if self.left_out(name):
                raise _left_out(self._store, spec)
            spans = tuple(self._needed(spec, entry, size))
            for start, stop in spans:
                self._store.expect(entry.file, start, stop - start, at_once=True)
            for start, stop in spans:
                self._store.require(entry.file, start, stop - start)
            shard = stored_parameter(self._store, spec, entry, size)
            path = self._store.payload(entry.file)
            door = _Door(self._store, entry.file) if self.by_parts else None
            tensor = Tensor(spec, path, shard.array, shard.scales, door)
            # Two threads may have opened it: both continue with the same one.
            self._open.setdefault(name, tensor)
        return self._open[name]

    def expect(self, name: str, index: Index) -> None:
        """Have the frame of a tensor brought, and what an index selects of its weight."""
        _, entry, size = self._entries[name]
        offset, length = next(entry.spans())
        array = ArraySpan(entry.dtype, entry.shape, offset, length, "C")
        door = _Door(self._store, entry.file)
        door.expect(0, offset)
        for start, nbytes in index_spans(array, index, door.gap):
            door.expect(start, nbytes)
        door.expect(offset + length, size - offset - length)

    def arrived(self, name: str) -> bool:
        """Whether all of a tensor's file is proven, without waiting for it."""
        _, entry, _ = self._entries[name]
        return self._store.arrived(entry.file)

    def left_out(self, name: str) -> bool:
        """Whether a tensor, or a needed part of it, was not asked for."""
        _, entry, size = self._entries[name]
        whole = self._proven and self._share is None and not self.by_parts
        return whole and self._asked is not None and self._asked.get(entry.file) != ((0, size),)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _needed(self, spec: ParamSpec, entry: ManifestTensor, size: int) -> Iterable[Span]:
        if not self._proven:
            return ()
        if self.by_parts:
            offset, length = next(entry.spans())
            return ((0, offset), (offset + length, size))
        layout = None if self._share is None else self._store.layout()
        if self._share is None or layout is None:
            return ((0, size),)
        return tensor_spans(spec, entry, size, self._share, layout.piece_length)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


@dataclasses.dataclass(frozen=True, slots=True)
class _Door:
    """The store's door to one file, as `loader.weights.pages.Door`."""

    store: Store
    path: PurePosixPath

    @property
    def gap(self) -> int:
        """The length of a piece, which always comes as a whole."""
        layout = self.store.layout()
        return 1 if layout is None else layout.piece_length

    def require(self, start: int, length: int) -> None:
        self.store.require(self.path, start, length)

    def expect(self, start: int, length: int, *, at_once: bool = False) -> None:
        self.store.expect(self.path, start, length, at_once=at_once)


def _left_out(store: Store, spec: ParamSpec) -> NotProven:
    which = f"--only {spec.name}" if spec.layer is None else f"--layers {spec.layer}"
    return NotProven(
        f"{spec.name} was not asked for, or not all of it: only {store.selection()}",
        path=store.root,
        hint=f"run: grokfetch fetch {store.root} {which}",
    )
