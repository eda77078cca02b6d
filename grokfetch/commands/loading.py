"""The options by which a person says how to hold a model, and the model held so; no command."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import click

from grokfetch.commands.reporting import lines, reporter
from grokfetch.errors import MeshInvalid, OutOfReach
from grokfetch.events import Loaded
from grokfetch.progress import bytes_text, seconds_text

if TYPE_CHECKING:
    from loader.checkpoint import Checkpoint
    from loader.fit import Memory, Shortage
    from loader.generate import Engine
    from loader.placement import Mesh, Params
    from loader.schema import GrokConfig
    from loader.sharding import MeshShape

__all__ = ["Loading", "load", "loading_options"]

Dtype = Literal["bfloat16", "float32"]
Placement = Literal["mapped", "sharded"]


@dataclasses.dataclass(frozen=True, slots=True)
class Loading:
    """How a model is to be held.

    dtype: of the KV cache and of the products. placement: None for what suits the devices. mesh:
    None for all devices.
    """

    dtype: Dtype = "bfloat16"
    placement: Placement | None = None
    mesh: MeshShape | None = None


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
        "--mesh", metavar="expert=N,model=M", help="Devices to use; all of them by default."
    ),
)


def loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it receives them as one `Loading` named `loading`."""

    @functools.wraps(command)
    def wired(
        *args: Any, dtype: Dtype, placement: Placement | None, mesh: str | None, **kwargs: Any
    ) -> None:
        shape = None if mesh is None else _mesh_shape(mesh)
        command(*args, loading=Loading(dtype, placement, shape), **kwargs)

    for option in reversed(_OPTIONS):
        wired = option(wired)
    return wired


def _mesh_shape(text: str) -> MeshShape:
    """The mesh that `text` names.

    Raises:
        MeshInvalid: it has replicas.
    """
    from loader.sharding import MeshShape

    counts = {"data": 1, "expert": 1, "model": 1}
    found = [re.fullmatch(r"(data|expert|model)=(\d+)", part) for part in text.split(",")]
    given = [(part[1], int(part[2])) for part in found if part is not None]
    if len(dict(given)) != len(found):
        raise click.BadParameter(f"not expert=N,model=M: {text!r:.80}", param_hint="--mesh")
    counts |= given
    if counts["data"] != 1:
        raise MeshInvalid(
            f"data={counts['data']} asks for so many copies of the weights, and the rows of a batch"
            " are not dealt out to copies: data must be 1",
            hint="give all devices to expert and model",
        )
    return MeshShape(counts["expert"], counts["model"])


def load(checkpoint: Checkpoint, loading: Loading, tokens: int = 1) -> Engine:
    """The weights where the devices have them, ready to generate; says how long it took.

    Args:
        checkpoint: the tensors in their files.
        loading: how they are to be held.
        tokens: the longest context that will be generated, for which there must be memory.

    Raises:
        MeshInvalid: the devices cannot be arranged so.
        OutOfReach: weights, cache and work take more memory than the devices have, or mapped
            weights are to be used by devices that are no CPUs.
    """
    from loader import placement as placing
    from loader.generate import Engine

    start = time.perf_counter()
    placement, shape = loading.placement, loading.mesh
    splits_experts = shape is not None and shape.expert > 1
    if placement == "mapped" or (placement is None and not splits_experts):
        placing.use_cores(checkpoint.config)
    mesh = placing.make_mesh(checkpoint.config, shape)
    kinds = {device.platform for device in mesh.devices.flat}
    platform = "/".join(sorted(kinds)).upper()
    if placement is None:
        placement = "sharded" if splits_experts or kinds != {"cpu"} else "mapped"
    if placement == "mapped" and kinds != {"cpu"}:
        raise OutOfReach(
            f"mapped weights are for CPUs, and the devices are {platform}",
            hint="use --placement sharded, or set JAX_PLATFORMS=cpu",
        )
    copied = placement == "sharded"
    _check_memory(
        checkpoint.config, mesh, dataclasses.replace(loading, placement=placement), tokens
    )
    params = _copy(checkpoint, mesh) if copied else placing.share(checkpoint, mesh)
    total = sum(tensor.nbytes for tensor in checkpoint.values())
    seconds = time.perf_counter() - start
    machine = lines()
    if machine is None:
        click.echo(
            f"{'loaded' if copied else 'mapped'} {bytes_text(total)} "
            f"{'onto' if copied else 'for'} {mesh.size} {platform} "
            f"{'device' if mesh.size == 1 else 'devices'} in {seconds_text(seconds)}",
            err=True,
        )
    else:
        machine.take(Loaded(total, mesh.size, platform, placement, round(seconds, 3)))
    return Engine(checkpoint.config, params, mesh, loading.dtype)


def _copy(checkpoint: Checkpoint, mesh: Mesh) -> Params:
    """Every tensor on the devices, with a bar."""
    from grokfetch.verify import Progress
    from loader import placement

    total = sum(tensor.nbytes for tensor in checkpoint.values())
    done = 0
    with reporter("load") as sink:

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            sink.take(Progress(done, total, "loading"))

        return placement.load(checkpoint, mesh, on_bytes=count)


def _check_memory(config: GrokConfig, mesh: Mesh, loading: Loading, tokens: int) -> None:
    """Refuse what cannot fit; the kernel would end it without a word once the memory is full.

    Raises:
        OutOfReach: what is needed and what is free, and the smallest change that would do.
    """
    from loader.fit import Use, shortage
    from loader.sharding import MeshShape

    memory = _free_memory(mesh)
    if memory is None:
        return
    use = Use(
        config,
        MeshShape(mesh.shape["expert"], mesh.shape["model"]),
        min(tokens, config.sequence_len),
        {"bfloat16": 2, "float32": 4}[loading.dtype],
        mapped=loading.placement == "mapped",
    )
    short = shortage(use, memory)
    if short is not None:
        each = "" if memory.sharers else " of each device"
        raise OutOfReach(
            f"the model takes {bytes_text(short.needed)} of memory{each},"
            f" {bytes_text(memory.free)} are free",
            hint=_help(short, memory),
        )


def _free_memory(mesh: Mesh) -> Memory | None:
    """What the devices of a mesh have free on this host; None where they do not tell."""
    import psutil

    from loader.fit import Memory

    devices = mesh.local_devices
    if all(device.platform == "cpu" for device in devices):
        return Memory(psutil.virtual_memory().available, len(devices))
    told = [device.memory_stats() for device in devices]
    if not all(stats and "bytes_limit" in stats for stats in told):
        return None
    return Memory(min(stats["bytes_limit"] - stats.get("bytes_in_use", 0) for stats in told))


def _help(short: Shortage, memory: Memory) -> str:
    """The smallest change that makes a model fit, in words."""
    if short.tokens is not None:
        return f"a context of {short.tokens:,} tokens would fit: prompt and --max-tokens together"
    if short.mapped:
        return "leave the weights in their files: --placement mapped"
    if short.devices is not None:
        return f"{short.devices} such devices would do"
    if memory.sharers:
        return "fewer tokens or devices would not do; make memory free, or use another machine"
    return "leave the weights in their files, on the CPU: JAX_PLATFORMS=cpu"
