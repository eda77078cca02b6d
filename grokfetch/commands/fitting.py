"""Whether devices can hold a model, asked before anything is loaded; no command of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from grokfetch.errors import OutOfReach
from grokfetch.units import bytes_text
from loader.devices.memory import available

if TYPE_CHECKING:
    from loader.devices.placement import Mesh
    from loader.weights.capacity import Memory, Shortage
    from loader.weights.schema import GrokConfig

__all__ = ["check_fit"]


def check_fit(
    config: GrokConfig,
    mesh: Mesh,
    tokens: int,
    dtype: Literal["bfloat16", "float32"],
    *,
    mapped: bool,
) -> None:
    """Refuse what cannot fit; the kernel would end it without a word once the memory is full.

    Raises:
        OutOfReach: what is needed and what is free, and the smallest change that would do.
    """
    from loader.weights.capacity import Use, shortage
    from loader.weights.partition import MeshShape

    memory = _free_memory(mesh)
    if memory is None:
        return
    use = Use(
        config,
        MeshShape(**mesh.shape),
        min(tokens, config.sequence_len),
        {"bfloat16": 2, "float32": 4}[dtype],
        mapped=mapped,
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
    from loader.weights.capacity import Memory

    devices = mesh.local_devices
    if all(device.platform == "cpu" for device in devices):
        return Memory(available(), len(devices))
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
    if short.mesh is not None:
        return f"{short.mesh.devices} such devices would do: --mesh {short.mesh}"
    if memory.sharers:
        return "fewer tokens or devices would not do; make memory free, or use another machine"
    return "leave the weights in their files, on the CPU: JAX_PLATFORMS=cpu"
