"""Where a command's events go: with `--json` to JSON lines, else to a progress bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from grokfetch import __version__
from grokfetch.errors import GrokfetchError
from grokfetch.events import Ended, Notice, Started
from grokfetch.output.json_lines import error_fields
from grokfetch.output.progress import Bar, Lines, Sink
from grokfetch.output.terminal import plain

if TYPE_CHECKING:
    from grokfetch.folder.store import Store

__all__ = ["begin_lines", "ended", "failed", "held", "lines", "notice", "refused", "reporter"]

KEY = "grokfetch.lines"
"""The key under which click's contexts of this run share its `Lines`."""


def begin_lines(context: click.Context) -> None:
    """Write events as JSON lines from now on, and the first one, `started`."""
    lines_begun = context.meta[KEY] = Lines(click.echo)
    lines_begun.take(Started(context.info_name or "", __version__))


def lines(context: click.Context | None = None) -> Lines | None:
    """The JSON lines of this run of the program, None without `--json`."""
    context = context or click.get_current_context(silent=True)
    begun = None if context is None else context.meta.get(KEY)
    assert begun is None or isinstance(begun, Lines)
    return begun


@contextlib.contextmanager
def held(store: Store, *, exclusive: bool = False) -> Iterator[None]:
    """Hold a folder's lock, and print the folder's warnings.

    Raises:
        StateLocked: another process holds it.
        StorageFailed: the folder must be written and cannot be.
    """
    with store.lock(exclusive=exclusive):
        for warning in store.warnings:
            notice(f"warning: {warning}")
        yield


def reporter(label: str, *, findings_to_stdout: bool = False) -> Sink:
    """Where the events of a step go: a bar with that label, or the JSON lines."""
    return lines() or Bar(label, findings=sys.stdout if findings_to_stdout else None, plain=plain())


def notice(text: str) -> None:
    """Report something that is worth knowing and is not an error."""
    machine = lines()
    if machine is None:
        click.echo(text, err=True)
    else:
        machine.take(Notice(text))


def ended(text: str, seconds: float, **results: object) -> None:
    """Report the command's result: `text` for people, the rest with `--json`."""
    machine = lines()
    if machine is None:
        click.echo(text)
    else:
        machine.take(Ended(seconds, results))


def failed(context: click.Context, error: BaseException) -> None:
    """With `--json`, write the error that ended the command."""
    machine = lines(context)
    if machine is not None:
        machine.put(error_fields(error))


def refused(context: click.Context, error: GrokfetchError) -> None:
    """Report an error that ends the command and that a user can act on."""
    failed(context, error)
    click.echo(f"error: {error}", err=True)
