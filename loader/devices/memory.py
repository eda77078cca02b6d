"""How much memory this process may take: what the machine has free, and what its cgroup leaves.

A kernel ends a process that goes beyond its cgroup without asking what the machine has free. Pages
of files count against the limit too, but go when they are needed, so they count as free here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import psutil

from loader.weights.capacity import Memory

if TYPE_CHECKING:
    import jax

__all__ = ["available", "cgroup_room", "free_memory"]

ROOT = Path("/")


def available() -> int:
    """Bytes that may be taken before the kernel ends a process for it."""
    room = cgroup_room(ROOT)
    free = int(psutil.virtual_memory().available)
    return free if room is None else min(free, room)


def free_memory(devices: Sequence[jax.Device]) -> Memory | None:
    """What devices of this host have free; None where they do not tell."""
    if all(device.platform == "cpu" for device in devices):
        return Memory(available(), len(devices))
    stats = [device.memory_stats() for device in devices]
    if not all(of_device and "bytes_limit" in of_device for of_device in stats):
        return None
    return Memory(
        min(of_device["bytes_limit"] - of_device.get("bytes_in_use", 0) for of_device in stats)
    )


def cgroup_room(root: Path) -> int | None:
    """Bytes that the limits of this process's cgroup and of those above it leave.

    Args:
        root: where `proc` and `sys` are.

    Returns:
        None where nothing limits it. Source: the kernel's cgroup-v1/memory and cgroup-v2 documents.
    """
    rooms = [room for folder in _folders(root) if (room := _room(folder)) is not None]
    return max(0, min(rooms)) if rooms else None


def _folders(root: Path) -> Iterator[Path]:
    """The folders of our cgroup and its ancestors, of both versions."""
    try:
        rows = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for row in rows:
        _, controllers, place = row.split(":", 2)
        mounts: tuple[str, ...]
        if not controllers:
            mounts = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
        elif "memory" in controllers.split(","):
            mounts = ("sys/fs/cgroup/memory",)
        else:
            continue
        # In a container the mount may begin at our own cgroup: what is not there is passed over.
        path = PurePosixPath(place.lstrip("/"))
        for mount in mounts:
            yield from (root / mount / part for part in (path, *path.parents))


def _room(folder: Path) -> int | None:
    """What one cgroup leaves, None where it sets no limit."""
    for limit, usage in (
        ("memory.max", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most = (folder / limit).read_text().strip()
            used = int((folder / usage).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            continue
        # Version 1 says "no limit" with a number beyond any memory.
        if most == "max" or int(most) >= 1 << 62:
            return None
        total = "total_" if "total_active_file" in stat else ""
        pages = sum(int(stat.get(f"{total}{kind}_file", 0)) for kind in ("active", "inactive"))
        return int(most) - used + pages
    return None
