"""From the tokens of one text to the pieces of a response: stop strings, log-probabilities."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

from grokfetch.serving.fields import Refused
from grokfetch.serving.model import Emission, Scored, Words

__all__ = ["Answer", "Numbers", "Piece", "Stops"]


LEAST = -9999.0
"""What OpenAI says for minus infinity, which JSON cannot."""


class Stops:
    """Finds the first of some texts in a stream, whatever pieces it comes in.

    Args:
        texts: what ends the stream; none of them is empty.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self._texts = texts
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """What may be shown now: nothing that could still be the beginning of a stop text."""
        if self.found:
            return ""
        held = self._held + text
        ends = [at for at in (held.find(stop) for stop in self._texts) if at >= 0]
        if ends:
            self.found, self._held = True, ""
            return held[: min(ends)]
        keep = max((_overlap(held, stop) for stop in self._texts), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of a text that are the beginning of a stop text, not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A part of the response to one prompt; the fields of OpenAI's choice, `index` apart."""

    text: str
    logprobs: dict[str, list[Any]] | None
    finish_reason: str | None


class Answer:
    """What one text has come to.

    Args:
        words: the tokenizer.
        stops: texts that end it; they are not part of it.
        logprobs: whether these are told.
        prompt: the text of the prompt where it was given as text, to be echoed as it is.

    Attributes:
        generated: tokens so far, the one that ended the sequence included.
        finished: whether nothing more comes, though the model might go on.
    """

    def __init__(
        self, words: Words, stops: Sequence[str], *, logprobs: bool, prompt: str | None
    ) -> None:
        self._words = words
        self._stream = words.stream()
        self._stops = Stops(stops)
        self._logprobs = logprobs
        self._prompt = prompt
        self._offset = 0
        self.generated = 0
        self.finished = False

    def take(self, emission: Emission) -> Piece:
        """What an emission adds to the response."""
        text, rows = self._echo(emission.prompt) if emission.prompt else ("", [])
        if emission.token is not None:
            shown, row = self._next(emission.token, ended=emission.finished == "stop")
            rows.append(row)
            text += shown
        reason: str | None = emission.finished
        if self._stops.found:
            reason = "stop"
        elif reason is not None:
            text += self._stops.push(self._stream.finish()) + self._stops.finish()
        self.finished = reason is not None
        return Piece(text, _columns(rows) if self._logprobs else None, reason)

    def _echo(self, tokens: Sequence[Scored]) -> tuple[str, list[_Row]]:
        """The prompt's text, and a row for each of its tokens."""
        rows, parts = [], []
        for index, token in enumerate(tokens):
            part = self._stream.push(token.token)
            # The space that a tokenizer puts before the first word is not part of the text.
            parts.append(part if index else part.removeprefix(" "))
            rows.append(self._row(token, parts[-1]))
        if self._prompt is None:
            return "".join(parts), rows
        self._offset = len(self._prompt)
        return self._prompt, rows

    def _next(self, token: Scored, *, ended: bool) -> tuple[str, _Row]:
        self.generated += 1
        part = "" if ended else self._stream.push(token.token)
        return self._stops.push(part), self._row(token, part)

    def _row(self, scored: Scored, part: str) -> _Row:
        name = self._words.piece(scored.token)
        best: dict[str, float] | None = None
        if scored.logprob is not None:
            best = {}
            # Different tokens may have the same name; the most probable one then stands for it.
            for token, score in (*scored.best, (scored.token, scored.logprob)):
                best.setdefault(self._words.piece(token), max(score, LEAST))
        logprob = None if scored.logprob is None else max(scored.logprob, LEAST)
        row = _Row(name, logprob, best, self._offset)
        self._offset += len(part)
        return row


class _Row(NamedTuple):
    """What OpenAI's `logprobs` say of one token."""

    tokens: str
    token_logprobs: float | None
    top_logprobs: dict[str, float] | None
    text_offset: int


def _columns(rows: Sequence[_Row]) -> dict[str, list[Any]]:
    return {name: [getattr(row, name) for row in rows] for name in _Row._fields}


class Numbers:
    """Stands in for a tokenizer where there is none: the text is the token ids."""

    def encode(self, text: str) -> list[int]:
        """Refused: nobody knows the ids of a text.

        Raises:
            Refused: always.
        """
        raise Refused(
            f"this server has no tokenizer: token ids are wanted, not the text {text!r:.40}",
            param="prompt",
            code="tokenizer_missing",
        )

    def piece(self, token: int) -> str:
        """The id."""
        return str(token)

    def stream(self) -> Numbers:
        """Ids one after the other need no memory."""
        return self

    def push(self, token: int) -> str:
        """The id after a space."""
        return f" {token}"

    def finish(self) -> str:
        """Nothing: no id is ever incomplete."""
        return ""
