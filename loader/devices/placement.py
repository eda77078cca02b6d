"""From mapped tensors to device arrays: each device gets its own block, or all the same pages.

`load` copies to each device the block that it needs. `share` copies nothing but the small tensors:
the devices are CPUs, and the pages of the shard files are the weights. The parameters of each layer
are separate arrays, so that one compiled layer serves all of them and a layer can be placed, or
dropped, without touching another.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, overload

import jax
import numpy as np
import psutil
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grokfetch.errors import MeshInvalid, OutOfReach
from loader.devices.kernels import Tuning
from loader.devices.mapped import LONGEST, Mapped, MappedTable, MatrixPlace, TablePlace
from loader.devices.products import Quantized, Table, Weights
from loader.devices.transfer import Stored, transfer
from loader.weights.checkpoint import Checkpoint, Tensor
from loader.weights.partition import (
    MeshShape,
    check_mesh,
    choose_mesh,
    mesh_axes,
    what_works,
)
from loader.weights.schema import (
    LAYER,
    OUTER,
    GrokConfig,
    Kind,
    ParamSpec,
    by_layer,
    layer_prefix,
    weight_bytes,
)

__all__ = [
    "Layer",
    "Mesh",
    "Params",
    "Source",
    "Stored",
    "check_shared",
    "load",
    "make_mesh",
    "of_each_host",
    "params_of",
    "share",
]


class Source(Protocol):
    """A checkpoint on the host: tensors by the names of `loader.weights.schema.parameters`."""

    @property
    def config(self) -> GrokConfig:
        """The hyperparameters of the model that the tensors make up."""

    def __getitem__(self, name: str, /) -> Stored:
        """The tensor of that name."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """The weights of one decoder layer, by the fields of `loader.weights.schema.LAYER`.

    D is the width of the residual stream.

    The four norms are float32 `[D]`, named for what they come before or after. query
    `[D, Q * d]`, key and value `[D, K * d]`, output `[Q * d, D]` (Q query heads and K key/value
    heads of size d), gate and up `[E, D, F]`, down `[E, F, D]` (E experts of width F); router
    float32 `[D, E]`. The reference calls output `linear`, and the experts' gate, up and down
    `linear`, `linear_v` and `linear_1`.
    """

    before_attention: Array
    after_attention: Array
    before_experts: Array
    after_experts: Array
    query: Weights
    key: Weights
    value: Weights
    output: Weights
    router: Array
    gate: Weights
    up: Weights
    down: Weights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, slots=True)
class Params:
    """All weights: embedding float32 `[V, D]`, final norm float32 `[D]`, the layers in order."""

    embedding: Table
    norm: Array
    layers: Sequence[Layer]


class _Arriving(Sequence[Layer]):
    """Layers that are still on their way, each placed when it is first asked for."""

    def __init__(self, count: int, place: Callable[[int], Layer]) -> None:
        self._numbers = range(count)
        self._place = functools.cache(place)

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> Layer: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Layer, ...]: ...
    def __getitem__(self, number: int | slice) -> Layer | tuple[Layer, ...]:
        if isinstance(number, slice):
            return tuple(map(self._place, self._numbers[number]))
        return self._place(self._numbers[number])


def make_mesh(
    config: GrokConfig,
    shape: MeshShape | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh with the axes `data`, `expert` and `model`.

    Args:
        config: the model that must fit the mesh.
        shape: the mesh wanted; by default `choose_mesh` for all of `devices`.
        devices: the devices to use, by default all that jax sees; the first ones of each host are
            taken, the same number from each, in the order of the hosts.

    Raises:
        MeshInvalid: a dimension does not divide, or there are too few devices.
    """
    found = list(jax.devices() if devices is None else devices)
    shape = shape or choose_mesh(config, len(found))
    check_mesh(config, shape)
    if shape.devices > len(found):
        raise MeshInvalid(
            f"the mesh {shape} needs {shape.devices} devices, and there are {len(found)}",
            hint=what_works(config, len(found)),
        )
    chosen = np.array(of_each_host(found, shape.devices), object)
    return Mesh(chosen.reshape(shape.data, shape.expert, shape.model), ("data", "expert", "model"))


def of_each_host(devices: Sequence[jax.Device], count: int) -> list[jax.Device]:
    """The first devices of each host, `count` in all, host after host."""
    hosts = sorted({device.process_index for device in devices})
    each, rest = divmod(count, len(hosts))
    of_host = [[it for it in devices if it.process_index == host][:each] for host in hosts]
    if rest or any(len(some) < each for some in of_host):
        raise MeshInvalid(
            f"{len(hosts)} hosts cannot have equally many of {count} devices",
            hint="choose another mesh: --mesh",
        )
    return [device for some in of_host for device in some]


def load(
    checkpoint: Source,
    mesh: Mesh,
    *,
    tuning: Tuning | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Params:
    """Place every tensor of a checkpoint, layer by layer.

    Weights stay int8 and scales bfloat16. Each block goes from the mapped pages of its file to the
    devices that hold it; each of several processes reads what its own devices hold.

    Args:
        checkpoint: the tensors on the host.
        mesh: from `make_mesh`, for the config of the checkpoint.
        tuning: what suits the processor, if the devices are CPUs; from `loader.devices.tuning`.
        on_bytes: called with the bytes of the checkpoint as they are read.
    """
    config = checkpoint.config
    specs = by_layer(config)
    placed = transfer(
        ((checkpoint[spec.name], sharding(spec, mesh)) for spec in specs),
        on_bytes=on_bytes,
        drop=_crowded(config, mesh),
    )
    suited = (tuning or Tuning()) if _only_cpus(mesh) else None
    arrays = {
        spec.name: dataclasses.replace(array, tuning=suited)
        if isinstance(array, Quantized)
        else array
        for spec, array in zip(specs, placed, strict=True)
    }
    return params_of(arrays.__getitem__, config.num_layers)


def sharding(spec: ParamSpec, mesh: Mesh) -> NamedSharding:
    """Where the blocks of a tensor are on a mesh, by the rules of `loader.weights.partition`."""
    split = PartitionSpec(*(axes or None for axes in mesh_axes(spec)))  # type: ignore[no-untyped-call]
    return NamedSharding(mesh, split)


def _crowded(config: GrokConfig, mesh: Mesh) -> bool:
    """Whether the files and the arrays do not fit memory together, so keeping pages is useless."""
    total = weight_bytes(config)
    return total * (2 if _only_cpus(mesh) else 1) > psutil.virtual_memory().available


def _only_cpus(mesh: Mesh) -> bool:
    return all(device.platform == "cpu" for device in mesh.devices.flat)


def params_of(place: Callable[[str], Any], layers: int, *, arriving: bool = False) -> Params:
    """The weights of a model of so many layers, each made by `place` from a tensor's name.

    Args:
        place: makes weights from a tensor's name.
        layers: how many.
        arriving: place a layer only when it is asked for.
    """

    def fields(kinds: Sequence[Kind], prefix: str = "") -> dict[str, Any]:
        return {kind.field: place(prefix + kind.name) for kind in kinds}

    def layer(number: int) -> Layer:
        return Layer(**fields(LAYER, layer_prefix(number)))

    each = _Arriving(layers, layer)
    return Params(**fields(OUTER), layers=each if arriving else tuple(each))


def check_shared(shape: MeshShape) -> None:
    """Make sure that the devices of a mesh can share mapped weights.

    Raises:
        MeshInvalid: the mesh splits experts, or the rows of a batch.
    """
    if not shape.only_model:
        raise MeshInvalid(
            f"mapped weights are shared by all devices: data and expert must be 1, not {shape}",
            hint="use --placement sharded, or give all devices to model",
        )


def share(
    checkpoint: Checkpoint, mesh: Mesh, tuning: Tuning | None = None, *, arriving: bool = False
) -> Params:
    """Give every device the mapped pages of the shard files, without a copy.

    Only norms and routers are copied. The files must stay as they are while the result is in use.

    Args:
        checkpoint: the tensors in their files.
        mesh: of CPU devices, with one place along `data` and `expert`.
        tuning: what suits their processor; from `loader.devices.tuning`.
        arriving: whether the files are still on their way: opens those of a layer when it is asked
            for.

    Raises:
        MeshInvalid: as `check_shared`.
        OutOfReach: a tensor has more bytes than can be indexed.
        StorageFailed: a file cannot be mapped.
    """
    check_shared(MeshShape(**mesh.shape))
    everywhere = NamedSharding(mesh, PartitionSpec())  # type: ignore[no-untyped-call]

    def buffer(flat: np.ndarray[Any, Any]) -> Array:
        copies = [
            jax.device_put(flat, device, may_alias=True)
            for device in everywhere.addressable_devices
        ]
        return jax.make_array_from_single_device_arrays(flat.shape, everywhere, copies)

    def place(name: str) -> Any:
        tensor = checkpoint[name]
        if tensor.spec.scale_groups is not None:
            _check_indices(tensor, tensor.file.size)
            file, place = buffer(tensor.file.view(np.int8)), _matrix_place(tensor, mesh)
            return Mapped(file, None, place, tuning or Tuning())
        if tensor.spec.axes[0] == "vocab":
            return _table(tensor, mesh, buffer)
        # Placed without checking that the other hosts place the same.
        return jax.make_array_from_callback(
            tensor.spec.shape, everywhere, lambda _: np.array(tensor.weight)
        )

    return params_of(place, checkpoint.config.num_layers, arriving=arriving)


def _matrix_place(tensor: Tensor, mesh: Mesh) -> MatrixPlace:
    spec, scales = tensor.spec, tensor.scale_span
    assert scales is not None
    assert spec.scale_groups is not None
    *stack, rows, columns = spec.shape
    split: Literal["rows", "columns"] = "rows" if "model" in mesh_axes(spec)[-2] else "columns"
    return MatrixPlace(
        tensor.array.offset,
        scales.offset,
        math.prod(stack),
        rows,
        columns,
        spec.scale_groups,
        split,
        mesh.shape["model"],
    )


def _table(
    tensor: Tensor, mesh: Mesh, buffer: Callable[[np.ndarray[Any, Any]], Array]
) -> MappedTable:
    rows, columns = tensor.spec.shape
    place = TablePlace(tensor.array.offset, rows, columns, mesh.shape["model"])
    words, last = tensor.file.size // 4, tensor.array.offset + tensor.array.nbytes
    if words <= last // 4:
        # Reading the last row needs a word that extends beyond the end of the file.
        flat = np.array(tensor.weight).reshape(-1).view(np.uint32)
        flat, place = np.append(flat, np.uint32(0)), dataclasses.replace(place, offset=0)
    else:
        flat = tensor.file[: 4 * words].view(np.uint32)
    _check_indices(tensor, flat.size)
    return MappedTable(buffer(flat), place)


def _check_indices(tensor: Tensor, elements: int) -> None:
    if elements >= LONGEST:
        raise OutOfReach(
            f"{tensor.spec.name} has {elements:,} elements, mapped placement takes fewer than"
            f" {LONGEST:,}",
            path=tensor.path,
            hint="use --placement sharded",
        )
