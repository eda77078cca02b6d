"""`grokfetch run`: load a model from proven files, and continue a prompt."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.host_options import Hosts, hosts_options
from grokfetch.commands.hosts import asked, joined
from grokfetch.commands.loading import loading_shown, lost_pages_told
from grokfetch.commands.options import (
    LOADING_NAMES,
    NETWORK_NAMES,
    json_option,
    loading_options,
    plain_option,
    state_option,
    tokenizer_option,
)
from grokfetch.commands.prompt_list import Settings, work_on
from grokfetch.commands.prompt_options import Listed, Prompt, Session, prompt_options
from grokfetch.commands.run_figures import Measured
from grokfetch.commands.run_text import converse, tell, write
from grokfetch.commands.streaming import Meanwhile, meanwhile_options, reading
from grokfetch.commands.tokenizer import find_tokenizer
from grokfetch.commands.value_types import Integer, Number
from grokfetch.events import Ended
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.folder.store import Store
from grokfetch.output.reporting import lines
from loader.devices.arrangement import Arrangement, Loading, arrange
from loader.devices.jax_environment import require_jax
from loader.devices.meter import Meter
from loader.inference.tokenizer import Tokenizer
from loader.weights.limits import PREFIX_CACHE
from loader.weights.schema import GrokConfig, weight_bytes

if TYPE_CHECKING:
    from loader.inference.engine import Engine, Sampling


@click.command(
    cls=Explained,
    examples=(
        'grokfetch run /data/grok-1 "The answer to life" --max-tokens 40',
        "grokfetch run /data/grok-1 --prompts prompts.jsonl --output texts.jsonl",
    ),
    groups={
        "Prompt": ("tokens", "prompt_file", "tokenizer"),
        "Many prompts": ("prompts", "output", "slots"),
        "Text": ("max_tokens", "temperature", "top_p", "top_k", "seed"),
        "Loading the model": LOADING_NAMES,
        "Several hosts": ("cluster", "coordinator", "num_hosts", "host_id"),
        "Fetching at the same time": ("while_fetching", "source", "up", "down", *NETWORK_NAMES),
        "Output and state": ("json", "plain", "state", "stats"),
    },
    extra="put the prompt in quotes",
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@prompt_options
@tokenizer_option
@click.option(
    "--max-tokens",
    type=Integer(min=1),
    default=128,
    show_default=True,
    help="Generate at most this many tokens.",
)
@click.option(
    "--temperature",
    type=Number(min=0),
    default=0.0,
    show_default=True,
    help="0 always takes the most probable token.",
)
@click.option(
    "--top-p",
    type=Number(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the most probable tokens that together have this probability.",
)
@click.option("--top-k", type=Integer(min=1), help="Sample from this many most probable tokens.")
@click.option(
    "--seed", type=int, default=0, show_default=True, help="The same seed gives the same text."
)
@loading_options
@hosts_options
@meanwhile_options
@click.option(
    "--unproven", is_flag=True, help="Run files in the right format that no hash has verified."
)
@click.option("--stats", is_flag=True, help="Print time, memory and the chosen experts at the end.")
@plain_option
@state_option
@json_option
def run(
    folder: Path,
    tokenizer: Path | None,
    *,
    wanted: Prompt | Session | Listed,
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

    The text goes to stdout as it is generated, timings go to stderr. With - or without a PROMPT,
    the prompt is read from stdin; on a terminal, each line that you type is continued. With several
    hosts, host 0 writes the text, and each host reads only the bytes that its own devices need.
    """
    _refuse_together(wanted, hosts, meanwhile, unproven=unproven, stats=stats)
    require_jax()
    from loader.devices.cluster import meet
    from loader.inference.engine import Sampling
    from loader.weights.checkpoint import model_of, require_whole

    sampling = Sampling(temperature, top_p, top_k, seed)
    speaking, finished = threading.Event(), None
    with (
        joined(hosts),
        reading(
            folder,
            state,
            meanwhile,
            asked=asked(hosts, loading),
            speaking=speaking,
            watch=_watch,
        ) as store,
        Meter() as meter,
        contextlib.ExitStack() as files,
    ):
        config = model_of(store)
        # If weights are missing, report that rather than a missing tokenizer.
        if not (unproven or hosts.several or meanwhile):
            require_whole(store)
        words = None
        if wanted.needs_tokenizer:
            words = find_tokenizer(store, tokenizer, ", or give token ids with --tokens")
        # Refuse what can be refused before minutes are spent on loading.
        if isinstance(wanted, Listed):
            settings = Settings(store.manifest().name, max_tokens, sampling)
            work = files.enter_context(work_on(wanted, words, config, settings))
            prompts = [ids for _, ids in work.left]
            if not prompts:
                work.tell(0, 0.0, 0.0)
                return
        else:
            prompts = [_ids(wanted, words, config)]
        if isinstance(wanted, Listed):
            loading = dataclasses.replace(loading, prefix_cache=PREFIX_CACHE)
        arrangement = arrange(config, loading, max(map(len, prompts)) + max_tokens)
        start = time.perf_counter()
        # Several texts read nearly all weights, so starting before they have arrived gains nothing.
        by_parts = isinstance(wanted, Prompt) and not hosts.several
        engine = _loaded(
            arrangement, store, prompts[0], sampling, proven=not unproven, by_parts=by_parts
        )
        loaded_s = time.perf_counter() - start
        meet("loaded")

        def begin(ids: Sequence[int]) -> tuple[Iterator[int], Measured]:
            taken = Measured(meter, engine, weight_bytes(config), loaded_s, stats=stats)
            tokens = taken.watch(ids, engine.generate(ids, max_tokens, sampling), max_tokens)
            engine.warm_up(ids, sampling)
            return tokens, taken

        if isinstance(wanted, Listed):
            work.run(engine, meter)
        elif words is not None and isinstance(wanted, Session):
            converse(words, begin, store)
        else:
            speaking.set()
            finished = _write_one(begin(prompts[0]), words, store, stats=stats)
            # The rest of the fetch may take long, so its bar may be drawn again.
            speaking.clear()
    machine = lines()
    if finished is not None and machine is not None:
        machine.take(finished)


def _ids(wanted: Prompt | Session, words: Tokenizer | None, config: GrokConfig) -> list[int]:
    """The token ids of the prompt; for text still to be typed, as many as there can be.

    Raises:
        PromptInvalid: the model cannot read it.
    """
    from loader.inference.prompts import check_room

    if isinstance(wanted, Session):
        return [config.bos_token] * (config.sequence_len - 1)
    ids = list(wanted.ids)
    if words is not None and wanted.text is not None:
        ids = words.encode(wanted.text)
    check_room(config, ids)
    return ids


def _write_one(
    begun: tuple[Iterator[int], Measured], words: Tokenizer | None, store: Store, *, stats: bool
) -> Ended | None:
    """Write a text and its timings; with several hosts only the first writes, all compute.

    Returns:
        With --json, the last event.
    """
    from loader.devices.cluster import is_first

    generated, taken = begun
    finished = None
    with taken.kept(store):
        if is_first():
            finished = write(generated, words, taken)
        else:
            deque(generated, maxlen=0)
    if is_first() and lines() is None:
        tell(taken, stats=stats)
    return finished


def _refuse_together(
    wanted: Prompt | Session | Listed,
    hosts: Hosts,
    meanwhile: Meanwhile | None,
    *,
    unproven: bool,
    stats: bool,
) -> None:
    """Refuse options that cannot be combined.

    Raises:
        UsageError: they cannot.
    """
    if unproven and meanwhile is not None:
        raise click.UsageError("--unproven cannot be combined with --while-fetching")
    if isinstance(wanted, Listed) and stats:
        raise click.UsageError("--stats is for one text and cannot be combined with --prompts")
    if isinstance(wanted, Listed) and hosts.several:
        raise click.UsageError("--prompts works on one host only")
    if isinstance(wanted, Session) and (hosts.several or meanwhile or lines()):
        raise click.UsageError(
            "a PROMPT is required with several hosts, --while-fetching or --json"
        )


def _loaded(
    arrangement: Arrangement,
    store: Store,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    proven: bool,
    by_parts: bool,
) -> Engine:
    """The model on its devices; if the folder is being fetched, loaded as its bytes arrive."""
    from loader.devices.cluster import local_share
    from loader.inference.loading import load_as_it_comes, load_onto
    from loader.weights.checkpoint import expect_checkpoint, open_checkpoint

    lost_pages_told(store)
    share = local_share(arrangement.mesh)
    with loading_shown() as report:
        if isinstance(store, Arriving):
            mapped = arrangement.placement == "mapped"
            checkpoint = expect_checkpoint(store, share, by_parts=by_parts and mapped)
            return load_as_it_comes(arrangement, checkpoint, prompt, sampling, report)
        checkpoint = open_checkpoint(store, proven=proven, share=share)
        return load_onto(arrangement, checkpoint, report)


def _watch() -> None:
    """Raise if another host has failed."""
    from loader.devices.cluster import check

    check()
