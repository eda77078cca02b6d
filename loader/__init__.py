"""Grok-1 checkpoints as named tensors, and the JAX model that runs them.

Importing this package imports nothing heavy; its modules say what they need.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def open_checkpoint(
    folder: str | os.PathLike[str],
    *,
    state: str | os.PathLike[str] | None = None,
    proven: bool = True,
) -> Checkpoint:
    """The checkpoint in a folder as a mapping of names to lazy tensors.

    Where only a part was fetched all names are there; to look up a tensor that was not asked for
    raises NotProven, which says which fetch brings it.

    Args:
        folder: what `grokfetch fetch` or `grokfetch manifest` was given.
        state: where that keeps its state, if not in the folder.
        proven: False to accept files that no hash vouches for, if their structure is right.

    Raises:
        GrokfetchError: as `loader.weights.checkpoint.open_checkpoint`.
    """
    from pathlib import Path

    from grokfetch.folder.store import Store
    from loader.weights import checkpoint

    store = Store(Path(folder), None if state is None else Path(state))
    return checkpoint.open_checkpoint(store, proven=proven, part=True)
