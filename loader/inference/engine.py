"""From a prompt to tokens: prefill, decode, and where to stop.

Prompts are read in chunks. Steps are padded to powers of two, and so is the cache, which keeps the
number of compiled programs logarithmic in the context.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from grokfetch.errors import PromptInvalid, TokenizerMissing
from loader.devices.arrangement import CacheType, Dtype
from loader.devices.paging import Paging
from loader.devices.placement import Params
from loader.devices.semantics import as_written
from loader.inference.prefix_cache import PrefixCache, keys
from loader.inference.prompts import Ids, check_prompts, check_room, chunks, token_ids
from loader.inference.routing_counts import Choices
from loader.inference.sampling import Choice, Sampling, draw
from loader.inference.state import Part, State, empty, grown, last_of, window_after
from loader.inference.steps import steps_for
from loader.inference.tokenizer import Tokenizer, decoded
from loader.weights.limits import LONGEST_STEP, SHARED_STEP, cache_length
from loader.weights.schema import GrokConfig

__all__ = ["Engine", "Sampling"]


class Engine:
    """The model on a mesh, ready to be asked for logits or tokens.

    Args:
        config: the hyperparameters.
        params: from `loader.devices.placement.load` or `share`, on `mesh`.
        mesh: from `loader.devices.placement.make_mesh`.
        dtype: of the products; sums and activations are float32 either way.
        paging: told which mapped weights will be used; None leaves paging to the system.
        prefix_cache: bytes on all devices together for the beginnings of prompts; 0 keeps none, and
            reads prompts in larger steps.
        cache: dtype of the cache; None for the dtype of the products.

    Attributes:
        dtype: of the cache.
        prefix_cache: the beginnings of prompts that were read one by one.
        open_tokenizer: finds the tokenizer when the first text comes.
        heads: how the devices share a cache `[B, S, K, d]`.
        by_rows: how they share an array `[B, ...]` of a step.
        everywhere: the sharding of an array that all of them hold.
        turn: held by a thread while its programs run, where several CPU devices share threads.
    """

    def __init__(  # noqa: PLR0913 - each is a choice of its own
        self,
        config: GrokConfig,
        params: Params,
        mesh: Mesh,
        dtype: Dtype = "bfloat16",
        paging: Paging | None = None,
        *,
        prefix_cache: int = 0,
        cache: CacheType | None = None,
    ) -> None:
        self.config = config
        self.params = params
        self.mesh = mesh
        self.dtype = jnp.dtype(cache or dtype)
        self._paging = paging
        self.open_tokenizer: Callable[[], Tokenizer] = _no_tokenizer
        self._steps = steps_for(config, params, mesh, jnp.dtype(dtype), paging)
        self.heads, self.by_rows = self._steps.heads, self._steps.rows
        self.everywhere = self._steps.everywhere
        self.turn = self._steps.turn
        self.prefix_cache = PrefixCache(prefix_cache, self.heads, self.by_rows)
        # On every device: otherwise each layer would fetch them from the first device.
        self._window = jax.jit(window_after, static_argnames="fresh", out_shardings=self.by_rows)
        self._draw = jax.jit(draw, out_shardings=self.everywhere)
        self._pick = jax.jit(last_of, out_shardings=self.by_rows)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """What turns texts into token ids.

        Raises:
            TokenizerMissing: there is none, or it is not the one that the manifest names.
        """
        return self.open_tokenizer()

    def hold(self, params: Params, paging: Paging | None = None) -> None:
        """Switch to other weights of the same shapes on the same mesh, perhaps with more layers.

        Nothing is compiled again; earlier states become useless.
        """
        self.params, self._paging = params, paging
        self._steps.hold(params, paging)
        self.prefix_cache.clear()

    @as_written
    def warm_up(self, prompt: Sequence[int], sampling: Sampling | None = None) -> None:
        """Compile what continuing such a prompt needs, before anybody waits for it.

        Only the first layer is run: all layers run the same programs. With mapped weights, an
        expert that later gets a number of tokens not seen in it is compiled then.

        Raises:
            PromptInvalid: as `prefill`.
        """
        params, paging, choices = self.params, self._paging, self._steps.choices
        if choices is not None:
            # The programs of a counting step are needed; the counts of this dummy text are not.
            self._steps.choices = Choices(self.config.num_layers, self.config.num_experts)
        self.hold(dataclasses.replace(params, layers=params.layers[:1]), paging)
        try:
            logits, state = self.prefill([prompt])
            token = self.sample(logits, sampling or Sampling(), 0)
            token.block_until_ready()
            if state.longest < self.config.sequence_len:
                self.decode(state, token)[0].block_until_ready()
        finally:
            self.hold(params, paging)
            self._steps.choices = choices

    @as_written
    def prefill(self, prompts: Sequence[Ids]) -> tuple[Array, State]:
        """Prefill: read prompts, which may differ in length, as the rows of one batch.

        Pad ids inside a prompt are never attended to, then or later.

        Returns:
            float32 logits `[B, V]` after each prompt's last token, and the state to continue from.

        Raises:
            PromptInvalid: if there is no prompt, or one is empty, too long, or has unknown ids.
        """
        prompts = [token_ids(prompt) for prompt in prompts]
        check_prompts(self.config, prompts)
        last: Array | None = None
        for part in self.read(prompts):
            last = self.last(part, last)
            state = part.state
        assert last is not None
        return self.logits(last)[: len(prompts), 0], state

    @as_written
    def full_logits(self, prompts: Sequence[Ids]) -> Array:
        """Logits after every token, float32 `[B, T, V]`, without a state.

        T is the longest prompt padded to the size of a step; values beyond a prompt's length are
        meaningless.

        Raises:
            PromptInvalid: as `prefill`.
        """
        prompts = [token_ids(prompt) for prompt in prompts]
        check_prompts(self.config, prompts)
        parts = [self.logits(part.x)[: len(prompts)] for part in self.read(prompts)]
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]

    @as_written
    def decode(
        self, state: State, tokens: Any, live: np.ndarray[Any, Any] | None = None
    ) -> tuple[Array, State]:
        """Append one token to every row.

        A generated token is attended to whatever its id. (The reference masks the whole step when
        it generates the pad id.)

        Args:
            state: used up by the call; its buffers become the new state's.
            tokens: int32 `[b]`, of all rows, or of the first b if the others belong to no prompt.
            live: bool `[b]`; the other rows stay unchanged, use no expert, and have meaningless
                logits. None for all.

        Returns:
            float32 logits `[b, V]`, and the new state.

        Raises:
            PromptInvalid: if a row has reached the longest context of the model.
        """
        if state.longest >= self.config.sequence_len:
            raise PromptInvalid(
                f"the context of {self.config.sequence_len:,} tokens is full",
                hint="begin anew with the end of the text",
            )
        if state.longest >= state.visible.shape[1]:
            state = grown(state, self.places(state.longest + 1), self.heads)
        given, batch = len(tokens), state.visible.shape[0]
        counts = np.zeros(batch, np.int32)
        counts[:given] = True if live is None else live
        if given < batch:
            tokens = jnp.pad(tokens, (0, batch - given))
        shown = np.ones((batch, 1), bool)
        x, state = self._advance(state, tokens[:, None], counts, shown)
        return self.logits(x)[:given, 0], state

    @overload
    def generate(
        self, prompt: str, max_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[str]: ...

    @overload
    def generate(
        self, prompt: Ids, max_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[int]: ...

    def generate(
        self, prompt: str | Ids, max_tokens: int, sampling: Sampling | None = None
    ) -> Iterator[str] | Iterator[int]:
        """The continuation of a prompt: pieces of text for a text, token ids for token ids.

        Ends before the end-of-sequence id, after `max_tokens`, or when the context is full.

        Raises:
            PromptInvalid: as `prefill`, or if the prompt leaves no room for a token.
            TokenizerMissing: the prompt is a text, and there is no tokenizer.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            return decoded(self._continued(ids, max_tokens, sampling), self.tokenizer)
        return self._continued(token_ids(prompt), max_tokens, sampling)

    def _continued(
        self, ids: Sequence[int], max_tokens: int, sampling: Sampling | None
    ) -> Iterator[int]:
        room = check_room(self.config, ids)
        return self._stream(ids, min(max_tokens, room), sampling or Sampling())

    def count_experts(self) -> Choices:
        """Count from now on how often each layer chooses each expert for a token.

        With mapped weights the host knows the choices anyway. Otherwise the devices send them to
        the host, which takes time in every step.
        """
        self._steps.choices = Choices(self.config.num_layers, self.config.num_experts)
        return self._steps.choices

    @as_written
    def sample(self, logits: Array, sampling: Sampling, step: int) -> Array:
        """The next token of each row, int32 `[B]`, from logits `[B, V]`; it stays on the device.

        Args:
            logits: of the model.
            sampling: how to choose.
            step: how many tokens were chosen before; this and the seed determine the random
                numbers.
        """
        rows = logits.shape[0]
        return self.draw(logits, Choice.of([sampling] * rows, [step] * rows))

    @as_written
    def draw(self, logits: Array, choice: Choice) -> Array:
        """The next token of each row by its own settings, int32 `[B]`, on every device."""
        with self.turn:
            return self._steps.alone(self._draw(logits, choice))

    def _stream(self, prompt: Sequence[int], limit: int, sampling: Sampling) -> Iterator[int]:
        if limit < 1:
            return
        logits, state = self.prefill([prompt])
        for step in range(limit):
            token = self.sample(logits, sampling, step)
            # On the host: there, taking it from its row needs no program.
            number = int(np.asarray(token)[0])
            if number == self.config.eos_token:
                return
            yield number
            if step + 1 < limit:
                logits, state = self.decode(state, token)

    def read(self, prompts: Sequence[Sequence[int]], most: int | None = None) -> Iterator[Part]:
        """Chunks of the prompts, one step each; the state of one is used up by the next.

        Args:
            prompts: as `check_prompts` requires.
            most: the most tokens of a prompt in a step, a power of two; None for the default.
        """
        cached = self.prefix_cache.most > 0
        most = most or (SHARED_STEP if cached else LONGEST_STEP)
        shape = self.rows(len(prompts)), self.places(max(map(len, prompts)))
        state = empty(self.config, len(self.params.layers), shape, self.dtype, self.heads)
        places = 0 if self._steps.alike_at_any_size else shape[1]
        known = keys(prompts[0], most, places) if cached and len(prompts) == 1 else []
        for number, chunk in enumerate(chunks(self.config, prompts, shape[0], most), start=1):
            # Pad ids in a prompt are not keys; nor are padding tokens, which `counts` excludes.
            shown = chunk.tokens != self.config.pad_token
            path = known[:number] if number <= len(known) else ()
            x, state = self._advance(state, chunk.tokens, chunk.counts, shown, path=path)
            yield Part(x, chunk.ends, state)

    @as_written
    def last(self, part: Part, before: Array | None) -> Array:
        """The residual stream at each row's last token so far, `[B, 1, D]`.

        Args:
            part: the latest chunk read.
            before: what this returned for the chunk before it, None for the first.
        """
        picked: Array = self._pick(part.x, part.ends, part.x if before is None else before)
        return picked

    @as_written
    def logits(self, x: Array) -> Array:
        """The residual stream `[B, T, D]` to float32 logits `[B, T, V]`."""
        with self.turn:
            return self._steps.logits(x)

    def places(self, tokens: int) -> int:
        """Places of a cache that has room for so many tokens of a row."""
        return cache_length(self.config, tokens)

    def rows(self, count: int) -> int:
        """Rows of a batch with room for so many texts: equally many on each copy of the weights."""
        copies: int = self.mesh.shape["data"]
        return count + -count % copies

    @as_written
    def _advance(
        self, state: State, tokens: Any, counts: Any, shown: Any, *, path: Sequence[bytes] = ()
    ) -> tuple[Array, State]:
        """One step of `[B, T]` tokens, `counts` of them real.

        If a `path` of keys is given, a step whose result is known is not computed.
        """
        window, lengths = self._window(
            state.visible, state.lengths, counts, shown, fresh=state.longest == 0
        )
        with self.turn:
            x, filled = self.prefix_cache.chunk(
                path,
                state.cache,
                state.longest,
                lambda: self._steps.layers(state.cache, self._steps.embed(tokens), window),
            )
        return x, State(filled, window.visible, lengths, state.longest + int(counts.max()))


def _no_tokenizer() -> Tokenizer:
    raise TokenizerMissing(
        "nobody has said which tokenizer is this model's",
        hint="give token ids, or name it: load_model(checkpoint, tokenizer=FILE)",
    )
