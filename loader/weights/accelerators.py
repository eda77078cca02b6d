"""The figures of GPUs and TPUs, and what a model would need on them. Pure.

Sources: the makers' data sheets; for TPUs' memory, what their compiler says is available; for GPUs,
the target descriptions of OpenXLA, which their compiler needs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType

from loader.weights.capacity import Memory, Need, Use, need, reads
from loader.weights.limits import GPU_SHARE
from loader.weights.partition import choose_mesh
from loader.weights.schema import GrokConfig

__all__ = ["ACCELERATORS", "Accelerator", "Graphics", "Prospect", "Slice", "prospect", "slice_of"]

GIB = 2**30


@dataclasses.dataclass(frozen=True, slots=True)
class Graphics:
    """What the compiler for NVIDIA's GPUs needs to know.

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

    memory: bytes of one device. rate: bytes that it reads from this memory in a second. dimensions:
    of the grid of TPUs, 0 for GPUs. cores: how many one device counts as in Google's names of
    slices, 0 for GPUs. graphics: only for GPUs.
    """

    name: str
    memory: int
    rate: float
    dimensions: int = 0
    cores: int = 0
    graphics: Graphics | None = None

    @property
    def usable(self) -> int:
        """Bytes of one device that JAX can use."""
        return int(self.memory * GPU_SHARE) if self.graphics else self.memory


ACCELERATORS: Mapping[str, Accelerator] = MappingProxyType(
    {
        one.name: one
        for one in (
            Accelerator("v4", int(30.75 * GIB), 1228e9, 3, 2),
            Accelerator("v5e", int(15.75 * GIB), 819e9, 2, 1),
            Accelerator("v5p", int(95.74 * GIB), 2765e9, 3, 2),
            Accelerator("v6e", int(31.25 * GIB), 1640e9, 2, 1),
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


@dataclasses.dataclass(frozen=True, slots=True)
class Slice:
    """Some devices of one kind that work together, and their name."""

    name: str
    kind: Accelerator
    devices: int


def slice_of(name: str) -> Slice | None:
    """The devices that a name stands for, None if it is not a name of any.

    `h100x8` is eight devices, `h100` is one. `v5p-8` is one of Google's names: for v4 and v5p these
    count TensorCores, two per device; for v5e (also v5litepod) and v6e, devices.
    """
    match = re.fullmatch(r"([a-z][a-z0-9]*?)(?:([x-])(\d{1,6}))?", name.lower())
    kind = ACCELERATORS.get(match[1].replace("v5litepod", "v5e")) if match else None
    if match is None or kind is None:
        return None
    count, remainder = int(match[3] or 1), 0
    if match[2] == "-":
        count, remainder = divmod(count, kind.cores) if kind.cores else (0, 0)
    return None if remainder or not count else Slice(name, kind, count)


@dataclasses.dataclass(frozen=True, slots=True)
class Prospect:
    """What a model would need on each device of a slice.

    use: how it would be used, with the mesh of the slice. need: bytes that it must hold. read:
    bytes that one token must read. compiled: whether work and bytes read are the compiler's figures
    instead of being derived from the shapes.
    """

    slice: Slice
    use: Use
    need: Need
    read: int
    compiled: bool = False

    @property
    def memory(self) -> Memory:
        """What each device has."""
        return Memory(self.slice.kind.usable)

    @property
    def fits(self) -> bool:
        """Whether that is enough."""
        return self.need.total <= self.memory.free

    @property
    def token_s(self) -> float:
        """Seconds that reading takes for one token, at the full rate of the memory."""
        return self.read / self.slice.kind.rate


def prospect(config: GrokConfig, devices: Slice, tokens: int) -> Prospect:
    """What a model needs on a slice for one text of up to so many tokens, in bfloat16.

    Raises:
        MeshInvalid: so many devices cannot share the model.
    """
    use = Use(config, choose_mesh(config, devices.devices), tokens)
    return Prospect(devices, use, need(use), reads(use).total(config.num_layers))
