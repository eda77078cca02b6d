"""The model's parts compiled for a mesh and called one after another, layer by layer.

Every part is compiled once and called for each layer, so compile time does not grow with the number
of layers. If all experts are resident, a layer is one program. With mapped weights, a layer is cut
after its router: the host learns which experts are wanted, has their pages read, and calls each
wanted expert once for all the tokens that chose it.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from loader.devices.mapped import Mapped
from loader.devices.paging import Paging
from loader.devices.placement import Params
from loader.devices.products import FEW
from loader.devices.xla_setup import SLICES_APART, sums_undivided
from loader.inference import experts, model
from loader.inference.model import KeyValues, Window
from loader.inference.routing_counts import Choices
from loader.weights.partition import RULES
from loader.weights.schema import GrokConfig

__all__ = ["Steps", "program", "steps_for"]

_TURN = threading.RLock()

KEPT = 64
"""Parts that stay compiled for later models: enough for a dozen models of different shapes."""


def steps_for(
    config: GrokConfig, params: Params, mesh: Mesh, dtype: jnp.dtype, paging: Paging | None
) -> Steps:
    """The steps that suit how the weights are held."""
    if isinstance(params.layers[0].gate, Mapped):
        return _OnDemand(config, params, mesh, dtype, paging or Paging())
    return Steps(config, params, mesh, dtype)


class Steps:
    """The parts of a model whose weights are resident.

    Args:
        config: the hyperparameters.
        params: the weights, on `mesh`.
        mesh: the devices.
        dtype: of the products; the cache may have another.

    Attributes:
        everywhere: the sharding of an array that all devices hold.
        rows: the sharding of an array `[B, ...]` of which each device has its rows.
        heads: the sharding of a cache `[B, S, K, d]`.
        turn: held by a thread while its programs run, as `alone` explains.
        choices: where the chosen experts are counted, None for nowhere.
        alike_at_any_size: whether a step gives the same bits whatever the places of its cache: true
            if the C program computes attention, as its sums depend only on a token's position.
    """

    def __init__(self, config: GrokConfig, params: Params, mesh: Mesh, dtype: jnp.dtype) -> None:
        self.choices: Choices | None = None
        tuning = params.layers[0].gate.tuning
        self.alike_at_any_size = tuning is not None and tuning.native
        self._compiler_options = (
            {} if tuning is None else {"xla_cpu_prefer_vector_width": tuning.vector_width}
        )
        self._mesh = mesh
        self._on_cpus = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
        self.turn: contextlib.AbstractContextManager[object] = (
            _TURN if self._on_cpus else contextlib.nullcontext()
        )
        self._params = params
        embedding, final, self._layer_spec = (
            jax.tree.map(lambda array: array.sharding.spec, part)
            for part in (params.embedding, params.norm, params.layers[0])
        )
        # Without copies of the weights all rows are everywhere: the same sharding must have one
        # name, or jax compiles for both.
        split = "data" if mesh.shape["data"] > 1 else None
        self._nothing, self._heads = _spec(), _spec(split, None, "model", None)
        self._rows = self._nothing if split is None else _spec(split)
        self.everywhere, self.rows, self.heads = (
            NamedSharding(mesh, spec) for spec in (self._nothing, self._rows, self._heads)
        )
        rows = self._rows
        self._embed = self._spread(model.embed, (embedding, rows), rows, config=config, dtype=dtype)
        self._logits = self._spread_by_tokens(
            model.logits,
            (embedding, final, rows),
            _spec(split, None, RULES["vocab"]),
            config=config,
            dtype=dtype,
        )
        self._tell = jax.jit(lambda *arrays: arrays, out_shardings=self.everywhere)
        self._compile_layer(config, dtype)

    def _compile_layer(self, config: GrokConfig, dtype: jnp.dtype) -> None:
        # The cache is donated: each layer's keys and values are written in place.
        self._layer = self._spread_by_tokens(
            model.layer,
            (self._layer_spec, self._heads, self._rows, self._rows),
            (self._rows, self._heads, self._rows),
            donate=(1,),
            config=config,
            dtype=dtype,
        )

    def programs(self, tokens: int) -> Mapping[str, Any]:
        """The jitted parts of a step of so many tokens, for `loader.inference.ahead`."""
        return {
            "embed": self._embed,
            "layer": self._layer[self._few(tokens)],
            "logits": self._logits[self._few(tokens)],
        }

    def hold(self, params: Params, _paging: Paging | None) -> None:
        """Use other weights of the same shapes from now on."""
        self._params = params

    def embed(self, tokens: Any) -> Array:
        """Token ids `[B, T]` to the residual stream, float32 `[B, T, D]`."""
        x: Array = self._embed(self._params.embedding, tokens)
        return x

    def layers(
        self, cache: Sequence[KeyValues], x: Array, window: Window
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """All layers over the residual stream; the cache's buffers are used up."""
        filled, layer = [], self._layer[self._few(x.shape[0] * x.shape[1])]
        for number, (weights, entry) in enumerate(zip(self._params.layers, cache, strict=True)):
            x, kept, chosen = layer(weights, entry, self.alone(x), window)
            filled.append(kept)
            if self.choices is not None:
                self.choices.add(number, *self._tell(chosen, window.real))
        return self.alone(x), tuple(filled)

    def logits(self, x: Array) -> Array:
        """The residual stream `[B, T, D]` to float32 `[B, T, V]`."""
        logits = self._logits[self._few(x.shape[0] * x.shape[1])]
        return self.alone(logits(self._params.embedding, self._params.norm, x))

    def _few(self, tokens: int) -> bool:
        """Whether each device gets so few of these tokens that reading weights dominates."""
        return tokens <= FEW * int(self._mesh.shape["data"])

    def _spread_by_tokens(
        self, function: Callable[..., Any], given: Any, result: Any, **settings: Any
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Compiled for many tokens and for few; only on GPUs do these differ."""
        if self._mesh.devices.flat[0].platform != "gpu":
            both = self._spread(function, given, result, **settings)
            return both, both
        few = {**SLICES_APART, **sums_undivided()}
        return (
            self._spread(function, given, result, more=SLICES_APART, **settings),
            self._spread(function, given, result, more=few, **settings),
        )

    def _spread(
        self,
        function: Callable[..., Any],
        given: Any,
        result: Any,
        donate: tuple[int, ...] = (),
        more: Mapping[str, str | bool] = MappingProxyType({}),
        **settings: Any,
    ) -> Callable[..., Any]:
        leaves, tree = jax.tree.flatten((given, result))
        options = tuple({**self._compiler_options, **more}.items())
        return program(
            function, tuple(settings.items()), self._mesh, (tuple(leaves), tree), donate, options
        )

    def alone(self, x: Array) -> Array:
        """Let the next program begin only after this one, where two might deadlock.

        CPU devices share threads. With a few dozen programs under way, from one thread or several,
        those that wait for the others' part of a sum leave no threads for the others, and XLA ends
        the process after 40 s. So a thread waits for its own program, and holds the `turn` until
        then.
        """
        if self._on_cpus:
            x.block_until_ready()
        return x


class _OnDemand(Steps):
    """The same over mapped weights: experts are called once the host knows which are wanted."""

    def __init__(
        self,
        config: GrokConfig,
        params: Params,
        mesh: Mesh,
        dtype: jnp.dtype,
        paging: Paging,
    ) -> None:
        self._paging = paging
        super().__init__(config, params, mesh, dtype)

    def hold(self, params: Params, paging: Paging | None) -> None:
        """From now on use other weights of the same shapes, and what reads their pages."""
        super().hold(params, paging)
        self._paging = paging or Paging()

    def _compile_layer(self, config: GrokConfig, dtype: jnp.dtype) -> None:
        weights, nothing, heads = self._layer_spec, self._nothing, self._heads
        self._attend = self._spread(
            model.attend,
            (weights, heads, nothing, nothing),
            (nothing, heads, nothing),
            donate=(1,),
            config=config,
            dtype=dtype,
        )
        self._expert = self._spread(
            _with_expert, (weights, *(nothing,) * 4), nothing, donate=(4,), dtype=dtype
        )
        self._close = self._spread(model.close, (weights, nothing, nothing), nothing)

    def embed(self, tokens: Any) -> Array:
        """Token ids `[B, T]` to the residual stream, float32 `[B, T, D]`."""
        if self._paging.by_rows:
            self._paging.rows(np.asarray(tokens).reshape(-1).tolist())
        return super().embed(tokens)

    def layers(
        self, cache: Sequence[KeyValues], x: Array, window: Window
    ) -> tuple[Array, tuple[KeyValues, ...]]:
        """All layers over the residual stream; the cache's buffers are used up."""
        real = np.asarray(window.real).reshape(-1)
        filled = []
        for number, (weights, entry) in enumerate(zip(self._params.layers, cache, strict=True)):
            self._paging.layer(number)
            x, kept, routed = self._attend(weights, entry, x, window)
            filled.append(kept)
            total = jnp.zeros(routed.x.shape, jnp.float32, device=self.everywhere)
            chosen = np.asarray(routed.choices)
            if self.choices is not None:
                self.choices.add(number, chosen, real)
            groups = dict(expert_groups(chosen, real))
            self._paging.experts(number, tuple(groups))
            for expert, pairs in groups.items():
                self._paging.expert(number, expert)
                total = self._expert(weights, np.int32(expert), routed, pairs, total)
                self._paging.used(number, expert, total)
            x = self._close(weights, x, total)
        return self.alone(x), tuple(filled)

    def logits(self, x: Array) -> Array:
        """The residual stream `[B, T, D]` to float32 `[B, T, V]`."""
        self._paging.table()
        return super().logits(x)


@functools.lru_cache(maxsize=KEPT)
def program(  # noqa: PLR0913, PLR0917 - all that a compiled part depends on
    function: Callable[..., Any],
    settings: tuple[tuple[str, Any], ...],
    mesh: Mesh,
    specs: tuple[tuple[PartitionSpec, ...], Any],
    donate: tuple[int, ...],
    options: tuple[tuple[str, Any], ...],
) -> Callable[..., Any]:
    """A part of the model jitted for a mesh; the same object for the same arguments.

    A model that is loaded again in the process, or another of the same shapes, is not compiled
    again.

    Args:
        function: the part, of this module or of those that it calls.
        settings: its other arguments by name, which are not arrays.
        mesh: the devices.
        specs: leaves and tree of the shardings of its arguments and results.
        donate: the arguments whose buffers are used up.
        options: of XLA.
    """
    leaves, tree = specs
    given, result = jax.tree.unflatten(tree, leaves)
    named = dict(settings)
    # jax's check of what is equal on all devices cannot follow a loop of unknown length.
    spread = jax.shard_map(
        lambda *arrays: function(*arrays, **named),
        mesh=mesh,
        in_specs=given,
        out_specs=result,
        check_vma=False,
    )
    return jax.jit(spread, donate_argnums=donate, compiler_options=dict(options))


def _with_expert(  # noqa: PLR0913, PLR0917 - as it is called on devices
    weights: Any, number: Array, routed: Any, pairs: Array, total: Array, dtype: jnp.dtype
) -> Array:
    return total + experts.expert(weights, number, routed, pairs, dtype)


def expert_groups(
    choices: npt.NDArray[np.int32], real: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
    """Each wanted expert with the pairs of token and choice that want it.

    Args:
        choices: `[N, chosen]`, experts of each token.
        real: `[N]`; the others get no expert.

    Yields:
        The expert, and indices into the flattened `choices`, `[n]`, padded to one of a few lengths
        with an index beyond the end.
    """
    flat = np.where(real[:, None], choices, -1).reshape(-1)
    for expert in np.unique(flat[flat >= 0]):
        pairs = np.flatnonzero(flat == expert).astype(np.int32)
        yield (
            int(expert),
            np.pad(pairs, (0, padded(len(pairs)) - len(pairs)), constant_values=flat.size),
        )


def padded(count: int) -> int:
    """One of a few lengths, for `count` tokens of one expert; beyond 8 at most a quarter more."""
    power = 1 << (count - 1).bit_length()
    step = power // 8
    return -(-count // step) * step if power > 8 else power


def _spec(*axes: str | tuple[str, ...] | None) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]
