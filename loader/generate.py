"""From a prompt to tokens: prefill, decode, sampling, and where to stop.

An `Engine` compiles the parts of the model for one mesh and calls the one compiled layer once for
every layer, so that compile time does not grow with their number. Steps are padded to powers of
two, and so is the cache, which keeps the number of compiled programs logarithmic in the context.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grokfetch.errors import PromptInvalid
from loader import model
from loader.model import KeyValues, Window
from loader.placement import Params
from loader.schema import GrokConfig

__all__ = ["Choice", "Engine", "Sampling", "State", "check_prompts", "draw"]

SMALLEST_STEP = 16
"""Tokens that a prompt is padded to at least."""

SMALLEST_CACHE = 256
"""Places that a cache starts with, where the model's context is not shorter still."""

COLDEST = 1e-30
"""Lowest temperature that float32 can still divide by safely."""


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    temperature: 0 takes the most probable token; higher is more random. top_k: only the k most
    probable tokens count, None for all. top_p: of those, the most probable ones that together
    reach this share. seed: the same seed gives the same tokens; its low 32 bits count.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """What decoding continues from, for B rows.

    cache: one entry a layer. visible: bool `[B, S]`, the places that hold a token that may be
    attended to. lengths: int32 `[B]`, tokens of each row so far. longest: their largest, known to
    the host.
    """

    cache: tuple[KeyValues, ...]
    visible: Array
    lengths: Array
    longest: int


class Engine:
    """The model on a mesh, ready to be asked for logits or tokens.

    Args:
        config: the hyperparameters.
        params: from `loader.placement.load`, on `mesh`.
        mesh: from `loader.placement.make_mesh`.
        dtype: of the cache and the products; sums and activations are float32 either way.
    """

    def __init__(
        self,
        config: GrokConfig,
        params: Params,
        mesh: Mesh,
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        self.config = config
        self.params = params
        self.mesh = mesh
        self.dtype = jnp.dtype(dtype)
        self._compile()

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Array, State]:
        """Read prompts, which may differ in length, as the rows of one batch.

        Pad ids inside a prompt are never attended to, then or later.

        Returns:
            float32 logits `[B, V]` after each prompt's last token, and the state to go on from.

        Raises:
            PromptInvalid: if there is no prompt, or one is empty, too long, or has unknown ids.
        """
        x, counts, state = self._read(prompts)
        return self._score(x, counts), state

    def full_logits(self, prompts: Sequence[Sequence[int]]) -> Array:
        """Logits after every token, float32 `[B, T, V]`, from nothing but the tokens.

        T is the longest prompt padded to the size of a step; what stands beyond a prompt's length
        is meaningless.

        Raises:
            PromptInvalid: as `prefill`.
        """
        x, _, _ = self._read(prompts)
        scores: Array = self._all_logits(self.params.embedding, self.params.norm, x)
        return scores

    def decode(self, state: State, tokens: Array) -> tuple[Array, State]:
        """Append one token to every row.

        A generated token is attended to whatever its id. The reference masks the whole step when it
        generates the pad id.

        Args:
            state: used up by the call; its buffers become the new state's.
            tokens: int32 `[B]`.

        Returns:
            float32 logits `[B, V]`, and the new state.

        Raises:
            PromptInvalid: if a row has reached the longest context of the model.
        """
        if state.longest >= self.config.sequence_len:
            raise PromptInvalid(f"the context of {self.config.sequence_len} tokens is full")
        if state.longest >= state.visible.shape[1]:
            state = self._grown(state)
        ones = np.ones(len(tokens), np.int32)
        x, state = self._advance(state, tokens[:, None], ones, ones[:, None] > 0, 1)
        return self._score(x, ones), state

    def generate(
        self, prompt: Sequence[int], max_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """The tokens that follow a prompt, one at a time.

        Ends before the end-of-sequence id, after `max_tokens`, or where the context is full.

        Raises:
            PromptInvalid: as `prefill`, or if the prompt leaves no room for a token.
        """
        check_prompts(self.config, [prompt])
        room = self.config.sequence_len - len(prompt)
        if room < 1:
            raise PromptInvalid(
                f"the prompt fills the whole context of {self.config.sequence_len} tokens",
                hint="shorten it",
            )
        return self._stream(prompt, min(max_tokens, room), sampling or Sampling())

    def sample(self, logits: Array, sampling: Sampling, step: int) -> Array:
        """The next token of each row, int32 `[B]`, from logits `[B, V]`; it stays on the device.

        Args:
            logits: of the model.
            sampling: how to choose.
            step: how many tokens were chosen before; with the seed it fixes the random numbers.
        """
        if sampling.temperature == 0:
            best: Array = self._greedy(logits)
            return best
        choice = Choice(
            jnp.uint32(sampling.seed & 0xFFFFFFFF),
            jnp.int32(step),
            jnp.float32(sampling.temperature),
            jnp.int32(self.config.vocab_size if sampling.top_k is None else sampling.top_k),
            jnp.float32(sampling.top_p),
        )
        drawn: Array = self._draw(logits, choice)
        return drawn

    def _stream(self, prompt: Sequence[int], limit: int, sampling: Sampling) -> Iterator[int]:
        if limit < 1:
            return
        logits, state = self.prefill([prompt])
        for step in range(limit):
            token = self.sample(logits, sampling, step)
            number = int(token[0])
            if number == self.config.eos_token:
                return
            yield number
            if step + 1 < limit:
                logits, state = self.decode(state, token)

    def _score(self, x: Array, counts: Any) -> Array:
        scores: Array = self._last_logits(self.params.embedding, self.params.norm, x, counts)
        return scores

    def _compile(self) -> None:
        config, dtype = self.config, self.dtype
        embedding, final, layers = (
            jax.tree.map(lambda array: array.sharding.spec, part)
            for part in (self.params.embedding, self.params.norm, self.params.layers[0])
        )
        everywhere, heads = _spec(), _spec(None, None, "model", None)
        self._heads = NamedSharding(self.mesh, heads)
        self._embed = self._spread(
            lambda table, tokens: model.embed(table, tokens, config, dtype),
            (embedding, everywhere),
            everywhere,
        )
        # The cache is donated: each layer's keys and values are written where they lie.
        self._layer = self._spread(
            lambda weights, cache, x, window: model.layer(weights, cache, x, window, config),
            (layers, heads, everywhere, everywhere),
            (everywhere, heads),
            donate=(1,),
        )
        self._all_logits = self._spread(
            lambda table, scale, x: model.logits(table, scale, x, config, dtype),
            (embedding, final, everywhere),
            _spec(None, None, "model"),
        )
        self._last_logits = self._spread(
            lambda table, scale, x, counts: model.logits(
                table, scale, _last(x, counts), config, dtype
            ),
            (embedding, final, everywhere, everywhere),
            _spec(None, "model"),
        )
        # On every device at once: a step must not fetch them from the first for each layer.
        copies = NamedSharding(self.mesh, everywhere)
        self._window = jax.jit(_window, static_argnames="fresh", out_shardings=copies)
        self._greedy = jax.jit(_best, out_shardings=copies)
        self._draw = jax.jit(draw, out_shardings=copies)

    def _spread(
        self, function: Callable[..., Any], given: Any, result: Any, donate: tuple[int, ...] = ()
    ) -> Callable[..., Any]:
        # The check of what is equal on all devices cannot follow a loop of unknown length.
        spread = jax.shard_map(
            function, mesh=self.mesh, in_specs=given, out_specs=result, check_vma=False
        )
        return jax.jit(spread, donate_argnums=donate)

    def _read(self, prompts: Sequence[Sequence[int]]) -> tuple[Array, np.ndarray[Any, Any], State]:
        """The residual stream after the last layer, the prompts' lengths, and the state."""
        check_prompts(self.config, prompts)
        counts = np.array([len(prompt) for prompt in prompts], np.int32)
        longest = int(counts.max())
        width = self._rounded(longest, SMALLEST_STEP)
        tokens = np.full((len(prompts), width), self.config.pad_token, np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        # Pad ids in a prompt are no keys; filling tokens are none either, by their count.
        shown = tokens != self.config.pad_token
        state = self._empty(len(prompts), self._rounded(longest, SMALLEST_CACHE))
        x, state = self._advance(state, tokens, counts, shown, longest)
        return x, counts, state

    def _advance(
        self, state: State, tokens: Any, counts: Any, shown: Any, longest: int
    ) -> tuple[Array, State]:
        """One step of `[B, T]` tokens, `counts` of them real; `longest` is the largest count."""
        window, lengths = self._window(
            state.visible, state.lengths, counts, shown, fresh=state.longest == 0
        )
        x = self._embed(self.params.embedding, tokens)
        filled = []
        for weights, entry in zip(self.params.layers, state.cache, strict=True):
            x, entry = self._layer(weights, entry, x, window)  # noqa: PLW2901
            filled.append(entry)
        return x, State(tuple(filled), window.visible, lengths, state.longest + longest)

    def _empty(self, batch: int, places: int) -> State:
        shape = (batch, places, self.config.num_kv_heads, self.config.key_size)

        def zeros() -> Array:
            return jnp.zeros(shape, self.dtype, device=self._heads)

        return State(
            cache=tuple(KeyValues(zeros(), zeros()) for _ in self.params.layers),
            visible=jnp.zeros((batch, places), bool),
            lengths=jnp.zeros(batch, jnp.int32),
            longest=0,
        )

    def _grown(self, state: State) -> State:
        """The state with room for more: twice the places, at most the model's context."""
        more = self._rounded(state.longest + 1, SMALLEST_CACHE) - state.visible.shape[1]

        def pad(array: Array) -> Array:
            padded = jnp.pad(array, ((0, 0), (0, more), (0, 0), (0, 0)))
            grown: Array = jax.device_put(padded, self._heads)
            return grown

        return dataclasses.replace(
            state,
            cache=jax.tree.map(pad, state.cache),
            visible=jnp.pad(state.visible, ((0, 0), (0, more))),
        )

    def _rounded(self, tokens: int, smallest: int) -> int:
        power = 1 << (tokens - 1).bit_length()
        return min(max(power, smallest), self.config.sequence_len)


def check_prompts(config: GrokConfig, prompts: Sequence[Sequence[int]]) -> None:
    """Make sure that a model can read these prompts, before its weights are loaded.

    Raises:
        PromptInvalid: if there is no prompt, or one is empty, too long, or has unknown ids.
    """
    if not prompts or not all(prompts):
        raise PromptInvalid("the prompt is empty: the model needs a token to start from")
    longest = max(len(prompt) for prompt in prompts)
    if longest > config.sequence_len:
        raise PromptInvalid(
            f"the prompt has {longest} tokens, and the model's context is {config.sequence_len}",
            hint="shorten it",
        )
    for token in (token for prompt in prompts for token in prompt):
        if not 0 <= token < config.vocab_size:
            raise PromptInvalid(f"token {token} is outside the vocabulary of {config.vocab_size}")


class Choice(NamedTuple):
    """`Sampling` as scalars on the device, so that one compiled function serves all its values."""

    seed: Array
    step: Array
    temperature: Array
    top_k: Array
    top_p: Array


def draw(logits: Array, choice: Choice) -> Array:
    """Sample from logits `[B, V]`: temperature, then the top k, then the nucleus of share top_p.

    The most probable token is always among the candidates. Nucleus sampling: Holtzman et al. 2020.

    Returns:
        int32 `[B]`.
    """
    order = jnp.argsort(logits, axis=-1, descending=True)
    ranked = jnp.take_along_axis(logits, order, axis=-1)
    # Relative to the best, and never divided by zero: a tiny temperature must not give a NaN.
    scaled = (ranked - ranked[:, :1]) / jnp.maximum(choice.temperature, COLDEST)
    ranks = jnp.arange(logits.shape[-1])
    scaled = jnp.where(ranks < jnp.maximum(choice.top_k, 1), scaled, -jnp.inf)
    shares = jax.nn.softmax(scaled, axis=-1)
    better = jnp.cumsum(shares, axis=-1) - shares
    scaled = jnp.where((better < choice.top_p) | (ranks == 0), scaled, -jnp.inf)
    key = jax.random.fold_in(jax.random.key(choice.seed), choice.step)
    pick = jax.random.categorical(key, scaled, axis=-1)
    return jnp.take_along_axis(order, pick[:, None], axis=-1)[:, 0].astype(jnp.int32)


def _best(logits: Array) -> Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _window(
    visible: Array, lengths: Array, counts: Array, shown: Array, *, fresh: bool
) -> tuple[Window, Array]:
    """Where a step's tokens stand after rows of `lengths`, and the lengths after it."""
    batch, width = shown.shape
    steps = jnp.arange(width)
    real = steps < counts[:, None]
    positions = lengths[:, None] + steps
    places = jnp.where(real, positions, visible.shape[1])
    visible = visible.at[jnp.arange(batch)[:, None], places].set(shown, mode="drop")
    return Window(positions, real, visible, fresh), lengths + counts


def _last(x: Array, counts: Array) -> Array:
    """Each row's last real token: `[B, T, D]` to `[B, D]`."""
    return x[jnp.arange(x.shape[0]), counts - 1]


def _spec(*axes: str | None) -> PartitionSpec:
    return PartitionSpec(*axes)  # type: ignore[no-untyped-call]
