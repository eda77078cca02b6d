"""What the answers and failures of servers mean. Pure: no I/O and no httpx here."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Mapping
from http import HTTPStatus

from grokfetch.fetch.mirror.rate_limit import rest_asked_for

__all__ = [
    "IGNORES_RANGE",
    "Changed",
    "Failed",
    "Faulty",
    "Limited",
    "Refused",
    "Short",
    "Span",
    "check",
    "quoted",
]

IGNORES_RANGE = "it ignores Range"

LIMITING = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


class Refused(Exception):
    """The mirror does not have this file, or has another one in its place."""


class Changed(Refused):
    """The file on the mirror has changed, or does not have the right length."""


class Faulty(Exception):
    """The mirror is of no use at all: its behaviour cannot be right."""


class Failed(Exception):
    """It did not work this time."""


class Limited(Failed):
    """The server wants fewer requests, and none for `rest_s` seconds (None: it does not say)."""

    def __init__(self, what: str, rest_s: float | None) -> None:
        super().__init__(what)
        self.rest_s = rest_s


class Short(Failed):
    """The answer ended too early; what has come of it is good."""


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """The bytes from `start` up to `stop` of a file of `size` bytes, with that ETag if given."""

    start: int
    stop: int
    size: int
    etag: str | None = None


def quoted(text: str) -> str:
    """What a server wrote, to show to users: shortened, and without terminal control codes."""
    return "".join(one if one.isprintable() else "\ufffd" for one in f"{text:.80}")


def check(status: int, headers: Mapping[str, str], span: Span | None) -> None:
    """Make sure that an answer holds the start of the requested span, or everything.

    Args:
        status: of the answer.
        headers: of the answer, their names in lower case.
        span: None if everything was asked for.

    Raises:
        Refused, Faulty, Failed: it does not.
    """
    coding = headers.get("content-encoding", "identity")
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT) and coding != "identity":
        raise Faulty(f"it sends {quoted(coding)} where plain bytes were asked for")
    if status == HTTPStatus.OK and span is None:
        return
    if span and span.etag and status < 300 and headers.get("etag") != span.etag:
        tags = quoted(headers.get("etag", "missing")), quoted(span.etag)
        raise Changed(f"its ETag is {tags[0]} there, and was {tags[1]}")
    if status == HTTPStatus.PARTIAL_CONTENT and span is not None:
        _check_range(headers.get("content-range", ""), span)
    elif status == HTTPStatus.OK and span is not None:
        length = headers.get("content-length")
        if (span.start, span.stop) != (0, span.size):
            raise Failed(IGNORES_RANGE)
        if length is not None and length != str(span.size):
            raise Changed(f"it has {length} bytes there, not {span.size}")
    else:
        raise _denial(status, headers)


def _denial(status: int, headers: Mapping[str, str]) -> Exception:
    """What an answer without the bytes means."""
    if status in LIMITING or status == HTTPStatus.REQUEST_TIMEOUT or status >= 500:
        rest_s = rest_asked_for(headers, time.time())
        if rest_s is not None or status in LIMITING:
            return Limited(f"it answers {status}", rest_s)
        return Failed(f"it answers {status}")
    if status == HTTPStatus.UNAUTHORIZED:
        return Faulty("it asks for a password or a token (it answers 401)")
    if status == HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
        return Faulty("the proxy asks for a password (it answers 407)")
    if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        return Changed("it has fewer bytes there")
    return Refused(f"it answers {status}")


def _check_range(text: str, span: Span) -> None:
    match = re.fullmatch(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20}|\*)", text.strip())
    if match is None or int(match[1]) != span.start:
        raise Faulty("it answers with another range than the one asked for")
    if match[3] not in ("*", str(span.size)):
        raise Changed(f"it has {match[3]} bytes there, not {span.size}")
