"""From the tokens of one text to the pieces of a response: stop strings, log-probabilities."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from grokfetch.serving.fields import Refused
from grokfetch.serving.model import Emission, Scored, Tokenizer

__all__ = ["Answer", "Numbers", "Piece", "Shown", "Stops", "decoded"]


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
        """The text that may be shown now: nothing that could be the beginning of a stop string."""
        if self.found:
            return ""
        text_held = self._held + text
        ends = [at for at in (text_held.find(stop) for stop in self._texts) if at >= 0]
        if ends:
            self.found, self._held = True, ""
            return text_held[: min(ends)]
        keep = max((_overlap(text_held, stop) for stop in self._texts), default=0)
        self._held = text_held[len(text_held) - keep :]
        return text_held[: len(text_held) - keep]

    def finish(self) -> str:
        """The text that was held back, after the last token."""
        text_held, self._held = self._held, ""
        return text_held


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are a proper prefix of a stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if stop.startswith(text[-size:])), 0)


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A part of the response to one prompt; the fields of OpenAI's choice, except `index`."""

    text: str
    logprobs: dict[str, list[Any]] | None
    finish_reason: str | None


@dataclasses.dataclass(frozen=True, slots=True)
class Shown:
    """What a request wants to see of its texts.

    stops: strings that end a text; they are not part of it. logprobs: whether to return these.
    special: whether to show control tokens by their names. min_tokens: number of tokens in which
    `stops` are not looked for.
    """

    stops: tuple[str, ...] = ()
    logprobs: bool = False
    special: bool = False
    min_tokens: int = 0


class Answer:
    """The text generated so far for one prompt.

    Args:
        tokenizer: the tokenizer.
        shown: what the request wants to see.
        prompt: the text of the prompt, if it was given as text, to be echoed unchanged.
        before: characters of the prompt, if it is not echoed.

    Attributes:
        generated: tokens so far, including the one that ended the sequence.
        finished: whether the text is complete, even if the model would go on.
    """

    def __init__(
        self, tokenizer: Tokenizer, shown: Shown, *, prompt: str | None, before: int
    ) -> None:
        self._tokenizer = tokenizer
        self._stream = tokenizer.stream()
        self._stops = Stops(shown.stops)
        self._wanted = shown
        self._prompt = prompt
        self._offset = self._shown = before
        self._held: deque[_Row] = deque()
        self._sum = 0.0
        self.generated = 0
        self.finished = False

    @property
    def mean_logprob(self) -> float:
        """The mean over the tokens so far; minus infinity if there are none."""
        return self._sum / self.generated if self.generated else -math.inf

    def take(self, emission: Emission) -> Piece:
        """What an emission adds to the response.

        A token is returned when some of its text is: if a stop string ends the text, the tokens end
        there, too.
        """
        text, rows = self._echo(emission.prompt) if emission.prompt else ("", [])
        if emission.token is not None:
            text += self._next(emission.token, ended=emission.finished == "stop")
        reason: str | None = emission.finished
        if self._stops.found:
            reason = "stop"
        elif reason is not None:
            text += self._stops.push(self._stream.finish()) + self._stops.finish()
        self.finished = reason is not None
        self._shown += len(text)
        whole = self.finished and not self._stops.found
        while self._held and (whole or self._held[0].text_offset < self._shown):
            rows.append(self._held.popleft())
        due = self._wanted.logprobs and (rows or self.finished)
        return Piece(text, _columns(rows) if due else None, reason)

    def _echo(self, tokens: Sequence[Scored]) -> tuple[str, list[_Row]]:
        """The prompt's text, and a row for each of its tokens."""
        rows, parts = [], []
        for index, token in enumerate(tokens):
            part = self._part(token.token)
            # The space that a tokenizer puts before the first word is not part of the text.
            parts.append(part if index else part.removeprefix(" "))
            rows.append(self._row(token, parts[-1]))
        if self._prompt is None:
            return "".join(parts), rows
        self._offset = len(self._prompt)
        return self._prompt, rows

    def _next(self, token: Scored, *, ended: bool) -> str:
        """The text that may be shown after a token."""
        self.generated += 1
        self._sum += token.logprob or 0.0
        part = "" if ended else self._part(token.token)
        self._held.append(self._row(token, part))
        return part if self.generated <= self._wanted.min_tokens else self._stops.push(part)

    def _part(self, token: int) -> str:
        named = self._wanted.special and self._tokenizer.special(token)
        return self._tokenizer.piece(token) if named else self._stream.push(token)

    def _row(self, scored: Scored, part: str) -> _Row:
        name = self._tokenizer.piece(scored.token)
        best: dict[str, float] | None = None
        if scored.logprob is not None:
            best = {}
            # Different tokens may have the same name; the most probable one then stands for it.
            for token, score in (*scored.best, (scored.token, scored.logprob)):
                best.setdefault(self._tokenizer.piece(token), max(score, LEAST))
        logprob = None if scored.logprob is None else max(scored.logprob, LEAST)
        row = _Row(name, logprob, best, self._offset)
        self._offset += len(part)
        return row


def decoded(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """The text of tokens, without the space that a tokenizer puts before the first word."""
    stream = tokenizer.stream()
    text = "".join(stream.push(token) for token in tokens) + stream.finish()
    return text.removeprefix(" ")


class _Row(NamedTuple):
    """OpenAI's `logprobs` of one token."""

    tokens: str
    token_logprobs: float | None
    top_logprobs: dict[str, float] | None
    text_offset: int


def _columns(rows: Sequence[_Row]) -> dict[str, list[Any]]:
    return {name: [getattr(row, name) for row in rows] for name in _Row._fields}


class Numbers:
    """Used in place of a tokenizer if there is none: the text is the token ids."""

    def encode(self, text: str) -> list[int]:
        """Refused: the ids of a text are not known.

        Raises:
            Refused: always.
        """
        raise Refused(
            f"this server has no tokenizer: send token ids instead of the text {text!r:.40}",
            param="prompt",
            code="tokenizer_missing",
        )

    def piece(self, token: int) -> str:
        """The id."""
        return str(token)

    def special(self, token: int) -> bool:  # noqa: ARG002  # the protocol's signature
        """No: every id is shown."""
        return False

    def stream(self) -> Numbers:
        """Itself: writing ids needs no state."""
        return self

    def push(self, token: int) -> str:
        """The id after a space."""
        return f" {token}"

    def finish(self) -> str:
        """Nothing: an id is never incomplete."""
        return ""
