"""Finds the tokenizer that turns a prompt into token ids; not a command."""

from __future__ import annotations

from pathlib import Path

import click

from grokfetch.fetch.wanted import Network
from grokfetch.folder.store import Store
from grokfetch.output.reporting import notice
from loader.inference.tokenizer import Tokenizer, is_named, tokenizer_of

__all__ = ["bring_tokenizer", "find_tokenizer"]


def find_tokenizer(store: Store, chosen: Path | None, otherwise: str = "") -> Tokenizer:
    """The tokenizer that the user chose, or the one beside the weights if it is the right one.

    Args:
        store: the folder of the weights.
        chosen: what `--tokenizer` names.
        otherwise: what the command can do without a tokenizer, as the end of a hint.

    Raises:
        TokenizerMissing: there is none, or it is not the one that the manifest names.
    """
    if chosen is None:
        return tokenizer_of(store, f", or use --tokenizer FILE{otherwise}")
    source = store.manifest().tokenizer
    if source is not None and not is_named(chosen, source):
        click.echo(f"warning: {chosen} is not the tokenizer that the manifest names", err=True)
    return Tokenizer.load(chosen)


def bring_tokenizer(store: Store, network: Network) -> None:
    """Fetch the tokenizer that the manifest names, unless it is there, and print that."""
    brought = network.bring_tokenizer(store)
    if brought is not None:
        notice(brought.text)
