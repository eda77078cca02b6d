"""GPUs and TPUs by their figures: memory, and its rate. Pure.

Sources: the makers' data sheets, and the target descriptions of OpenXLA for the GPUs' figures that
their compiler asks for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

__all__ = ["ACCELERATORS", "Accelerator", "Graphics"]

GB, GIB = 10**9, 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class Graphics:
    """What the compiler for NVIDIA's GPUs asks for.

    capability: of CUDA, major number. cores: streaming multiprocessors. fpus: float32 units of a
    core. shared: bytes of shared memory of a core, of which 1 KiB less is open to one block. cache:
    bytes of the second-level cache. clock: GHz.
    """

    capability: int
    cores: int
    fpus: int
    shared: int
    cache: int
    clock: float


@dataclasses.dataclass(frozen=True, slots=True)
class Accelerator:
    """One kind of device.

    memory: bytes of one device. rate: bytes that it reads from there in a second. dimensions: of
    the grid that TPUs stand in, 0 for GPUs. graphics: for GPUs alone.
    """

    name: str
    memory: int
    rate: float
    dimensions: int = 0
    graphics: Graphics | None = None


ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {
        one.name: one
        for one in (
            Accelerator("v4", 32 * GIB, 1228e9, 3),
            Accelerator("v5e", 16 * GIB, 819e9, 2),
            Accelerator("v5p", 95 * GIB, 2765e9, 3),
            Accelerator("v6e", 32 * GIB, 1640e9, 2),
            Accelerator(
                "a100",
                85_100_068_864,
                2039e9,
                graphics=Graphics(8, 108, 64, 167_936, 41_943_040, 1.41),
            ),
            Accelerator(
                "h100",
                84_942_979_072,
                3352e9,
                graphics=Graphics(9, 132, 128, 233_472, 52_428_800, 1.98),
            ),
            Accelerator(
                "h200",
                151_397_597_184,
                4800e9,
                graphics=Graphics(9, 132, 128, 233_472, 52_428_800, 1.98),
            ),
            Accelerator(
                "b200",
                191_514_411_008,
                7672e9,
                graphics=Graphics(10, 148, 128, 233_472, 132_644_864, 1.965),
            ),
        )
    }
)
"""By name."""
