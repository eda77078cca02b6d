"""Time, memory and experts of a run: kept for `report`, printed by `run --stats`; not a command."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from grokfetch.folder.journal import Run, add_run
from grokfetch.folder.store import Store
from grokfetch.output.terminal import LABEL, Screen
from grokfetch.units import bytes_text, seconds_text, share_text, speed_text
from loader.devices.meter import Meter

if TYPE_CHECKING:
    from loader.inference.engine import Engine

__all__ = ["Measured", "expert_lines", "why_stopped"]


Stopped = Literal["end", "max_tokens", "context"]
"""Why a text has ended: the model ended it, it has --max-tokens tokens, or the context is full."""


class Measured:
    """The measurements of a run in progress.

    Args:
        meter: of memory and bytes read.
        engine: loaded, and not used yet.
        weights: bytes of the weights.
        loaded_s: seconds that loading took.
        stats: whether to count the chosen experts even if that takes time.

    Attributes:
        tokens: generated so far.
        first_token_s: seconds from the prompt to the first token, without compiling.
    """

    def __init__(
        self, meter: Meter, engine: Engine, weights: int, loaded_s: float, *, stats: bool
    ) -> None:
        from loader.devices.mapped import Mapped

        self._meter = meter
        self._engine = engine
        self._weights = weights
        self._loaded_s = loaded_s
        self._mapped = isinstance(engine.params.layers[0].gate, Mapped)
        self._choices = engine.count_experts() if stats or self._mapped else None
        self._prompt = 0
        self._before = meter.compile_s
        self._first = self._last = 0.0
        self._read_at_first: int | None = None
        self._most = 0
        self.tokens = 0
        self.first_token_s = 0.0

    def watch(self, prompt: Sequence[int], tokens: Iterator[int], most: int) -> Iterator[int]:
        """The same tokens, at most `most`, while they are timed."""
        self._prompt, self._most = len(prompt), most
        start = self._now()
        for token in tokens:
            self._last = self._now()
            if not self.tokens:
                self._first = self._last
                self.first_token_s = self._first - start
                self._read_at_first = self._meter.read
            self.tokens += 1
            yield token

    def _now(self) -> float:
        """The clock without the seconds spent compiling."""
        return time.perf_counter() - self._meter.compile_s

    @property
    def compile_s(self) -> float:
        """Seconds of compiling since the weights were loaded."""
        return self._meter.compile_s - self._before

    @property
    def tokens_per_s(self) -> float | None:
        """The rate after the first token; None if there was only one."""
        return (self.tokens - 1) / (self._last - self._first) if self.tokens > 1 else None

    @property
    def stopped(self) -> Stopped:
        """Why the text has ended; valid after its end."""
        room = self._engine.config.sequence_len - self._prompt
        return why_stopped(self.tokens, self._most, room)

    def stopped_text(self) -> str:
        """The same in words."""
        context = f"the context of {self._engine.config.sequence_len:,} tokens is full"
        limit = f"stopped at --max-tokens {self._most}"
        return {"end": "the text ended", "max_tokens": limit, "context": context}[self.stopped]

    @contextlib.contextmanager
    def kept(self, store: Store) -> Iterator[None]:
        """Write the run to the journal when the block ends, even by Ctrl-C, if there is a token."""
        try:
            yield
        finally:
            if self.tokens:
                add_run(store, self.run())

    def run(self) -> Run:
        """The run so far, as the journal keeps it."""
        devices = list(self._engine.mesh.devices.flat)
        counts = None if self._choices is None else self._choices.counts().tolist()
        return Run(
            time.time(),
            "mapped" if self._mapped else "sharded",
            "/".join(sorted({device.platform for device in devices})).upper(),
            len(devices),
            self._weights,
            round(self._loaded_s, 3),
            self._prompt,
            self.tokens,
            round(self.first_token_s, 3),
            None if self.tokens_per_s is None else round(self.tokens_per_s, 3),
            self._meter.peak_memory,
            self._meter.read,
            None if counts is None else tuple(map(tuple, counts)),
            round(self.compile_s, 3),
        )

    def said(self, view: Screen) -> Iterator[str]:
        """The lines that `--stats` prints."""
        run = self.run()
        speed = "" if run.tokens_per_s is None else f", then {speed_text(run.tokens_per_s)}"
        first = f"the first after {seconds_text(run.first_token_s)}{speed}"
        yield from view.fact("tokens", f"{run.tokens} after {run.prompt} of the prompt, {first}")
        yield from view.fact("end", self.stopped_text())
        yield from view.fact("compiled", f"in {seconds_text(self.compile_s)}, counted separately")
        yield from view.fact("read", self._read(run.read))
        memory = "unknown" if run.peak_memory is None else f"{bytes_text(run.peak_memory)} at most"
        mapped = f", plus {bytes_text(run.weights)} of mapped weights" if self._mapped else ""
        yield from view.fact("memory", f"{memory}{mapped}")
        if run.experts is not None:
            yield from expert_lines(run.experts, view)

    def _read(self, read: int | None) -> str:
        if read is None or self._read_at_first is None:
            return "unknown on this system"
        text = f"{bytes_text(read)} from the disk"
        if self.tokens > 1:
            each = (read - self._read_at_first) / (self.tokens - 1)
            text += f", {bytes_text(each)} for each token after the first"
        return text


def why_stopped(tokens: int, most: int, room: int) -> Stopped:
    """Why a text has ended, if `most` tokens were asked for and the context had `room`. Pure."""
    if tokens == most:
        return "max_tokens"
    return "context" if tokens == room else "end"


def expert_lines(experts: Sequence[Sequence[int]], view: Screen) -> Iterator[str]:
    """How often each layer chose each expert: as shades in columns, or as words."""
    totals = [sum(column) for column in zip(*experts, strict=True)]
    everything = max(1, sum(totals))
    most, least = max(totals), min(totals)
    yield from view.fact(
        "experts",
        f"{sum(totals):,} choices in {len(experts)} layers; expert {totals.index(most)} most "
        f"often, {share_text(most, everything)}, expert {totals.index(least)} least often, "
        f"{share_text(least, everything)}",
    )
    if view.plain:
        for number, row in enumerate(experts):
            listed = ", ".join(f"{expert} {count}" for expert, count in enumerate(row) if count)
            yield f"layer {number}, expert and count: {listed}"
        return
    top = max(1, *(count for row in experts for count in row))
    width = LABEL + len(experts[0])
    columns = max(1, (view.columns + 2) // (width + 2))
    rows = -(-len(experts) // columns)
    cells = [
        f"layer {number:<2} {view.painted([view.shade(count / top) for count in row])}"
        for number, row in enumerate(experts)
    ]
    for start in range(rows):
        yield "  ".join(cells[start::rows])
