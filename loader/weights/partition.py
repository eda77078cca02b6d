"""Which block of a tensor each device of a mesh holds: rules and arithmetic, no arrays.

A mesh has three axes: `model` splits heads and expert widths (tensor parallel), `expert` splits the
experts (expert parallel), and along `data`, where the rows of a batch are split, the weights are
copies (data parallel). The vocabulary is split over `expert` and `model` together. Devices are
numbered row by row, `model` fastest, `data` slowest. The module imports neither jax nor numpy, so
that a fetch can ask for one host's share.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Literal, NamedTuple

from grokfetch.errors import MeshInvalid
from loader.weights.schema import Axis, GrokConfig, ParamSpec, parameters

__all__ = [
    "RULES",
    "Block",
    "MeshAxis",
    "MeshShape",
    "Position",
    "arrangements",
    "check_mesh",
    "choose_mesh",
    "expanded_rows",
    "mesh_axes",
    "positions",
    "scale_block",
    "scale_rows",
    "scale_shape",
    "weight_block",
    "what_works",
]

MeshAxis = Literal["expert", "model"]
Block = tuple[slice, ...]
"""One slice with whole start and stop for every dimension of a tensor."""

RULES: Mapping[Axis, tuple[MeshAxis, ...]] = MappingProxyType(
    {
        "vocab": ("expert", "model"),
        "embed": (),
        "q_heads": ("model",),
        "kv_heads": ("model",),
        "expert": ("expert",),
        "ff": ("model",),
        "router": (),
    }
)
"""The mesh axes that together split each logical axis, slowest first; if there are none, every
device holds all of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class MeshShape:
    """How many devices are along each mesh axis."""

    expert: int = 1
    model: int = 1
    data: int = 1

    def __str__(self) -> str:
        copies = f"data={self.data}," if self.data > 1 else ""
        return f"{copies}expert={self.expert},model={self.model}"

    @property
    def devices(self) -> int:
        """Number of devices in the mesh."""
        return self.data * self.expert * self.model

    @property
    def only_model(self) -> bool:
        """Whether all devices are along `model`, as they must be to share mapped weights."""
        return self.devices == self.model


class Position(NamedTuple):
    """The position of one device in a mesh."""

    expert: int
    model: int
    data: int = 0


def positions(shape: MeshShape) -> Iterator[Position]:
    """Every position of a mesh, in device order."""
    axes = map(range, (shape.data, shape.expert, shape.model))
    for data, expert, model in itertools.product(*axes):
        yield Position(expert, model, data)


def mesh_axes(
    spec: ParamSpec, rules: Mapping[Axis, tuple[MeshAxis, ...]] = RULES
) -> tuple[tuple[MeshAxis, ...], ...]:
    """The mesh axes that split each dimension of a tensor.

    Raises:
        MeshInvalid: if a logical axis has no rule, or one mesh axis would split two dimensions.
    """
    for axis in spec.axes:
        if axis not in rules:
            raise MeshInvalid(f"no sharding rule for the axis {axis!r} of {spec.name}")
    axes = tuple(rules[axis] for axis in spec.axes)
    used = list(itertools.chain.from_iterable(axes))
    if len(set(used)) != len(used):
        raise MeshInvalid(f"one mesh axis would split two dimensions of {spec.name}: {spec.axes}")
    return axes


def choose_mesh(config: GrokConfig, devices: int) -> MeshShape:
    """The mesh for a number of devices: as many on `model` as divide it, the others on `expert`.

    Raises:
        MeshInvalid: no arrangement divides; the message names a dimension and the largest count
            that works.
    """
    if devices < 1:
        raise MeshInvalid(f"a mesh needs at least one device, not {devices}")
    shape = next(arrangements(config, devices), None)
    if shape is None:
        misfit = _misfit(config, MeshShape(model=devices))
        raise MeshInvalid(
            f"{devices} devices cannot share this model: {misfit}",
            hint=what_works(config, devices),
        )
    return shape


def check_mesh(config: GrokConfig, shape: MeshShape) -> None:
    """Make sure that a mesh divides every dimension that it splits, in whole heads and experts.

    Raises:
        MeshInvalid: naming the tensor and the dimension that does not divide, and what would work.
    """
    if min(dataclasses.astuple(shape)) < 1:
        raise MeshInvalid(f"every mesh axis must be at least 1, not {shape}")
    misfit = _misfit(config, shape)
    if misfit:
        message = f"the mesh {shape} does not fit: {misfit}"
        raise MeshInvalid(message, hint=what_works(config, shape.devices))


def weight_block(spec: ParamSpec, shape: MeshShape, position: Position) -> Block:
    """The block of a tensor that the device at `position` holds.

    `shape` must have passed `check_mesh`.
    """
    return _block(spec, spec.shape, shape, position)


def scale_rows(spec: ParamSpec, shape: MeshShape) -> int:
    """Scale rows that a quantised tensor needs on this mesh, over all devices.

    If the contracted axis is split over n devices and there are G scale groups, every device gets
    whole rows only once there are lcm(G, n) of them: a device may hold part of a group.
    """
    assert spec.scale_groups is not None, spec.name
    return expanded_rows(spec.scale_groups, _count(shape, mesh_axes(spec)[-2]))


def expanded_rows(groups: int, parts: int) -> int:
    """Scale rows of a tensor whose contracted axis is cut into equal parts; see `scale_rows`."""
    return math.lcm(groups, parts)


def scale_shape(spec: ParamSpec, shape: MeshShape) -> tuple[int, ...]:
    """Shape of a tensor's scales once expanded to `scale_rows`."""
    return (*spec.shape[:-2], scale_rows(spec, shape), spec.shape[-1])


def scale_block(spec: ParamSpec, shape: MeshShape, position: Position) -> Block:
    """The block of the expanded scales that the device at `position` holds."""
    return _block(spec, scale_shape(spec, shape), shape, position)


def _block(spec: ParamSpec, sizes: tuple[int, ...], shape: MeshShape, position: Position) -> Block:
    def cut(size: int, axes: tuple[MeshAxis, ...]) -> slice:
        width, number = size // _count(shape, axes), 0
        for axis in axes:
            number = number * getattr(shape, axis) + getattr(position, axis)
        return slice(number * width, (number + 1) * width)

    return tuple(cut(size, axes) for size, axes in zip(sizes, mesh_axes(spec), strict=True))


def _count(shape: MeshShape, axes: tuple[MeshAxis, ...]) -> int:
    return math.prod(getattr(shape, axis) for axis in axes)


def _units(config: GrokConfig, axis: Axis, size: int) -> int:
    """The number of units along an axis: heads cannot be cut, everything else can."""
    return size // config.key_size if axis in {"q_heads", "kv_heads"} else size


@functools.cache
def _distinct(config: GrokConfig) -> tuple[ParamSpec, ...]:
    """The first tensor of each kind; layers are alike."""
    specs: dict[tuple[Axis, ...], ParamSpec] = {}
    for spec in parameters(config):
        specs.setdefault(spec.axes, spec)
    return tuple(specs.values())


def _misfit(config: GrokConfig, shape: MeshShape) -> str:
    """The first dimension that the mesh does not divide, in words; empty if all do."""
    for spec in _distinct(config):
        for size, axis, split in zip(spec.shape, spec.axes, mesh_axes(spec), strict=True):
            units, parts = _units(config, axis, size), _count(shape, split)
            if units % parts:
                return f"{axis} of {spec.name} counts {units}, not divisible by {parts}"
    return ""


def arrangements(config: GrokConfig, devices: int) -> Iterator[MeshShape]:
    """Every mesh of so many devices that fits without copies, most on `model` first."""
    for model in range(devices, 0, -1):
        if devices % model == 0:
            shape = MeshShape(devices // model, model)
            if not _misfit(config, shape):
                yield shape


def what_works(config: GrokConfig, devices: int) -> str:
    """The meshes of so many devices that fit, or of the largest smaller count, in words."""
    counts = range(devices, 0, -1)
    working = next(shapes for n in counts if (shapes := list(arrangements(config, n))))
    count = working[0].devices
    meshes = " or ".join(f"--mesh {shape}" for shape in working)
    if count == devices:
        return f"with {devices} devices this works: {meshes}"
    return f"the largest smaller count that works is {count}: {meshes}"
