"""Binds the table of parameters to the bytes on disk: names to lazy, read-only, mapped arrays.

Opening a checkpoint looks only at the frames of its files, some hundred bytes each; an array is
mapped when it is first asked for (`loader.weights.tensor`). Methods that `safetensors.safe_open`
has too are called as there.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import os
from collections.abc import Iterable, Iterator, KeysView, Mapping
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from grokfetch.errors import NoModel, NotProven
from grokfetch.folder.store import Store
from grokfetch.units import bytes_text
from loader.weights.binding import parameter_in
from loader.weights.host_share import Share
from loader.weights.opened import Opened, model_of
from loader.weights.schema import GrokConfig, parameters, weight_bytes
from loader.weights.tensor import Index, Tensor

__all__ = [
    "Checkpoint",
    "Tensor",
    "expect_checkpoint",
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
        store: the folder that holds it, if that is one of ours.
        coming: what brings tensors that may not be there yet.
        by_shapes: whether `config` was guessed from shapes, so that only its shapes are right.
    """

    def __init__(
        self,
        config: GrokConfig,
        tensors: Mapping[str, Tensor],
        store: Store | None = None,
        coming: Opened | None = None,
        *,
        by_shapes: bool = False,
    ) -> None:
        self._coming = coming
        self._config = config
        self._by_shapes = by_shapes
        self.store = store
        self._tensors = tensors
        self._held = contextlib.ExitStack()

    @property
    def config(self) -> GrokConfig:
        """The hyperparameters.

        Raises:
            NoModel: nobody has said them, and the files themselves do not.
        """
        if self._by_shapes:
            raise NoModel(
                "the tensors were found in the files, which do not say how wide a head is",
                path=None if self.store is None else self.store.root,
                hint="fetch it by a manifest with the hyperparameters: --manifest FILE",
            )
        return self._config

    @property
    def by_parts(self) -> bool:
        """Whether its bytes may still be on their way; readers then wait for them."""
        return self._coming is not None

    @property
    def nbytes(self) -> int:
        """Bytes of all weights and scales; looks at no file."""
        return weight_bytes(self._config)

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
        """The whole weight as stored, read-only; `dequantize` applies its scales."""
        return self[name].weight

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name.

        Raises:
            KeyError: there is none; the message names the nearest.
            NotProven: it was not asked for, or its bytes are not proven.
        """
        self._check_name(name)
        return self._tensors[name]

    def _check_name(self, name: str) -> None:
        if name not in self._tensors:
            near = difflib.get_close_matches(str(name), self._tensors, 3, cutoff=0.5)
            raise KeyError(f"no tensor {name!r:.80}" + (f"; near it: {near}" if near else ""))

    def prefetch(self, wanted: Iterable[str | tuple[str, Index]]) -> None:
        """Have tensors, or parts of them, brought before they are read; returns at once.

        They come in this order, after what readers wait for. If all is there, nothing happens.

        Args:
            wanted: names, or pairs of a name and what the tensor will be indexed with.

        Raises:
            KeyError: there is no tensor of a name.
            IndexError: an index does not fit the tensor's shape.
        """
        for each in wanted:
            name, index = (each, ...) if isinstance(each, str) else each
            self._check_name(name)
            if self._coming is not None:
                self._coming.expect(name, index)

    def arrived(self, name: str) -> bool:
        """Whether all of a tensor is there, without waiting for it.

        Raises:
            KeyError: there is no tensor of that name.
            NotProven: it is not there and will not come.
            GrokfetchError: what ended the fetch that should bring it.
        """
        self._check_name(name)
        return self._coming is None or self._coming.arrived(name)

    @property
    def news(self) -> int:
        """A number that rises when tensors may have arrived."""
        return 0 if self.store is None else self.store.news

    def await_news(self, seen: int) -> None:
        """Return when `news` is greater than `seen`, or nothing more will come."""
        if self.store is not None:
            self.store.await_news(seen)

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

    A file is opened only when its needed bytes are proven; then its frame is compared with the
    table of parameters and with the manifest.

    Args:
        store: the checkpoint directory; hold its shared lock while the checkpoint is in use.
        proven: False to accept files that no hash vouches for, if their structure is right.
        share: the part of the weights that will be read, all by default; no other byte need be
            there.
        part: True to open only what was asked for, if that is not everything; looking up another
            tensor then raises NotProven, which says which fetch brings it.

    Raises:
        StateMissing: the folder has no manifest.
        NoModel: the manifest names files only.
        ManifestInvalid: its model section is not a configuration.
        NotProven: bytes that are needed are not proven.
        StorageFailed: a shard is missing or unreadable.
        ShardInvalid: a file is not a shard.
        CheckpointInvalid: manifest, parameters and files differ; the message says where and how.
    """
    tensors = Opened(store, share, proven=proven)
    for name in tensors:
        if not (part and tensors.left_out(name)):
            tensors[name]  # To open it finds what is wrong with it.
    return _checkpoint(tensors, store)


def expect_checkpoint(
    store: Store, share: Share | None = None, *, by_parts: bool = False
) -> Checkpoint:
    """The same, but each tensor is opened, and its bytes required, when it is first asked for.

    Args:
        store: the checkpoint directory.
        share: as for `open_checkpoint`.
        by_parts: require only the frame and the scales of a tensor when it is asked for, and parts
            of its weight when they are read.

    Raises:
        StateMissing, NoModel, ManifestInvalid, CheckpointInvalid: as `open_checkpoint`; its other
            errors are raised when a tensor is asked for.
    """
    tensors = Opened(store, share, by_parts=by_parts)
    return _checkpoint(tensors, store)


def _checkpoint(tensors: Opened, store: Store) -> Checkpoint:
    coming = tensors if tensors.by_parts else None
    return Checkpoint(tensors.config, tensors, store, coming, by_shapes=tensors.by_shapes)


def require_whole(store: Store) -> None:
    """Return if all of the model was asked for.

    Raises:
        NotProven: only a part was.
        StateMissing, NoModel, ManifestInvalid, CheckpointInvalid: as `open_checkpoint`.
    """
    tensors = Opened(store, None)
    if any(map(tensors.left_out, tensors)):
        raise NotProven(
            f"only a part of the model was asked for: {store.selection()}",
            path=store.root,
            hint=f"run: grokfetch fetch {store.root} --all",
        )


def open_folder(folder: str | os.PathLike[str], config: GrokConfig) -> Checkpoint:
    """The checkpoint of `config` whose shards are in `folder` under their official names.

    Only the structure of the files is checked, their content is not.

    Raises:
        StorageFailed: a shard is missing or unreadable.
        ShardInvalid: a file is not a shard.
        CheckpointInvalid: a shard does not hold the parameter that it should.
    """
    tensors = {}
    for spec in parameters(config):
        path = Path(folder) / spec.file
        shard = parameter_in(path, spec)
        tensors[spec.name] = Tensor(spec, path, shard.array, shard.scales)
    return Checkpoint(config, tensors)
