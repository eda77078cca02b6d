"""Grok-1 checkpoints as named tensors, and the JAX model that runs them.

Importing this package imports nothing heavy; its modules say what they need.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, overload

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from grokfetch.fetch.wanted import Network
    from loader.inference.loading import load_model
    from loader.weights.checkpoint import Checkpoint

__all__ = ["load_model", "open_checkpoint"]


def __getattr__(name: str) -> object:
    """`load_model`, imported with jax when it is first asked for."""
    if name != "load_model":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from loader.inference.loading import load_model

    globals()[name] = load_model
    return load_model


@overload
def open_checkpoint(
    source: str | os.PathLike[str],
    *,
    state: str | os.PathLike[str] | None = None,
    proven: bool = True,
) -> Checkpoint: ...


@overload
def open_checkpoint(
    source: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str],
    *,
    fetch: Literal[True],
    state: str | os.PathLike[str] | None = None,
    manifest: str | os.PathLike[str] | None = None,
    network: Network | None = None,
) -> AbstractContextManager[Checkpoint]: ...


def open_checkpoint(  # noqa: PLR0913 - what, where to, and how, by name
    source: str | os.PathLike[str] | None,
    folder: str | os.PathLike[str] | None = None,
    *,
    fetch: bool = False,
    state: str | os.PathLike[str] | None = None,
    proven: bool = True,
    manifest: str | os.PathLike[str] | None = None,
    network: Network | None = None,
) -> Checkpoint | AbstractContextManager[Checkpoint]:
    """The checkpoint in a folder as a mapping of names to lazy tensors.

    Where only a part was fetched all names are there; to look up a tensor that was not asked for
    raises NotProven, which says which fetch brings it.

    With `fetch` nothing need be there: what is read of a tensor is fetched, proven and then
    returned, and the folder remembers it. Such a checkpoint is used in a `with` statement, whose
    end ends the fetch.

    Args:
        source: the folder that `grokfetch fetch` or `grokfetch manifest` was given; with `fetch` a
            magnet link, a torrent or a manifest, or None for what the folder was begun with, or
            else Grok-1.
        folder: with `fetch`, where the bytes go.
        fetch: whether to fetch what is read.
        state: where our own files are, if not in the folder.
        proven: False to accept files that no hash vouches for, if their structure is right.
        manifest: with `fetch`, what the payload must be, if `source` does not say.
        network: with `fetch`, whom to ask.

    Raises:
        GrokfetchError: as `loader.weights.checkpoint.open_checkpoint`, or `loader.on_demand`.
        TypeError: `fetch` and a folder were not given together.
    """
    from pathlib import Path

    from grokfetch.folder.store import Store
    from loader.weights import checkpoint

    kept = None if state is None else Path(state)
    if fetch != (folder is not None) or (source is None and not fetch):
        raise TypeError("open_checkpoint(FOLDER), or open_checkpoint(SOURCE, FOLDER, fetch=True)")
    if folder is not None:
        from loader.on_demand import on_demand

        given = None if source is None else os.fspath(source)
        described = None if manifest is None else Path(manifest)
        return on_demand(given, Path(folder), kept, described, network)
    assert source is not None
    return checkpoint.open_checkpoint(Store(Path(source), kept), proven=proven, part=True)
