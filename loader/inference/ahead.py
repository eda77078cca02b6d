"""A model's steps compiled for devices that need not be present, and what the compiler reports.

Nothing is run and no weight is read: arrays are described only by shape, dtype and sharding.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from loader.devices.absent import absent
from loader.devices.placement import Params, make_mesh, params_of, sharding
from loader.devices.products import Quantized
from loader.devices.program_text import cost
from loader.inference.model import KeyValues, Window
from loader.inference.steps import Steps
from loader.weights.accelerators import Accelerator, Prospect
from loader.weights.capacity import Use, reads
from loader.weights.limits import LONGEST_STEP, cache_length
from loader.weights.partition import MeshShape, scale_shape
from loader.weights.schema import GrokConfig, ParamSpec, parameters

__all__ = ["Counts", "Load", "Program", "compiled", "confirmed", "counts", "described"]


@dataclasses.dataclass(frozen=True, slots=True)
class Load:
    """One step: rows of a batch, tokens of each, places of the cache."""

    rows: int
    tokens: int
    places: int

    @property
    def fresh(self) -> bool:
        """Whether it is the first step of a prompt; here, every step of several tokens is."""
        return self.tokens > 1


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """One compiled part of a step: `embed`, `layer` or `logits`; bytes on each device.

    arguments: its inputs. temporaries: what it holds besides arguments and results. text: HLO.
    """

    name: str
    arguments: int
    temporaries: int
    text: str


def described(config: GrokConfig, mesh: Mesh, layers: int = 1) -> Params:
    """The weights of a model as shapes, dtypes and shardings."""
    specs = {spec.name: spec for spec in parameters(config)}
    one = params_of(lambda name: _described(specs[name], mesh), 1)
    return dataclasses.replace(one, layers=tuple(one.layers) * layers)


def _described(spec: ParamSpec, mesh: Mesh) -> Any:
    where = sharding(spec, mesh)
    weight = _array(spec.shape, jnp.dtype(spec.dtype), where)
    if spec.scale_groups is None:
        return weight
    rows = scale_shape(spec, MeshShape(**mesh.shape))
    return Quantized(weight, _array(rows, jnp.dtype(jnp.bfloat16), where))


def _array(shape: tuple[int, ...], dtype: Any, where: NamedSharding) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)  # type: ignore[no-untyped-call]


def compiled(
    config: GrokConfig, mesh: Mesh, load: Load, dtype: jnp.dtype | None = None
) -> Iterator[Program]:
    """The parts of a step, each compiled: embedding, one layer, logits of one token a row.

    Args:
        config: the model.
        mesh: the devices, which may be those of `loader.devices.absent`.
        load: the step.
        dtype: of cache and products; bfloat16 if None.
    """
    dtype = jnp.dtype(jnp.bfloat16) if dtype is None else dtype
    params = described(config, mesh)
    steps = Steps(config, params, mesh, dtype)

    rows, tokens, places = load.rows, load.tokens, load.places
    held = _array((rows, places, config.num_kv_heads, config.key_size), dtype, steps.heads)
    window = Window(
        _array((rows, tokens), jnp.int32, steps.rows),
        _array((rows, tokens), jnp.bool_, steps.rows),
        _array((rows, places), jnp.bool_, steps.rows),
        load.fresh,
    )
    stream = _array((rows, tokens, config.emb_size), jnp.float32, steps.rows)
    last = _array((rows, 1, config.emb_size), jnp.float32, steps.rows)
    given: dict[str, tuple[Any, ...]] = {
        "embed": (params.embedding, _array((rows, tokens), jnp.int32, steps.rows)),
        "layer": (params.layers[0], KeyValues(held, held), stream, window),
        "logits": (params.embedding, params.norm, last),
    }
    for name, arguments in given.items():
        # Logits are of one token a row.
        programs = steps.programs(rows if name == "logits" else rows * tokens)
        made = programs[name].lower(*arguments).compile()
        memory = made.memory_analysis()
        yield Program(
            name,
            memory.argument_size_in_bytes,
            memory.temp_size_in_bytes,
            made.as_text(),
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Counts:
    """What the compiler makes of one part of a step; bytes on one device.

    arguments and temporaries: as in `Program`. read: from main memory, each operand of each
    operation counted once. needed: the bytes that must be read, None if that depends on the tokens.
    loops: loops of unknown length. exchanges, exchanged: how often devices exchange something, and
    bytes of the results.
    """

    arguments: int
    temporaries: int
    read: int
    needed: int | None
    loops: int
    exchanges: int
    exchanged: int


def counts(
    config: GrokConfig, kind: Accelerator, shape: MeshShape, load: Load
) -> dict[str, Counts]:
    """A step compiled for devices that need not be present: its `layer`, and the `logits`.

    `loader.devices.absent.prepare` must have been called before jax was first used.

    Raises:
        OutOfReach: the compiler is not installed, or does not support a slice of so many devices.
    """
    devices = list(absent(kind, shape.devices))[: shape.devices]
    mesh = make_mesh(config, shape, devices)
    least = reads(Use(config, shape, load.places), load.rows)
    needed = {"layer": None if load.fresh else least.layer, "logits": least.logits}
    # A loop of unknown length is assumed to run once for each expert that may have to be read.
    held = config.num_experts // shape.expert
    trips = min(load.rows * load.tokens * config.num_selected_experts, held)
    made = {}
    for program in compiled(config, mesh, load):
        if program.name not in needed:
            continue
        counted = cost(program.text, trips)
        made[program.name] = Counts(
            program.arguments,
            program.temporaries,
            counted.read,
            needed[program.name],
            counted.unknown_loops,
            sum(one.times for one in counted.collectives),
            counted.exchanged,
        )
    return made


def confirmed(prospect: Prospect) -> Prospect:
    """The same with the compiler's figures: the work of the longest step, and the bytes read.

    Raises:
        OutOfReach: as `counts`.
    """
    use, kind = prospect.use, prospect.slice.kind
    places = cache_length(use.config, use.tokens)
    token = counts(use.config, kind, use.shape, Load(1, 1, places))
    prompt = counts(use.config, kind, use.shape, Load(1, min(places, LONGEST_STEP), places))
    work = max(one.temporaries for step in (token, prompt) for one in step.values())
    return dataclasses.replace(
        prospect,
        need=dataclasses.replace(prospect.need, work=work),
        read=use.config.num_layers * token["layer"].read + token["logits"].read,
        compiled=True,
    )
