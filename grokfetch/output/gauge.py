"""The progress of a step, as one line of any width or as a sentence. Pure: no I/O here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

from grokfetch.output.terminal import Screen
from grokfetch.units import bytes_text, count_text, seconds_text, share_text

__all__ = ["Gauge", "Speed"]

SHORTEST, LONGEST = 10, 40
"""Columns of the bar if there is enough room."""

LEAST = 3
"""Columns of the bar if there is little room."""

GAP = "  "

LONGEST_LEFT_S = 100 * 24 * 3600
"""A remaining time of more seconds is not shown."""

SMOOTH_S = 5.0
"""Seconds over which a rate that is measured here is averaged."""


@dataclasses.dataclass(frozen=True, slots=True)
class Gauge:
    """The state of a step.

    step: one word. done, total: bytes, or a count of another unit; a total of 0 is not known yet.
    rate: units per second, None if unknown. peers: how many, None for a step without any.
    mirrors: how many HTTP servers. waiting: what readers wait for, in words.
    """

    step: str
    done: int
    total: int
    rate: float | None = None
    peers: int | None = None
    mirrors: int = 0
    unit: str = "byte"
    waiting: str = ""

    def line(self, view: Screen) -> str:
        """A line with a bar that fits the screen: with less room it has fewer words, but all facts.

        Only what readers wait for is left out if there is no room for it.
        """
        if not self.total:
            return GAP.join([self.step, *self._senders(short=False)])[: view.columns]
        for wording in self._wordings():
            head, facts = wording.head, list(filter(None, wording.facts))
            room = view.columns - sum(len(wording.gap) + len(text) for text in (*head, *facts))
            if room >= wording.least:
                break
        bar = [view.bar(self.done / self.total, min(room, LONGEST))] if room > 0 else []
        return wording.gap.join([*head, *bar, *facts])

    def sentence(self) -> str:
        """The same in words."""
        share = share_text(self.done, self.total) if self.total else "waiting"
        amount = f"{self._amount(self.done)} of {self._amount(self.total)}" if self.total else ""
        left = self._left()
        facts = (
            f"{self.step} {share}",
            amount,
            self._rate(),
            f"{left} left" if left else "",
            *self._senders(short=False),
            self.waiting and f"waiting for {self.waiting}",
        )
        return ", ".join(filter(None, facts))

    def _wordings(self) -> Iterator[_Wording]:
        """The possible wordings from long to short."""
        share, rate, left = share_text(self.done, self.total), self._rate(), self._left()
        senders, initials = self._senders(short=False), self._senders(short=True)
        head = (self.step,)
        facts = (share, rate, f"{left} left" if left else "", *senders)
        if self.waiting:
            yield _Wording(head, (*facts, f"waiting for {self.waiting}"), GAP, SHORTEST)
            yield _Wording(head, (share, rate, left, *senders, f"for {self.waiting}"), " ", LEAST)
        yield _Wording(head, facts, GAP, SHORTEST)
        yield _Wording(head, (share, rate, left, *senders), " ", SHORTEST)
        yield _Wording((), (share, rate, left, *senders), " ", LEAST)
        share = f"{share.partition('.')[0]} %"
        left = " ".join(left.split()[:2])
        yield _Wording((), (share, rate, left, *senders), " ", LEAST)
        yield _Wording((), (share, rate, left, *initials), " ", 0)

    def _amount(self, count: int) -> str:
        return bytes_text(count) if self.unit == "byte" else count_text(count, self.unit)

    def _rate(self) -> str:
        if self.rate is None:
            return ""
        if self.unit == "byte":
            return f"{bytes_text(self.rate)}/s"
        return f"{self.rate:.2f} {self.unit}s/s"

    def _left(self) -> str:
        """The remaining time; empty if it is not known."""
        if not self.rate or self.done >= self.total:
            return ""
        seconds = (self.total - self.done) / self.rate
        if seconds >= LONGEST_LEFT_S:
            return ""
        return seconds_text(seconds) if seconds >= 10 else f"{math.ceil(seconds)} s"

    def _senders(self, *, short: bool) -> list[str]:
        if self.peers is None:
            return []
        if short:
            return [f"{self.peers}p" + (f" {self.mirrors}m" if self.mirrors else "")]
        mirrors = [count_text(self.mirrors, "mirror")] if self.mirrors else []
        return [", ".join([count_text(self.peers, "peer"), *mirrors])]


@dataclasses.dataclass(frozen=True, slots=True)
class _Wording:
    """The words before and after a bar, what separates them, and the least columns of the bar."""

    head: tuple[str, ...]
    facts: tuple[str, ...]
    gap: str
    least: int


class Speed:
    """The rate of a step that only reports its progress, averaged over the last seconds."""

    def __init__(self) -> None:
        self._at: tuple[float, int] | None = None
        self._rate: float | None = None

    def of(self, done: int, now: float) -> float | None:
        """The rate after `done` bytes; None while it is not known."""
        if self._at is None or done < self._at[1]:
            self._at, self._rate = (now, done), None
        elapsed = now - self._at[0]
        if elapsed >= 1.0:
            latest = (done - self._at[1]) / elapsed
            weight = min(1.0, elapsed / SMOOTH_S)
            self._rate = (
                latest if self._rate is None else self._rate + weight * (latest - self._rate)
            )
            self._at = now, done
        return self._rate
