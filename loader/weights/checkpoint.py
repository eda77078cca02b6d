"""Binds the table of parameters to the bytes on disk: names to lazy, read-only, mapped arrays.

Opening a checkpoint looks only at the frames of its files, some hundred bytes each; an array is
mapped when it is first asked for (`loader.weights.tensor`). Methods that `safetensors.safe_open`
has too are called as there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from grokfetch.errors import (
    CheckpointInvalid,
    GrokfetchError,
    NoModel,
    NotProven,
    StorageFailed,
)
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, ManifestTensor, Scales
from grokfetch.units import bytes_text
from loader.weights.host_share import Share, Span, tensor_spans
from loader.weights.schema import GrokConfig, ParamSpec, parameters, weight_bytes
from loader.weights.shard_reader import read_shard
from loader.weights.tensor import Tensor

__all__ = [
    "Checkpoint",
    "Tensor",
    "expect_checkpoint",
    "faults",
    "model_of",
    "open_checkpoint",
    "open_folder",
    "require_whole",
]


class Checkpoint(Mapping[str, Tensor]):
    """Every parameter of a model by name, in file order.

    Used in a `with` statement, it keeps writers out of the folder until the end.

    Args:
        config: the hyperparameters.
        tensors: by name.
        store: the folder that it lies in, if that is one of ours.
    """

    def __init__(
        self,
        config: GrokConfig,
        tensors: Mapping[str, Tensor],
        store: Store | None = None,
    ) -> None:
        self.config = config
        self.store = store
        self._tensors = tensors
        self._held = contextlib.ExitStack()

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and scales; looks at no file."""
        return weight_bytes(self.config)

    def __enter__(self) -> Self:
        if self.store is not None:
            self._held.enter_context(self.store.lock(exclusive=False))
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def keys(self, pattern: str = "*") -> KeysView[str]:
        """The names in file order, or those that match a glob; `*` matches `/` too."""
        return dict.fromkeys(fnmatch.filter(self._tensors, pattern)).keys()

    def get_slice(self, name: str) -> Tensor:
        """The tensor itself, which reads what it is indexed with."""
        return self[name]

    def get_tensor(self, name: str) -> npt.NDArray[np.generic]:
        """The whole weight as it is stored, read-only; `dequantize` has regard to its scales."""
        return self[name].weight

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            KeyError: there is none; names the nearest.
            NotProven: it was not asked for, or its bytes are not proven.
        """
        if name not in self._tensors:
            near = difflib.get_close_matches(str(name), self._tensors, 3, cutoff=0.5)
            raise KeyError(f"no tensor {name!r:.80}" + (f"; near it: {near}" if near else ""))
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __repr__(self) -> str:
        return f"<Checkpoint: {len(self)} tensors, {bytes_text(self.nbytes)}>"

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def open_checkpoint(
    store: Store, *, proven: bool = True, share: Share | None = None, part: bool = False
) -> Checkpoint:
    """The checkpoint that the store's manifest describes.

    No file is looked into before what is needed of it is proven, then its frame is compared with
    the table of parameters and with the manifest.

    Args:
        store: the checkpoint directory; hold its shared lock while the checkpoint is in use.
        proven: False to accept files that no hash vouches for, if their structure is right.
        share: what will be read of the weights, all by default; no other byte need be there.
        part: True to open what was asked for, where that is not everything; to look up another
            tensor then raises NotProven, which says which fetch brings it.

    Raises:
        StateMissing: the folder has no manifest.
        NoModel: the manifest names files only.
        ManifestInvalid: its model section is not a configuration.
        NotProven: bytes that are needed are not proven.
        StorageFailed: a shard is missing or unreadable.
        ShardInvalid: a file is not a shard.
        CheckpointInvalid: manifest, parameters and files differ; names tensor, expected and found.
    """
    tensors = _Opened(store, share, proven=proven)
    for name in tensors:
        if not (part and tensors.left_out(name)):
            tensors[name]  # To open it finds what is wrong with it.
    return Checkpoint(model_of(store), tensors, store)


def expect_checkpoint(store: Store, share: Share | None = None) -> Checkpoint:
    """The same, each tensor being opened when it is first asked for, and its bytes required then.

    Raises:
        StateMissing, NoModel, ManifestInvalid, CheckpointInvalid: as `open_checkpoint`, which see
            also for what asking for a tensor raises.
    """
    return Checkpoint(model_of(store), _Opened(store, share), store)


def require_whole(store: Store) -> None:
    """Return if all of the model was asked for.

    Raises:
        NotProven: only a part was.
        StateMissing, NoModel, ManifestInvalid, CheckpointInvalid: as `open_checkpoint`.
    """
    tensors = _Opened(store, None)
    if any(map(tensors.left_out, tensors)):
        raise NotProven(
            f"only a part of the model was asked for: {store.selection()}",
            path=store.root,
            hint=f"run: grokfetch fetch {store.root} --all",
        )


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


class _Opened(Mapping[str, Tensor]):
    """The tensors of a store, each opened when it is first asked for."""

    def __init__(self, store: Store, share: Share | None, *, proven: bool = True) -> None:
        self._store = store
        self._share = share
        self._proven = proven
        entries = _entries(store.manifest(), model_of(store))
        self._entries = {spec.name: (spec, entry, size) for spec, entry, size in entries}
        self._asked = store.asked()
        self._open: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._open:
            spec, entry, size = self._entries[name]
            if self.left_out(name):
                raise _left_out(self._store, spec)
            for start, stop in self._needed(spec, entry, size):
                self._store.require(entry.file, start, stop - start)
            self._open[name] = _open_tensor(self._store, spec, entry, size)
        return self._open[name]

    def left_out(self, name: str) -> bool:
        """Whether a tensor, or a part of it, was not asked for, all of it being needed."""
        _, entry, size = self._entries[name]
        whole = self._proven and self._share is None
        return whole and self._asked is not None and self._asked.get(entry.file) != ((0, size),)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def _needed(self, spec: ParamSpec, entry: ManifestTensor, size: int) -> Iterable[Span]:
        if not self._proven:
            return ()
        layout = None if self._share is None else self._store.layout()
        if self._share is None or layout is None:
            return ((0, size),)
        return tensor_spans(spec, entry, size, self._share, layout.piece_length)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _left_out(store: Store, spec: ParamSpec) -> NotProven:
    which = f"--only {spec.name}" if spec.layer is None else f"--layers {spec.layer}"
    return NotProven(
        f"{spec.name} was not asked for, or not all of it: only {store.selection()}",
        path=store.root,
        hint=f"run: grokfetch fetch {store.root} {which}",
    )


def faults(store: Store) -> Iterator[GrokfetchError]:
    """Every tensor whose file is not what the parameters and the manifest say, as an error.

    Files that are missing or of another size are passed over: reading the bytes back tells that.
    Nothing is wrong where the manifest describes no model.

    Raises:
        StateMissing: the folder has no manifest.
    """
    manifest = store.manifest()
    if manifest.model is None:
        return
    try:
        entries = _entries(manifest, GrokConfig.from_mapping(manifest.model))
    except GrokfetchError as error:
        yield error
        return
    for spec, entry, size in entries:
        stamp = store.stamp(entry.file)
        if stamp is None or stamp.size != size:
            continue
        try:
            _open_tensor(store, spec, entry, size)
        except GrokfetchError as error:
            yield error


def _open_tensor(store: Store, spec: ParamSpec, entry: ManifestTensor, size: int) -> Tensor:
    path = store.payload(entry.file)
    _check_size(spec, path, size)
    tensor = _bind(spec, path)
    _check_entry(tensor, entry)
    return tensor


def _entries(manifest: Manifest, config: GrokConfig) -> list[tuple[ParamSpec, ManifestTensor, int]]:
    """Every parameter with what the manifest says of it and the size of its file in bytes."""
    specs = parameters(config)
    sizes = {file.path: file.size for file in manifest.files}
    entries = {entry.name: entry for entry in manifest.tensors}
    unknown = entries.keys() - {spec.name for spec in specs}
    if unknown:
        raise CheckpointInvalid(f"the model has no tensor {min(unknown)}, but the manifest has")
    missing = [spec.name for spec in specs if spec.name not in entries]
    if missing:
        raise CheckpointInvalid(f"the model has a tensor {missing[0]}, but the manifest has not")
    bound = ((spec, entries[spec.name]) for spec in specs)
    return [(spec, entry, sizes[entry.file]) for spec, entry in bound]


def _check_size(spec: ParamSpec, path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise StorageFailed(f"cannot be read: {error.strerror}", path=path) from error
    if found != expected:
        raise CheckpointInvalid(
            f"the file of {spec.name} must have {expected:,} bytes, found {found:,}", path=path
        )


def _check_entry(tensor: Tensor, entry: ManifestTensor) -> None:
    """Compare what the file holds with what its manifest says."""
    array, scales = tensor.array, tensor.scale_span
    found = dataclasses.replace(
        entry,
        dtype=array.dtype,
        shape=array.shape,
        offset=array.offset,
        scales=None if scales is None else Scales(scales.shape, scales.offset),
    )
    if found != entry:
        raise CheckpointInvalid(
            f"by the manifest {entry.name} must be {_describe_entry(entry)}, "
            f"found {_describe_entry(found)}",
            path=tensor.path,
        )


def _describe_entry(entry: ManifestTensor) -> str:
    shape = None if entry.scales is None else entry.scales.shape
    places = f"at {entry.offset:,}"
    if entry.scales is not None:
        places += f" and {entry.scales.offset:,}"
    return f"{_describe(entry.dtype, entry.shape, shape)} {places}"


def open_folder(folder: str | os.PathLike[str], config: GrokConfig) -> Checkpoint:
    """The checkpoint of `config` whose shards lie in `folder` under their official names.

    Only the structure of the files is checked, their content is not.

    Raises:
        StorageFailed: a shard is missing or unreadable.
        ShardInvalid: a file is not a shard.
        CheckpointInvalid: a shard holds something else than the parameter it should.
    """
    specs = parameters(config)
    return Checkpoint(config, {spec.name: _bind(spec, Path(folder) / spec.file) for spec in specs})


def _bind(spec: ParamSpec, path: Path) -> Tensor:
    shard = read_shard(path)
    expected = _describe(spec.dtype, spec.shape, spec.scale_shape)
    scale_shape = None if shard.scales is None else shard.scales.shape
    found = _describe(shard.array.dtype, shard.array.shape, scale_shape)
    spans = [shard.array] if shard.scales is None else [shard.array, shard.scales]
    if any(span.order == "F" for span in spans):
        found += " in Fortran order"
    if found != expected:
        raise CheckpointInvalid(f"{spec.name} must be {expected}, found {found}", path=path)
    return Tensor(spec, path, shard.array, shard.scales)


def _describe(dtype: str, shape: tuple[int, ...], scale_shape: tuple[int, ...] | None) -> str:
    scales = "without scales" if scale_shape is None else f"with scales {scale_shape}"
    return f"{dtype} {shape} {scales}"
