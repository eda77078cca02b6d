"""`grokfetch run`: proven files become a model on the devices, a prompt becomes text."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.host_options import Hosts, hosts_options
from grokfetch.commands.hosts import asked, joined
from grokfetch.commands.loading import loading_shown
from grokfetch.commands.options import (
    NETWORK_NAMES,
    Meanwhile,
    json_option,
    loading_options,
    meanwhile_options,
    plain_option,
    state_option,
    tokenizer_option,
)
from grokfetch.commands.run_figures import Measured
from grokfetch.commands.streaming import fetching
from grokfetch.commands.tokenizer import find_tokenizer
from grokfetch.events import Ended, Token
from grokfetch.fetch import Asked
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.folder.store import Store
from grokfetch.output.progress import Lines
from grokfetch.output.reporting import held, lines
from grokfetch.output.terminal import screen
from grokfetch.units import seconds_text, speed_text
from loader.devices.arrangement import Loading, arrange
from loader.devices.meter import Meter
from loader.inference.tokenizer import Tokenizer
from loader.weights.schema import weight_bytes

BAR_S = 1.0
"""How long text waits for the bar of the fetch to go: no longer, there may be more to fetch."""


@click.command(
    cls=Explained,
    examples=(
        'grokfetch run /data/grok-1 "The answer to life" --max-tokens 40',
        'grokfetch run /data/grok-1 --tokens "1 2 3" --temperature 0.7 --top-p 0.9',
    ),
    groups={
        "Prompt and text": (
            *("tokens", "tokenizer", "max_tokens", "temperature", "top_p", "top_k", "seed"),
        ),
        "How the model is held": ("dtype", "placement", "mesh", "memory", "unproven"),
        "Several hosts": ("cluster", "coordinator", "num_hosts", "host_id"),
        "Fetching at the same time": ("while_fetching", "source", "up", "down", *NETWORK_NAMES),
        "For machines and screens": ("json", "plain", "state", "stats"),
    },
    extra="put the prompt in quotes",
)
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
@hosts_options
@meanwhile_options
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
    hosts: Hosts,
    meanwhile: Meanwhile | None,
    unproven: bool,
    stats: bool,
    state: Path | None,
) -> None:
    """Continue PROMPT with the model in DIR.

    The text goes to stdout as it is generated, timings go to stderr. Of several hosts, host 0
    writes it; each reads only the bytes that its own devices need.
    """
    if (prompt is None) == (tokens is None):
        raise click.UsageError("give either a PROMPT or --tokens")
    if unproven and meanwhile is not None:
        raise click.UsageError("--while-fetching waits until bytes are proven")
    ids = None if tokens is None else _ids(tokens)
    from loader.devices.cluster import is_first, local_share, meet
    from loader.inference.engine import Sampling
    from loader.inference.loading import load_as_it_comes, load_onto
    from loader.inference.prompts import check_prompts
    from loader.weights.checkpoint import (
        expect_checkpoint,
        model_of,
        open_checkpoint,
        require_whole,
    )

    with (
        joined(hosts),
        _reading(folder, state, meanwhile, asked(hosts, loading)) as store,
        Meter() as meter,
    ):
        config = model_of(store)
        # Where the weights are not all there, nobody should look for the tokenizer first.
        if not (unproven or hosts.several or meanwhile):
            require_whole(store)
        words = None if prompt is None else find_tokenizer(store, tokenizer)
        if words is not None and prompt is not None:
            ids = words.encode(prompt)
        assert ids is not None
        sampling = Sampling(temperature, top_p, top_k, seed)
        # What can be refused is refused before minutes are spent on loading.
        check_prompts(config, [ids])
        there = arrange(config, loading, len(ids) + max_tokens)
        share, start = local_share(there.mesh), time.perf_counter()
        with loading_shown() as report:
            if isinstance(store, Arriving):
                checkpoint = expect_checkpoint(store, share)
                engine = load_as_it_comes(there, checkpoint, ids, sampling, report)
                store.wait_for_end(BAR_S)
            else:
                checkpoint = open_checkpoint(store, proven=not unproven, share=share)
                engine = load_onto(there, checkpoint, report)
        loaded_s = time.perf_counter() - start
        meet("loaded")
        taken = Measured(meter, engine, weight_bytes(config), loaded_s, stats=stats)
        generated = taken.watch(ids, engine.generate(ids, max_tokens, sampling), max_tokens)
        engine.warm_up(ids, sampling)
        with taken.kept(store):
            if is_first():
                _write(generated, words, taken)
            else:
                deque(generated, maxlen=0)
        if is_first() and lines() is None:
            _tell(taken, stats=stats)


@contextlib.contextmanager
def _reading(
    folder: Path, state: Path | None, meanwhile: Meanwhile | None, wanted: Asked
) -> Iterator[Store]:
    """The folder, while nobody else writes it."""
    if meanwhile is None:
        store = Store(folder, state)
        with held(store):
            yield store
    else:
        from loader.devices.cluster import check

        arriving = Arriving(folder, state, watch=check)
        with fetching(meanwhile, arriving, wanted):
            yield arriving


def _write(tokens: Iterator[int], words: Tokenizer | None, taken: Measured) -> None:
    """Write the text as it is generated."""
    machine = lines()
    if machine is not None:
        _events(machine, tokens, words, taken)
        return
    for text in _numbers(tokens) if words is None else _texts(tokens, words):
        click.echo(text, nl=False)
    click.echo()


def _events(
    machine: Lines, tokens: Iterator[int], words: Tokenizer | None, taken: Measured
) -> None:
    """Tell a machine each token as it comes, and at the end the text and what it took."""
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
    machine.take(Ended(time.perf_counter() - start, results))


def _tell(taken: Measured, *, stats: bool) -> None:
    """Say how long it took, or all that it took."""
    if not taken.tokens:
        click.echo("the text ended at once", err=True)
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
