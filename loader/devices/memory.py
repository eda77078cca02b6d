"""How much memory the devices of this host have free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from grokfetch.process_limits import available_memory
from loader.weights.capacity import Memory

if TYPE_CHECKING:
    import jax

__all__ = ["free_memory"]


def free_memory(devices: Sequence[jax.Device]) -> Memory | None:
    """The free memory of devices of this host; None if they do not report it."""
    if all(device.platform == "cpu" for device in devices):
        return Memory(available_memory(), len(devices))
    stats = [device.memory_stats() for device in devices]
    if not all(of_device and "bytes_limit" in of_device for of_device in stats):
        return None
    return Memory(
        min(of_device["bytes_limit"] - of_device.get("bytes_in_use", 0) for of_device in stats)
    )
