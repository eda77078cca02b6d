"""The options by which a person says how to hold a model, and the model held so; no command."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import click

from grokfetch.commands.fitting import check_fit
from grokfetch.commands.reporting import lines, notice, reporter
from grokfetch.errors import OutOfReach
from grokfetch.events import Loaded
from grokfetch.folder.atomic import replacing
from grokfetch.units import bytes_text, parse_bytes, seconds_text
from loader.devices.cache_folder import cache_folder

if TYPE_CHECKING:
    from loader.devices.kernels import Tuning
    from loader.devices.paging import Managed
    from loader.devices.placement import Mesh, Params
    from loader.inference.engine import Engine
    from loader.weights.checkpoint import Checkpoint
    from loader.weights.partition import MeshShape
    from loader.weights.schema import GrokConfig

__all__ = [
    "Arrangement",
    "Loading",
    "arrange",
    "load",
    "load_onto",
    "loading_options",
    "mesh_shape",
    "place",
]

Dtype = Literal["bfloat16", "float32"]
Placement = Literal["mapped", "sharded"]

WORK = 1 << 30
"""Bytes for activations, compiled programs and the interpreter; 0.5 GB were seen at full size."""

WORTH_TUNING = 1 << 30
"""Bytes of weights from which some seconds of measuring are soon won back."""


@dataclasses.dataclass(frozen=True, slots=True)
class Loading:
    """How a model is to be held.

    dtype: of the KV cache and of the products. placement: None for what suits the devices. mesh:
    None for all devices. memory: bytes that mapped weights, cache and work may take together, None
    for what is free.
    """

    dtype: Dtype = "bfloat16"
    placement: Placement | None = None
    mesh: MeshShape | None = None
    memory: int | None = None


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, with k, M, G or T for powers of 1000; an int."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, at least 1."""
        size = parse_bytes(str(value)) or 0
        if size < 1:
            self.fail(f"{value!r:.40} is no number of bytes, such as 800M or 16G", param, ctx)
        return size


_OPTIONS = (
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float32"]),
        default="bfloat16",
        show_default=True,
        help="Of activations and the KV cache; weights stay int8.",
    ),
    click.option(
        "--placement",
        type=click.Choice(["mapped", "sharded"]),
        help="mapped leaves the weights in their files, for CPUs and the default there; sharded "
        "copies them to the devices.",
    ),
    click.option(
        "--mesh",
        metavar="expert=N,model=M",
        help="Devices to use; all of them by default. data=N too makes copies of the weights, each "
        "for some of the texts of a batch.",
    ),
    click.option(
        "--memory",
        type=Size(),
        help="Bytes that mapped weights and all else may take, 16G say; what is free by default.",
    ),
)


def loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it receives them as one `Loading` named `loading`."""

    @functools.wraps(command)
    def wired(
        *args: Any,
        dtype: Dtype,
        placement: Placement | None,
        mesh: str | None,
        memory: int | None,
        **kwargs: Any,
    ) -> None:
        shape = None if mesh is None else mesh_shape(mesh)
        command(*args, loading=Loading(dtype, placement, shape, memory), **kwargs)

    for option in reversed(_OPTIONS):
        wired = option(wired)
    return wired


def mesh_shape(text: str) -> MeshShape:
    """The mesh that `--mesh` names.

    Raises:
        click.BadParameter: it names none.
    """
    from loader.weights.partition import MeshShape

    counts = {"data": 1, "expert": 1, "model": 1}
    found = [re.fullmatch(r"(data|expert|model)=(\d+)", part) for part in text.split(",")]
    given = [(part[1], int(part[2])) for part in found if part is not None]
    if len(dict(given)) != len(found):
        raise click.BadParameter(f"not expert=N,model=M: {text!r:.80}", param_hint="--mesh")
    counts |= given
    return MeshShape(**counts)


@dataclasses.dataclass(frozen=True, slots=True)
class Arrangement:
    """Where a model goes: its devices, how they have the weights, and what else was wished."""

    mesh: Mesh
    placement: Placement
    loading: Loading

    @property
    def platform(self) -> str:
        """The kinds of the devices."""
        return "/".join(sorted({it.platform for it in self.mesh.devices.flat})).upper()

    def tuned(self, checkpoint: Checkpoint) -> Tuning | None:
        """What suits the processor, where it is one; see `_tuning`."""
        return _tuning(checkpoint) if self.platform == "CPU" else None


def arrange(config: GrokConfig, loading: Loading, tokens: int = 1) -> Arrangement:
    """Find the devices for a model, and whether they can hold it.

    Args:
        config: the hyperparameters.
        loading: how it is to be held.
        tokens: the longest context that will be generated, for which there must be memory.

    Raises:
        MeshInvalid: the devices cannot be arranged so.
        OutOfReach: weights, cache and work take more memory than the devices have, or mapped
            weights are to be used by devices that are no CPUs.
    """
    from loader.devices import xla_setup as machine
    from loader.devices.placement import check_shared, make_mesh
    from loader.weights.partition import MeshShape

    machine.keep_programs(cache_folder())
    placement, shape = loading.placement, loading.mesh
    if placement == "mapped" or (placement is None and (shape is None or shape.only_model)):
        machine.use_cores(config)
    mesh = make_mesh(config, shape)
    only_cpus = all(device.platform == "cpu" for device in mesh.devices.flat)
    if placement is None:
        placement = "mapped" if MeshShape(**mesh.shape).only_model and only_cpus else "sharded"
    found = Arrangement(mesh, placement, loading)
    if placement == "mapped" and not only_cpus:
        raise OutOfReach(
            f"mapped weights are for CPUs, and the devices are {found.platform}",
            hint="use --placement sharded, or set JAX_PLATFORMS=cpu",
        )
    if placement == "mapped":
        check_shared(MeshShape(**mesh.shape))
    check_fit(config, mesh, tokens, loading.dtype, mapped=placement == "mapped")
    return found


def load(checkpoint: Checkpoint, loading: Loading, tokens: int = 1) -> Engine:
    """The weights where the devices have them, ready to generate; says how long it took.

    Args:
        checkpoint: the tensors in their files.
        loading: how they are to be held.
        tokens: as of `arrange`.

    Raises:
        MeshInvalid, OutOfReach: as `arrange`.
    """
    return load_onto(arrange(checkpoint.config, loading, tokens), checkpoint)


def load_onto(there: Arrangement, checkpoint: Checkpoint) -> Engine:
    """The same onto devices that are found already."""
    from loader.inference.engine import Engine

    params, paging = place(there, checkpoint)
    return Engine(checkpoint.config, params, there.mesh, there.loading.dtype, paging)


def place(there: Arrangement, checkpoint: Checkpoint) -> tuple[Params, Managed | None]:
    """The weights where the devices have them, and who brings their pages; says the time."""
    from loader.devices import placement as placing

    start = time.perf_counter()
    mesh, copied, total = there.mesh, there.placement == "sharded", checkpoint.nbytes
    paging = None
    if copied:
        params = _copy(checkpoint, mesh, there.tuned(checkpoint))
    else:
        params = placing.share(checkpoint, mesh, there.tuned(checkpoint))
        paging = _paging(checkpoint, there.loading)
    seconds = time.perf_counter() - start
    told = lines()
    if told is None:
        click.echo(
            f"{'loaded' if copied else 'mapped'} {bytes_text(total)} "
            f"{'onto' if copied else 'for'} {mesh.size} {there.platform} "
            f"{'device' if mesh.size == 1 else 'devices'} in {seconds_text(seconds)}",
            err=True,
        )
    else:
        told.take(Loaded(total, mesh.size, there.platform, there.placement, round(seconds, 3)))
    return params, paging


def _copy(checkpoint: Checkpoint, mesh: Mesh, suited: Tuning | None) -> Params:
    """Every tensor on the devices, with a bar."""
    from grokfetch.events import Progress
    from loader.devices import placement

    total = checkpoint.nbytes
    done = 0
    with reporter("load") as sink:

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            sink.take(Progress(done, total, "loading"))

        return placement.load(checkpoint, mesh, tuning=suited, on_bytes=count)


def _paging(checkpoint: Checkpoint, loading: Loading) -> Managed:
    """What keeps the pages of mapped weights within the memory that there is; says what stays."""
    from loader.devices.memory import available
    from loader.devices.paging import Managed

    memory = available() if loading.memory is None else loading.memory
    paging = Managed(checkpoint, memory - _beside_weights(checkpoint, loading))
    division = paging.division
    if not division.everything:
        kept = "attention, embedding and" if division.base else "no more than"
        experts = checkpoint.config.num_layers * checkpoint.config.num_experts
        notice(
            f"the weights do not fit into {bytes_text(memory)} of memory: {kept} {division.experts}"
            f" of {experts} experts stay there, the others are read for each token"
        )
    if paging.unlocked:
        notice(
            f"what every token needs cannot be locked in memory ({paging.unlocked}), so that the "
            "system may drop it; more may be locked after: ulimit -l unlimited"
        )
    return paging


def _beside_weights(checkpoint: Checkpoint, loading: Loading) -> int:
    """Bytes that the longest cache and the work of a step take."""
    config = checkpoint.config
    each = 2 if loading.dtype == "bfloat16" else 4
    row = 2 * config.num_layers * config.num_kv_heads * config.key_size * each
    return row * config.sequence_len + WORK


def _tuning(checkpoint: Checkpoint) -> Tuning | None:
    """What suits this processor: as measured once and kept, for models that are worth it."""
    from loader.devices import native
    from loader.devices.tuning import decode, encode, measure
    from loader.devices.xla_setup import processor

    if checkpoint.nbytes < WORTH_TUNING:
        return None
    path = cache_folder() / "tuning.json"
    name = processor()
    with contextlib.suppress(OSError):
        kept = decode(path.read_bytes(), name)
        if kept is not None and (not kept.native or native.built(cache_folder() / name)):
            return kept
    notice("measuring once what suits this processor")
    found = measure(cache_folder() / name)
    with contextlib.suppress(OSError), replacing(path) as file:
        file.write(encode(found, name))
    return found
