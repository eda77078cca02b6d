"""Many texts at once: each joins the shared decoding step once its prompt is read.

`Batch.step` does one bounded piece of work: at most one chunk of one prompt, then one token for
every text that is being continued. So a long prompt does not delay the others, and the caller may
add or drop texts between any two steps.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jax import Array, lax

from grokfetch.errors import PromptInvalid
from loader.devices.semantics import as_written
from loader.inference.engine import Engine
from loader.inference.penalties import Changes, Penalties, Repeated, changed
from loader.inference.prompts import check_prompts
from loader.inference.sampling import Choice, Ranked, Sampling, rank
from loader.inference.slots import Slots, doubled
from loader.inference.state import Part
from loader.weights.limits import SHARED_STEP

__all__ = ["Batch", "Emission", "Job", "Scored"]

SCORED_AT_ONCE = 64
"""Prompt tokens whose logits are in memory at once: 34 MB for a vocabulary of 131,072."""


@dataclasses.dataclass(frozen=True, slots=True)
class Job:
    """A prompt to continue.

    prompt: token ids. max_tokens: the most tokens to generate. logprobs: None, or how many of the
    most probable tokens, `loader.inference.sampling.MOST_RANKED` at most, are returned with each
    token. echo: whether the prompt's own tokens are returned too. penalties: how logits are changed
    before a token is chosen; log-probabilities are still those of the model. min_tokens: how many
    tokens must come before an end of sequence. ignore_eos: whether an end of sequence does not end
    the text.
    """

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    logprobs: int | None = None
    echo: bool = False
    penalties: Penalties = dataclasses.field(default_factory=Penalties)
    min_tokens: int = 0
    ignore_eos: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Scored:
    """A token and its probability in the model, before any temperature.

    logprob: natural logarithm of its probability; None for a prompt's first token, and if not asked
    for. best: the most probable tokens with their logprobs, best first.
    """

    token: int
    logprob: float | None = None
    best: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Emission:
    """News of one text.

    prompt: all its tokens, once, if asked for. token: the next one. finished: set in the last
    emission: "stop" after the end-of-sequence id, which is then `token`, "length" at `max_tokens`
    or when the context is full.
    """

    number: int
    prompt: tuple[Scored, ...] = ()
    token: Scored | None = None
    finished: Literal["stop", "length"] | None = None


@dataclasses.dataclass(slots=True)
class _Text:
    """A text that is being continued: tokens generated, the latest, and its slot."""

    number: int
    job: Job
    repeated: Repeated
    made: int = 0
    latest: int = 0
    slot: int = 0


class Batch:
    """Texts that share the steps of an engine. Not for several threads at once.

    Args:
        engine: the model.
        slots: texts processed at once, rounded up to a power of two on each copy of the weights;
            others wait for their turn.
        chunk: the most tokens of a prompt to read in one step, a power of two.

    Attributes:
        slots: texts processed at once.
        prefix_cache: the engine's.
    """

    def __init__(self, engine: Engine, slots: int = 16, chunk: int = SHARED_STEP) -> None:
        self._engine = engine
        self.slots = doubled(slots, engine.rows(1))
        self._chunk = chunk
        self.prefix_cache = engine.prefix_cache
        self._rows = Slots(engine, self.slots)
        self._waiting: dict[int, Job] = {}
        self._reading: dict[int, Generator[None, None, list[Emission]]] = {}
        self._writing: dict[int, _Text] = {}
        self._change = jax.jit(changed, out_shardings=engine.everywhere)
        self._rank = jax.jit(rank, out_shardings=engine.everywhere)
        self._cut = jax.jit(lax.dynamic_slice_in_dim, static_argnames=("slice_size", "axis"))

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._reading or self._writing)

    @property
    def waiting(self) -> int:
        """Texts that wait for a free slot."""
        return len(self._waiting)

    @property
    def working(self) -> int:
        """Texts that are being read or continued."""
        return len(self._reading) + len(self._writing)

    @property
    def rows(self) -> int:
        """Rows of the shared decoding step, taken or free; it takes few values, each compiled."""
        return len(self._rows.lengths)

    def add(self, number: int, job: Job) -> None:
        """Add a text under a number that no other text has now.

        Raises:
            PromptInvalid: the prompt is empty, has unknown ids, or leaves no room for `max_tokens`.
        """
        check_prompts(self._engine.config, [job.prompt])
        context = self._engine.config.sequence_len
        if len(job.prompt) + job.max_tokens > context:
            raise PromptInvalid(
                f"{len(job.prompt)} tokens and {job.max_tokens} more exceed the model's "
                f"context of {context}",
                hint="shorten the prompt, or ask for fewer tokens",
            )
        self._waiting[number] = job

    def drop(self, number: int) -> None:
        """Forget a text, whatever its state; its slot is free at once. Unknown ones are ignored."""
        self._waiting.pop(number, None)
        self._reading.pop(number, None)
        if number in self._writing:
            self._leave(number)

    def reset(self) -> None:
        """Forget all texts, after a step that failed."""
        self._waiting.clear()
        self._reading.clear()
        self._writing.clear()
        self._rows.reset()

    def warm_up(self, seconds: float) -> int:
        """Compile what short texts need, by continuing some dummy texts.

        One text alone, then two, four and so on up to the slots; stops once that has taken
        `seconds`. No other text may be in the batch.

        Returns:
            For how many texts at once the steps are compiled.
        """
        start, count = time.monotonic(), 1
        while True:
            for number in range(count):
                # The first must still be running when the last has been read.
                self.add(number, Job([self._engine.config.bos_token], count + 1))
            while self.busy:
                self.step()
            if count == self.slots or time.monotonic() - start > seconds:
                return count
            count *= 2

    @as_written
    def step(self) -> list[Emission]:
        """One piece of work for the prompts, then one token for every text that has a slot."""
        while self._waiting and self.working < self.slots:
            number = next(iter(self._waiting))
            job = self._waiting.pop(number)
            text = _Text(number, job, Repeated(job.penalties, job.prompt))
            self._reading[number] = self._read(text)
        with self._engine.turn:
            emissions = self._read_on()
            if self._writing:
                emissions += self._write_on()
        return emissions

    def _read_on(self) -> list[Emission]:
        """Read a chunk of the prompt whose turn it is."""
        if not self._reading:
            return []
        number = next(iter(self._reading))
        reader = self._reading.pop(number)
        try:
            next(reader)
        except StopIteration as end:
            emissions: list[Emission] = end.value
            return emissions
        self._reading[number] = reader
        return []

    def _read(self, text: _Text) -> Generator[None, None, list[Emission]]:
        """Read a prompt chunk by chunk, then let it join decoding; return its first emissions."""
        job, last = text.job, None
        scores = job.echo and job.logprobs is not None
        scored = [Scored(token) for token in job.prompt[: 1 if scores else None]]
        for part in self._engine.read([job.prompt], self._chunk):
            last = self._engine.last(part, last)
            state = part.state
            if scores:
                for more in self._score(job, part, len(scored)):
                    yield
                    scored += more
            if state.longest < len(job.prompt):
                yield
        emissions = [Emission(text.number, prompt=tuple(scored))] if job.echo else []
        if job.max_tokens == 0:
            return [*emissions, Emission(text.number, finished="length")]
        assert last is not None
        (first,) = self._choose(self._engine.logits(last)[:1, 0], [text])
        if first.finished is None:
            text.slot = self._rows.join(state)
            self._writing[text.number] = text
        return [*emissions, first]

    def _score(self, job: Job, part: Part, known: int) -> Iterator[list[Scored]]:
        """Scores from a chunk for the prompt's tokens from index `known` on, some at a time."""
        assert job.logprobs is not None
        size = math.gcd(part.x.shape[1], SCORED_AT_ONCE)
        until = min(part.state.longest + 1, len(job.prompt))
        for at in range(0, until - known, size):
            # The stream at a token predicts the next one, and the chunk begins one before `known`.
            tokens = job.prompt[known + at : min(known + at + size, until)]
            x = self._cut(part.x, at, slice_size=size, axis=1)
            filled = np.pad(np.array(tokens, np.int32), (0, size - len(tokens)))
            ranked = self._rank(self._engine.logits(x)[0], filled)
            yield _scored(tokens, ranked, job.logprobs)

    def _write_on(self) -> list[Emission]:
        """One token for every text that has a slot."""
        if not self._reading:
            moved = self._rows.shrink()
            for text in self._writing.values():
                text.slot = moved[text.slot]
        texts: list[_Text | None] = [None] * self.rows
        for text in self._writing.values():
            texts[text.slot] = text
        latest = np.array([0 if text is None else text.latest for text in texts], np.int32)
        emissions = self._choose(self._rows.step(latest), texts)
        for emission in emissions:
            if emission.finished is not None:
                self._leave(emission.number)
        return emissions

    def _choose(self, logits: Array, texts: Sequence[_Text | None]) -> list[Emission]:
        """The next token of each text from logits `[len(texts), V]`; None is an unused row."""
        jobs = [None if text is None else text.job for text in texts]
        choice = Choice.of(
            [_NOTHING if job is None else job.sampling for job in jobs],
            [0 if text is None else text.made for text in texts],
        )
        changes = Changes.of([{} if text is None else self._changes(text) for text in texts])
        changed_logits = logits if changes is None else self._change(logits, changes)
        drawn = self._engine.draw(changed_logits, choice)
        tokens = np.asarray(drawn).tolist()
        ranked = None
        if any(job is not None and job.logprobs is not None for job in jobs):
            ranked = jax.device_get(self._rank(logits, drawn))
        emissions = []
        for row, (text, token) in enumerate(zip(texts, tokens, strict=True)):
            if text is None:
                continue
            text.made, text.latest = text.made + 1, token
            text.repeated.add(token)
            score = Scored(token)
            if ranked is not None and text.job.logprobs is not None:
                row_ranked = Ranked(*(part[row : row + 1] for part in ranked))
                (score,) = _scored([token], row_ranked, text.job.logprobs)
            emissions.append(Emission(text.number, token=score, finished=self._end(text)))
        return emissions

    def _changes(self, text: _Text) -> dict[int, tuple[float, float]]:
        """The tokens whose logits change for a text's next token, and how."""
        early = text.made < text.job.min_tokens
        return text.repeated.changes(self._engine.config.eos_token if early else None)

    def _end(self, text: _Text) -> Literal["stop", "length"] | None:
        """Why a text ends after its latest token, None if it goes on."""
        if text.latest == self._engine.config.eos_token and not text.job.ignore_eos:
            return "stop"
        return "length" if text.made >= text.job.max_tokens else None

    def _leave(self, number: int) -> None:
        self._rows.leave(self._writing.pop(number).slot)


_NOTHING = Sampling()


def _scored(tokens: Sequence[int], ranked: Ranked, best: int) -> list[Scored]:
    """The first `len(tokens)` of some ranked tokens, each with the `best` most probable ones."""
    chosen, scores, ids = (np.asarray(part).tolist() for part in ranked)
    return [
        Scored(token, chosen[row], tuple(zip(ids[row][:best], scores[row][:best], strict=True)))
        for row, token in enumerate(tokens)
    ]
