"""The steps to a ready model, in order: devices, placement, tuning, memory and read-ahead.

`load_model` does all of it; the commands do it in two parts, because they must know the devices
before they know which bytes to fetch.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from grokfetch.events import Loaded, LoadEvent, Notice, Progress
from grokfetch.process_limits import available_memory
from grokfetch.units import bytes_text
from loader.devices import placement as placing
from loader.devices.arrangement import Arrangement, CacheType, Dtype, Loading, Placement, arrange
from loader.devices.cluster import meet
from loader.devices.kernels import Tuning
from loader.devices.paging import Managed
from loader.devices.placement import Params
from loader.devices.semantics import as_written
from loader.devices.tuning import suited
from loader.inference.engine import Engine
from loader.inference.sampling import Sampling
from loader.inference.tokenizer import Tokenizer, tokenizer_of
from loader.weights.checkpoint import Checkpoint
from loader.weights.limits import WORK, cache_bytes_per_token
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig, ParamSpec, by_layer
from loader.weights.tensor import Index

__all__ = ["Report", "load_as_it_comes", "load_model", "load_onto"]

Report = Callable[[LoadEvent], object]
"""Called with what happens while a model is loaded."""


def load_model(  # noqa: PLR0913 - each is a choice of its own, by name
    checkpoint: Checkpoint,
    *,
    placement: Placement | None = None,
    mesh: MeshShape | None = None,
    memory: int | None = None,
    dtype: Dtype = "bfloat16",
    cache: CacheType | None = None,
    tokens: int = 1,
    prefix_cache: int = 0,
    tokenizer: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> Engine:
    """The model of a checkpoint on this machine's devices, ready to generate.

    It chooses the devices, how they hold the weights, which products suit the processor and what is
    read ahead, as the command `run` does. Call it in the main thread.

    Args:
        checkpoint: the tensors in their files; it must stay open while the model is in use.
        placement: "mapped" leaves the weights in their files, for CPUs; "sharded" copies them to
            the devices; None for what suits the devices.
        mesh: how many devices are along each axis; None for all devices.
        memory: bytes that mapped weights, cache and work may take together; None for what is free.
        dtype: of the products; weights stay int8.
        cache: dtype of the KV cache; None for the dtype of the products.
        tokens: the longest context that will be generated; there must be memory for it.
        prefix_cache: bytes for the beginnings of prompts, at most half of what the model leaves
            free: a prompt that begins like an earlier one is read from where they differ, in steps
            of `SHARED_STEP` tokens. 0 keeps none.
        tokenizer: a SentencePiece model for prompts that are texts; None for the one beside the
            weights, which is looked for when the first text comes.
        report: called with `Progress` while weights are copied, with `Notice` of what is worth
            knowing, and at the end with `Loaded`.

    Raises:
        MeshInvalid: the devices cannot be arranged so.
        OutOfReach: weights, cache and work need more memory than there is, or mapped weights were
            asked for on devices that are not CPUs.
        StorageFailed: a file cannot be mapped or read.
        TokenizerMissing: there is none at `tokenizer`.
    """
    words = None if tokenizer is None else Tokenizer.load(tokenizer)
    loading = Loading(dtype, placement, mesh, memory, prefix_cache, cache)
    arrangement = arrange(checkpoint.config, loading, tokens)
    engine = load_onto(arrangement, checkpoint, report)
    if words is not None:
        engine.open_tokenizer = lambda: words
    return engine


@as_written
def load_onto(
    arrangement: Arrangement, checkpoint: Checkpoint, report: Report | None = None
) -> Engine:
    """The same, onto devices that are already set up."""
    params, paging = _place(arrangement, checkpoint, report or _silent)
    engine = _engine(arrangement, checkpoint.config, params, paging)
    if checkpoint.store is not None:
        engine.open_tokenizer = functools.partial(tokenizer_of, checkpoint.store)
    return engine


@as_written
def load_as_it_comes(
    arrangement: Arrangement,
    checkpoint: Checkpoint,
    prompt: Sequence[int],
    sampling: Sampling,
    report: Report | None = None,
) -> Engine:
    """The weights as their bytes arrive, and the model compiled before the last of them.

    The weights outside the layers and the first layer come first. With them a model of one layer is
    compiled, and the compiled code serves every layer. Copied weights are on the devices twice
    until the rest is there. If the checkpoint is read in parts, mapped weights are waited for only
    when a token needs them: what every token needs is asked for in the order of the layers, experts
    once they have been chosen.

    Args:
        arrangement: the devices.
        checkpoint: from `expect_checkpoint`, of a folder that waits for bytes that are required.
        prompt: what will be asked; it determines the size of the steps.
        sampling: how tokens will be chosen.
        report: as for `load_model`.
    """
    report = report or _silent
    config, mesh = checkpoint.config, arrangement.mesh
    if checkpoint.by_parts and arrangement.placement == "mapped":
        _announce(checkpoint)
        params, paging = _place(arrangement, checkpoint, report)
        engine = _engine(arrangement, config, params, paging)
        engine.warm_up(prompt, sampling)
        return engine
    first = Checkpoint(dataclasses.replace(config, num_layers=1), checkpoint)
    tuning = _tuning(arrangement, checkpoint, report)
    params = (
        placing.load(first, mesh, tuning=tuning)
        if arrangement.placement == "sharded"
        else placing.share(first, mesh, tuning)
    )
    engine = _engine(arrangement, config, params, None)
    meet("first layer")
    engine.warm_up(prompt, sampling)
    engine.hold(*_place(arrangement, checkpoint, report))
    return engine


def _engine(
    arrangement: Arrangement, config: GrokConfig, params: Params, paging: Managed | None
) -> Engine:
    loading, kept = arrangement.loading, arrangement.prefix_cache
    return Engine(
        config,
        params,
        arrangement.mesh,
        loading.dtype,
        paging,
        prefix_cache=kept,
        cache=loading.cache,
    )


def _announce(checkpoint: Checkpoint) -> None:
    """Ask for what every token needs, in the order in which the first one does.

    For mixtures of experts that is the frames; for the embedding, its rows first.
    """
    specs = by_layer(checkpoint.config)
    tables = [spec.name for spec in specs if spec.axes[0] == "vocab"]
    first = [spec for spec in specs if spec.layer in {None, 0}]
    later = [spec for spec in specs if spec.layer not in {None, 0}]

    def needed(some: Iterable[ParamSpec]) -> Iterator[tuple[str, Index]]:
        for spec in some:
            by_parts = spec.axes[0] in {"vocab", "expert"} and len(spec.axes) > 1
            yield spec.name, slice(0, 0) if by_parts else ...

    checkpoint.prefetch((*needed(first), *tables, *needed(later)))


def _place(
    arrangement: Arrangement, checkpoint: Checkpoint, report: Report
) -> tuple[Params, Managed | None]:
    """The weights, placed for the devices, and what reads their pages."""
    start = time.perf_counter()
    mesh, total = arrangement.mesh, checkpoint.nbytes
    tuning = _tuning(arrangement, checkpoint, report)
    paging = None
    if arrangement.placement == "sharded":
        params = _copy(checkpoint, arrangement, tuning, report)
    else:
        params = placing.share(checkpoint, mesh, tuning, arriving=checkpoint.by_parts)
        paging = _paging(checkpoint, arrangement, report)
    seconds = round(time.perf_counter() - start, 3)
    report(Loaded(total, mesh.size, arrangement.platform, arrangement.placement, seconds))
    return params, paging


def _copy(
    checkpoint: Checkpoint, arrangement: Arrangement, tuning: Tuning | None, report: Report
) -> Params:
    """Every tensor on the devices."""
    done, total = 0, checkpoint.nbytes

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        report(Progress(done, total, "loading"))

    return placing.load(checkpoint, arrangement.mesh, tuning=tuning, on_bytes=count)


def _paging(checkpoint: Checkpoint, arrangement: Arrangement, report: Report) -> Managed:
    """What keeps the pages of mapped weights within memory; reports which of them stay."""
    config, loading = checkpoint.config, arrangement.loading
    memory = available_memory() if loading.memory is None else loading.memory
    cache = cache_bytes_per_token(config, loading.itemsize) * config.sequence_len
    rest = memory - cache - WORK - arrangement.prefix_cache
    paging = Managed(checkpoint, rest, arriving=checkpoint.by_parts)
    division = paging.division
    if not division.everything:
        kept = "attention, embedding and" if division.base else "no more than"
        experts = config.num_layers * config.num_experts
        report(
            Notice(
                f"the weights do not fit into {bytes_text(memory)} of memory: {kept} "
                f"{division.experts} of {experts} experts stay there, the others are read for "
                "each token"
            )
        )
    if paging.unlocked:
        report(
            Notice(
                f"what every token needs cannot be locked in memory ({paging.unlocked}), so that "
                "the system may drop it; more may be locked after: ulimit -l unlimited"
            )
        )
    return paging


def _tuning(arrangement: Arrangement, checkpoint: Checkpoint, report: Report) -> Tuning | None:
    """What suits the processor, if the devices are CPUs."""
    if arrangement.platform != "CPU":
        return None
    return suited(checkpoint.nbytes, lambda text: report(Notice(text)))


def _silent(_event: LoadEvent) -> None:
    """Report to nobody."""
