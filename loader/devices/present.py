"""GPUs and TPUs of this machine, found without importing jax, which takes seconds and memory."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

__all__ = ["Device", "devices"]

TIMEOUT_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class Device:
    """One device: its name, and its memory in bytes, None if that cannot be known."""

    name: str
    memory: int | None = None


def devices(root: Path = Path("/")) -> tuple[Device, ...]:
    """The devices here, by the drivers' files below `root`; NVIDIA's own tool adds the memory."""
    graphics = _nvidia(root)
    if graphics:
        named = _nvidia_smi() if root == Path("/") else ()
        return named if len(named) == len(graphics) else graphics
    tensor = (*root.glob("dev/accel[0-9]*"), *root.glob("dev/vfio/[0-9]*"))
    return tuple(Device("TPU") for _ in tensor)


def _nvidia(root: Path) -> tuple[Device, ...]:
    names = []
    for path in sorted(root.glob("proc/driver/nvidia/gpus/*/information")):
        with contextlib.suppress(OSError):
            match = re.search(
                r"^Model:\s*(.+?)\s*$", path.read_text(errors="replace"), re.MULTILINE
            )
            names.append(match[1] if match else "NVIDIA GPU")
    files = [path for path in root.glob("dev/nvidia*") if re.fullmatch(r"nvidia\d+", path.name)]
    # In a container the files of /proc name every GPU of the machine, those of /dev only ours.
    names = names[: len(files)]
    names += ["NVIDIA GPU"] * (len(files) - len(names))
    return tuple(map(Device, names))


def _nvidia_smi() -> tuple[Device, ...]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed call of a tool found on the PATH
            query, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = (line.rpartition(", ") for line in done.stdout.splitlines())
    return tuple(
        Device(name, int(mebibytes) * 2**20 if mebibytes.isdigit() else None)
        for name, _, mebibytes in rows
    )
