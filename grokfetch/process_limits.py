"""How much of the machine this process may use: cores and memory, by affinity, cgroup and `ulimit`.

In a container or a batch job a process may use less than the machine has. If it takes more memory
than its cgroup allows, the kernel ends it, however much is free on the machine; if it uses more
processor time than its quota, the kernel stops it until the next period. Source: the kernel's
documentation of cgroup-v1 and cgroup-v2.
"""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

__all__ = ["address_space", "available_memory", "cgroup_memory", "cores", "most_memory"]

ROOT = Path("/")

NO_LIMIT_V1 = 1 << 62
"""In version 1 of cgroups, a limit of this many bytes or more means no limit."""


def cores(root: Path = ROOT) -> int:
    """Cores that this process may keep busy, by its affinity and the quotas of its cgroups.

    Args:
        root: where `proc` and `sys` are.
    """
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    # A fraction of a core is worth a thread of its own.
    quotas = [-int(-quota // 1) for quota in _quotas(root)]
    return max(1, min([usable or 1, *quotas]))


def most_memory() -> int:
    """Bytes that this process may ever hold: the machine's memory, or less by its cgroup."""
    import psutil

    limits = [limit for limit, _ in _memory_limits(ROOT)]
    return min([int(psutil.virtual_memory().total), *limits])


def available_memory() -> int:
    """Bytes that this process may take before the kernel ends it for that."""
    import psutil

    room = cgroup_memory(ROOT)
    free = int(psutil.virtual_memory().available)
    return free if room is None else min(free, room)


def address_space() -> tuple[int, int] | None:
    """Bytes that `ulimit -v` allows to be mapped, and how many of them are left; None for no limit.

    Mapped files count with their whole length, however much of them is in memory.
    """
    import psutil

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    return limit, max(0, limit - psutil.Process().memory_info().vms)


def cgroup_memory(root: Path) -> int | None:
    """Bytes that the limits of this process's cgroup and of its ancestors leave.

    The kernel counts the page cache, too, but frees it when memory is needed, so here it is free.

    Args:
        root: where `proc` and `sys` are.

    Returns:
        None without a limit.
    """
    rooms = [room for _, room in _memory_limits(root)]
    return max(0, min(rooms)) if rooms else None


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """For each of our cgroups with a limit, the limit and what it leaves, in bytes."""
    for folder in _folders(root, "memory"):
        limit, usage = folder / "memory.max", folder / "memory.current"
        if not limit.exists():
            limit, usage = folder / "memory.limit_in_bytes", folder / "memory.usage_in_bytes"
        with contextlib.suppress(OSError, ValueError):
            # Above memory.high a process is not ended, but slowed down without limit.
            texts = [limit.read_text().strip(), _text(folder / "memory.high")]
            limits = [int(text) for text in texts if text not in ("", "max")]
            most = min(limits, default=NO_LIMIT_V1)
            if most < NO_LIMIT_V1:
                yield most, most - int(usage.read_text()) + _file_pages(folder)


def _file_pages(folder: Path) -> int:
    rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
    stat = {name: int(value) for name, value in rows}
    # Version 1 counts child cgroups separately.
    total = "total_" if "total_active_file" in stat else ""
    return sum(stat.get(f"{total}{kind}_file", 0) for kind in ("active", "inactive"))


def _quotas(root: Path) -> Iterator[float]:
    """For each of our cgroups with a quota, the cores that it is enough for."""
    for folder in _folders(root, "cpu"):
        whole = _text(folder / "cpu.max").split()
        period = [_text(folder / f"cpu.cfs_{part}_us") for part in ("quota", "period")]
        with contextlib.suppress(ValueError, ZeroDivisionError):
            quota, length = whole or period
            if quota not in ("max", "-1"):
                yield int(quota) / int(length)


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _folders(root: Path, controller: str) -> Iterator[Path]:
    """The folders of a controller for our cgroup and its ancestors, in both versions."""
    for row in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, place = row.split(":", 2)
        mounts: tuple[str, ...]
        if not controllers:
            mounts = ("sys/fs/cgroup", "sys/fs/cgroup/unified")
        elif controller in controllers.split(","):
            mounts = (f"sys/fs/cgroup/{controller}", f"sys/fs/cgroup/{controllers}")
        else:
            continue
        # In a container the mount may begin at our own cgroup; callers skip folders that do not
        # exist.
        path = PurePosixPath(place.lstrip("/"))
        for mount in dict.fromkeys(mounts):
            yield from (root / mount / part for part in (path, *path.parents))
