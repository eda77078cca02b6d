"""Finds the tokenizer that turns a prompt into token ids; no command."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click

from grokfetch.errors import TokenizerMissing
from grokfetch.fetch.wanted import Network
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import TokenizerSource
from grokfetch.output.reporting import notice
from loader.inference.tokenizer import Tokenizer

__all__ = ["bring_tokenizer", "find_tokenizer"]

TOKENIZER = "tokenizer.model"


def find_tokenizer(store: Store, chosen: Path | None) -> Tokenizer:
    """The tokenizer a person chose, or the one beside the weights if it is the right one.

    Raises:
        TokenizerMissing: there is none, or another one than the manifest names.
    """
    source = store.manifest().tokenizer
    if chosen is not None:
        if source is not None and _sha256(chosen) != source.sha256:
            click.echo(f"warning: {chosen} is not the tokenizer that the manifest names", err=True)
        return Tokenizer.load(chosen)
    beside = store.root / (TOKENIZER if source is None else source.path)
    if source is not None and beside.exists() and _sha256(beside) != source.sha256:
        raise TokenizerMissing(
            f"this is not the tokenizer of the model (its sha256 is not {source.sha256})",
            path=beside,
            hint=_where(source, store.root),
        )
    if not beside.exists():
        raise TokenizerMissing(
            "the tokenizer is not there", path=beside, hint=_where(source, store.root)
        )
    return Tokenizer.load(beside)


def bring_tokenizer(store: Store, network: Network) -> None:
    """Fetch the tokenizer that the manifest names, if the right one is not there; say so."""
    brought = network.bring_tokenizer(store)
    if brought is not None:
        notice(brought.text)


def _where(source: TokenizerSource | None, folder: Path) -> str:
    alternative = "or use --tokenizer FILE, or give token ids with --tokens"
    if source is None or source.url is None:
        return f"put it there, {alternative}"
    return (
        f"run: grokfetch fetch {folder}, which brings it from {source.url} "
        f"(sha256 {source.sha256}), {alternative}"
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TokenizerMissing(f"cannot be read: {error.strerror}", path=path) from error
