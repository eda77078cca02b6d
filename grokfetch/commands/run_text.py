"""Writes the continuation of one prompt, or of one after another; not a command of its own."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import click

from grokfetch.commands.run_figures import Measured
from grokfetch.errors import PromptInvalid
from grokfetch.events import Ended, Token
from grokfetch.folder.store import Store
from grokfetch.interruption import noted
from grokfetch.output.progress import Lines
from grokfetch.output.reporting import lines
from grokfetch.output.terminal import screen
from grokfetch.units import seconds_text, speed_text
from loader.inference.tokenizer import Tokenizer

__all__ = ["converse", "tell", "write"]

Continue = Callable[[Sequence[int]], tuple[Iterator[int], Measured]]
"""Starts to continue a prompt; returns the tokens and the measurements of the run."""


def write(tokens: Iterator[int], words: Tokenizer | None, taken: Measured) -> Ended | None:
    """Write the text as it is generated; with --json, returns the last event."""
    machine = lines()
    if machine is not None:
        return _events(machine, tokens, words, taken)
    for text in _numbers(tokens) if words is None else _texts(tokens, words):
        click.echo(text, nl=False)
    click.echo()
    return None


def converse(words: Tokenizer, begin: Continue, store: Store) -> None:
    """Continue each line that somebody types, until the end of the input.

    Ctrl-C ends the text that is being written; between texts it ends the program, as usual.
    """
    with contextlib.suppress(ImportError):
        # With it, lines can be edited and recalled.
        import readline  # noqa: F401
    click.echo("type a line to continue; Ctrl-C ends a text, Ctrl-D the session", err=True)
    while True:
        try:
            line = input("> ")
        except EOFError:
            click.echo()
            return
        if not line:
            continue
        try:
            tokens, taken = begin(words.encode(line))
        except PromptInvalid as error:
            click.echo(f"error: {error}", err=True)
            continue
        with noted() as pressed, taken.kept(store):
            write(_until(pressed, tokens), words, taken)
        if pressed():
            click.echo("stopped by Ctrl-C", err=True)
        else:
            tell(taken, stats=False)


def _until(pressed: Callable[[], bool], tokens: Iterator[int]) -> Iterator[int]:
    for token in tokens:
        yield token
        if pressed():
            return


def tell(taken: Measured, *, stats: bool) -> None:
    """Print the timings, or with --stats all measurements."""
    if not taken.tokens:
        click.echo("the model ended the text at once, without a token", err=True)
    elif stats:
        for line in taken.said(screen(sys.stderr)):
            click.echo(line, err=True)
    else:
        first = seconds_text(taken.first_token_s)
        speed = taken.tokens_per_s
        click.echo(
            f"compiled in {seconds_text(taken.compile_s)}, "
            + (f"1 token after {first}" if speed is None else f"first token after {first}, ")
            + ("" if speed is None else f"then {taken.tokens - 1} at {speed_text(speed)}")
            + f"; {taken.stopped_text()}",
            err=True,
        )


def _events(
    machine: Lines, tokens: Iterator[int], words: Tokenizer | None, taken: Measured
) -> Ended:
    """Write an event for each token; returns the last one, with the text and the measurements."""
    start = time.perf_counter()
    stream = None if words is None else words.stream()
    parts: list[str] = []
    for token in tokens:
        text = None if stream is None else stream.push(token)
        parts.append(text or "")
        machine.take(Token(token, text))
    if stream is not None:
        parts.append(stream.finish())
    run = taken.run()
    results: dict[str, object] = {
        "tokens": run.tokens,
        "text": None if stream is None else "".join(parts),
        "first_token_s": run.first_token_s if run.tokens else None,
        "tokens_per_s": run.tokens_per_s,
        "stopped": taken.stopped,
        "compile_s": run.compile_s,
        "peak_memory": run.peak_memory,
        "read": run.read,
        "experts": run.experts,
    }
    return Ended(time.perf_counter() - start, results)


def _numbers(tokens: Iterable[int]) -> Iterator[str]:
    for index, token in enumerate(tokens):
        yield f" {token}" if index else str(token)


def _texts(tokens: Iterable[int], words: Tokenizer) -> Iterator[str]:
    stream = words.stream()
    for token in tokens:
        yield stream.push(token)
    yield stream.finish()
