"""`grokfetch run`: proven files become a model on the devices, a prompt becomes text."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grokfetch.commands.loading import Loading, load, loading_options
from grokfetch.commands.reporting import json_option, lines
from grokfetch.commands.state_option import state_option
from grokfetch.commands.terminal import plain_option, screen
from grokfetch.commands.tokenizer_option import find_tokenizer, tokenizer_option
from grokfetch.progress import seconds_text, speed_text

if TYPE_CHECKING:
    from grokfetch.commands.measuring import Measured
    from grokfetch.progress import Lines
    from loader.tokenizer import Tokenizer


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--tokens", metavar="IDS", help='Token ids as the prompt, "181 13 437"; prints ids.')
@tokenizer_option
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 always takes the most probable token.",
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1))
@click.option("--seed", type=int, default=0, show_default=True)
@loading_options
@click.option(
    "--unproven", is_flag=True, help="Run files of the right form that no hash vouches for."
)
@click.option(
    "--stats", is_flag=True, help="Tell at the end what it took, and which experts were chosen."
)
@plain_option
@state_option
@json_option
def run(
    folder: Path,
    prompt: str | None,
    tokens: str | None,
    tokenizer: Path | None,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int,
    loading: Loading,
    unproven: bool,
    stats: bool,
    state: Path | None,
) -> None:
    """Continue PROMPT with the model in DIR.

    The text goes to stdout as it is generated, timings go to stderr.
    """
    from grokfetch.commands.measuring import Measured
    from grokfetch.meter import Meter
    from grokfetch.store import Store
    from loader.checkpoint import open_checkpoint
    from loader.generate import Sampling, check_prompts

    if (prompt is None) == (tokens is None):
        raise click.UsageError("give either a PROMPT or --tokens")
    ids = None if tokens is None else _ids(tokens)
    store = Store(folder, state)
    words = None if prompt is None else find_tokenizer(store, tokenizer)
    if words is not None and prompt is not None:
        ids = words.encode(prompt)
    assert ids is not None
    with store.lock(exclusive=False), Meter() as meter:
        checkpoint = open_checkpoint(store, proven=not unproven)
        # What can be refused is refused before minutes are spent on loading.
        check_prompts(checkpoint.config, [ids])
        start = time.perf_counter()
        engine = load(checkpoint, loading)
        weights = sum(tensor.nbytes for tensor in checkpoint.values())
        taken = Measured(meter, engine, weights, time.perf_counter() - start, stats=stats)
        sampling = Sampling(temperature, top_p, top_k, seed)
        generated = taken.watch(ids, engine.generate(ids, max_tokens, sampling))
        machine = lines()
        with taken.kept(store):
            if machine is not None:
                _events(machine, generated, words, taken)
                return
            for text in _numbers(generated) if words is None else _texts(generated, words):
                click.echo(text, nl=False)
            click.echo()
        _tell(taken, stats=stats)


def _events(
    machine: Lines, tokens: Iterator[int], words: Tokenizer | None, taken: Measured
) -> None:
    """Tell a machine each token as it comes, and at the end the text and what it took."""
    from grokfetch.events import Ended, Token

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
        "peak_memory": run.peak_memory,
        "read": run.read,
        "experts": run.experts,
    }
    machine.take(Ended(time.perf_counter() - start, results))


def _tell(taken: Measured, *, stats: bool) -> None:
    """Say how long it took, or all that it took."""
    if not taken.tokens:
        click.echo("end of sequence at once", err=True)
    elif stats:
        for line in taken.said(screen(sys.stderr)):
            click.echo(line, err=True)
    elif taken.tokens_per_s is None:
        click.echo(f"1 token after {seconds_text(taken.first_token_s)}", err=True)
    else:
        click.echo(
            f"first token after {seconds_text(taken.first_token_s)}, "
            f"then {taken.tokens - 1} at {speed_text(taken.tokens_per_s)}",
            err=True,
        )


def _numbers(tokens: Iterable[int]) -> Iterator[str]:
    for index, token in enumerate(tokens):
        yield f" {token}" if index else str(token)


def _texts(tokens: Iterable[int], words: Tokenizer) -> Iterator[str]:
    stream = words.stream()
    for token in tokens:
        yield stream.push(token)
    yield stream.finish()


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"not token ids: {text!r:.80}", param_hint="--tokens") from None
