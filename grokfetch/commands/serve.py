"""`grokfetch serve`: load a model from proven files, and serve it over HTTP."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.loading import loading_shown, lost_pages_told
from grokfetch.commands.options import (
    LOADING_NAMES,
    loading_options,
    state_option,
    tokenizer_option,
)
from grokfetch.commands.tokenizer import find_tokenizer
from grokfetch.commands.value_types import Integer, Size
from grokfetch.errors import StorageFailed, TokenizerMissing
from grokfetch.folder.store import Store
from grokfetch.output.reporting import held
from grokfetch.serving.model import Generation, Served
from grokfetch.serving.worker import Worker
from grokfetch.units import seconds_text
from loader.devices.arrangement import Loading
from loader.devices.jax_environment import require_jax
from loader.inference.tokenizer import Tokenizer
from loader.weights.limits import PREFIX_CACHE

if TYPE_CHECKING:
    from loader.inference.batching import Batch, Emission

KEY_VARIABLE = "GROKFETCH_API_KEY"
WARM_UP_S = 20.0
"""Seconds after which no larger batch is compiled before listening: a large model takes that long.
"""
LOOPBACK = {"127.0.0.1", "::1", "localhost"}


@click.command(
    cls=Explained,
    examples=(
        "grokfetch serve /data/grok-1",
        "grokfetch serve /data/grok-1 --host 0.0.0.0 --api-key-file key.txt",
    ),
    groups={
        "Clients": ("host", "port", "api_key_file", "name", "origins", "log_requests"),
        "Many texts at once": ("slots", "queue_length", "prefix_cache"),
        "Loading the model": (*LOADING_NAMES, "tokenizer", "state"),
    },
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=Integer(0, 65535),
    default=8000,
    show_default=True,
    help="Port to listen on; 0 for any free one.",
)
@click.option(
    "--slots",
    type=Integer(1, 256),
    default=16,
    show_default=True,
    help="How many texts to generate at once; a power of two.",
)
@click.option(
    "--queue",
    "queue_length",
    type=Integer(min=0),
    default=64,
    show_default=True,
    help="How many texts may wait for a slot; beyond that, clients are told to retry later.",
)
@click.option(
    "--prefix-cache",
    type=Size(least=0),
    default=f"{PREFIX_CACHE // 10**9}G",
    show_default=True,
    help="Memory for a cache of prompt prefixes, so that each is computed once; 0 for none.",
)
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path),
    help=f"File with the key that clients must send; or set {KEY_VARIABLE}.",
)
@click.option(
    "--name", metavar="NAME", help="What clients call the model; its manifest's name by default."
)
@click.option(
    "--cors-origin",
    "origins",
    metavar="ORIGIN",
    multiple=True,
    help="Allow scripts of web pages from this origin, such as https://example.org; * for all. May "
    "be repeated.",
)
@click.option("--log-requests", is_flag=True, help="Write a line to stderr for each request.")
@tokenizer_option
@loading_options
@click.option(
    "--unproven", is_flag=True, help="Serve files in the right format that no hash has verified."
)
@state_option
def serve(
    folder: Path,
    tokenizer: Path | None,
    *,
    host: str,
    port: int,
    slots: int,
    queue_length: int,
    prefix_cache: int,
    api_key_file: Path | None,
    name: str | None,
    origins: tuple[str, ...],
    log_requests: bool,
    loading: Loading,
    unproven: bool,
    state: Path | None,
) -> None:
    """Serve the model in DIR over HTTP, with OpenAI's completions API.

    Without a tokenizer, prompts must be token ids. SIGTERM or Ctrl-C stops the server after it has
    answered the requests in progress.
    """
    require_jax()
    from grokfetch.serving.app import Access, application
    from grokfetch.serving.server import bound, listen
    from loader.inference.batching import Batch
    from loader.inference.loading import load_model
    from loader.inference.sampling import MOST_RANKED
    from loader.weights.checkpoint import open_checkpoint, require_whole

    store = Store(folder, state)
    key = _key(api_key_file)
    if not unproven:
        require_whole(store)
    known_tokenizer = _found_tokenizer(store, tokenizer)
    if key is None and host not in LOOPBACK:
        click.echo(
            f"warning: anyone who can reach {host} can use it; require a key with --api-key-file",
            err=True,
        )
    with held(store), bound(host, port) as at:
        checkpoint = open_checkpoint(store, proven=not unproven)
        lost_pages_told(store)
        with loading_shown() as report:
            engine = load_model(
                checkpoint,
                placement=loading.placement,
                mesh=loading.mesh,
                memory=loading.memory,
                dtype=loading.dtype,
                cache=loading.cache,
                prefix_cache=prefix_cache,
                report=report,
            )
        batch = Batch(engine, slots)
        _warm_up(batch)
        config = checkpoint.config
        served = Served(
            name or store.manifest().name,
            config.sequence_len,
            config.vocab_size,
            config.eos_token,
            batch.slots,
            MOST_RANKED,
        )
        worker = Worker(Jobs(batch), batch.slots, queue_length)
        access = Access(key, origins, _say if log_requests else None)
        listen(application(worker, served, known_tokenizer, access), at, _say, served.name)


def _say(text: str) -> None:
    click.echo(text, err=True)


class Jobs:
    """A batch as the server's model; see `grokfetch.serving.model.Model`."""

    def __init__(self, batch: Batch) -> None:
        self._batch = batch
        self.prefix_cache = batch.prefix_cache
        self.drop = batch.drop
        self.reset = batch.reset

    @property
    def busy(self) -> bool:
        """Whether there is anything for a step to do."""
        return self._batch.busy

    @property
    def working(self) -> int:
        """Texts that have a slot."""
        return self._batch.working

    def add(self, number: int, generation: Generation) -> None:
        """Add a text under a number that no other text has now."""
        from loader.inference.batching import Job
        from loader.inference.penalties import Penalties
        from loader.inference.sampling import Sampling

        job = Job(
            generation.prompt,
            generation.max_tokens,
            Sampling(
                generation.temperature,
                generation.top_p,
                generation.top_k,
                generation.seed,
                generation.min_p,
            ),
            generation.logprobs,
            generation.echo,
            Penalties(
                generation.presence_penalty,
                generation.frequency_penalty,
                generation.repetition_penalty,
                generation.logit_bias,
            ),
            generation.min_tokens,
            generation.ignore_eos,
        )
        self._batch.add(number, job)

    def step(self) -> Sequence[Emission]:
        """Run one step of the model; returns what it has generated."""
        return self._batch.step()


def _warm_up(batch: Batch) -> None:
    """Compile before any client waits for it; print how long that took, and what it left out."""
    start = time.perf_counter()
    click.echo("compiling the model", err=True)
    count = batch.warm_up(WARM_UP_S)
    text = (
        f"compiled for up to {count} texts at once in {seconds_text(time.perf_counter() - start)}"
    )
    if count < batch.slots:
        text += f"; the first {batch.slots} texts at once will wait for more compiling"
    click.echo(text, err=True)


def _found_tokenizer(store: Store, chosen: Path | None) -> Tokenizer | None:
    """The tokenizer, or a warning that there is none."""
    try:
        return find_tokenizer(store, chosen)
    except TokenizerMissing as error:
        if chosen is not None:
            raise
        click.echo(f"warning: {error}\n  without it, prompts must be token ids", err=True)
        return None


def _key(file: Path | None) -> str | None:
    """The key that clients must send, None for no key."""
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageFailed(
            "the API key cannot be read", path=file, hint="name a text file: --api-key-file FILE"
        ) from error
    if not key:
        raise StorageFailed("contains no API key", path=file, hint="write the key into the file")
    return key
