"""Requests to a server and its answers, cheaper than httpx's own objects."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import Any

import httpx

from grokfetch.fetch.mirror.answers import Span
from grokfetch.fetch.mirror.environment import Environment

__all__ = ["Answer", "Asked", "Asking", "named"]

PLAIN = re.compile(r"[A-Za-z0-9_~-][A-Za-z0-9._~-]*")
"""Names that need no quoting in an address."""

REDIRECTS = (
    HTTPStatus.MOVED_PERMANENTLY,
    HTTPStatus.FOUND,
    HTTPStatus.SEE_OTHER,
    HTTPStatus.TEMPORARY_REDIRECT,
    HTTPStatus.PERMANENT_REDIRECT,
)

Headers = tuple[tuple[bytes, bytes], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A request: the host, the path and query, and the headers."""

    url: str
    scheme: str
    host: str
    port: int
    target: bytes
    headers: Headers


@dataclasses.dataclass(slots=True)
class Answer:
    """The head of an answer, and its body, which the caller reads and closes.

    `url` is what was asked for, `headers` are by name in lower case. `server` is the address that
    it came from, host first, or None if a proxy hides it.
    """

    url: str
    status: int
    headers: dict[str, str]
    body: httpx.AsyncByteStream
    server: tuple[Any, ...] | None

    @property
    def redirects(self) -> bool:
        """Whether it redirects."""
        return self.status in REDIRECTS and "location" in self.headers


def named(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by name in lower case; repeated ones are joined by commas."""
    found: dict[str, str] = {}
    for name, value in headers:
        key, text = name.decode("latin-1").lower(), _text(value)
        found[key] = f"{found[key]}, {text}" if key in found else text
    return found


def _text(value: bytes) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.decode("latin-1")


class Asking:
    """Makes requests. What requests for files of one folder share is made only once.

    Args:
        headers: of all requests.
        environment: what the Hub is sent.
    """

    def __init__(self, headers: dict[str, str], environment: Environment) -> None:
        self._headers = headers
        self._environment = environment
        self._folder = lru_cache(64)(self._parsed)

    def asked(self, url: str, span: Span | None) -> Asked:
        """A request for a span of the file at an address, or for all of it.

        Raises:
            httpx.InvalidURL: the address cannot be used.
        """
        folder, _, name = url.rpartition("/")
        query = "?" in folder or "#" in folder
        if PLAIN.fullmatch(name) and folder.count("/") > 1 and not query:
            known = self._folder(f"{folder}/")
            target = known.target + name.encode("ascii")
        else:
            known = self._parsed(url)
            target = known.target
        headers = known.headers
        if span is not None:
            headers = (*headers, (b"Range", b"bytes=%d-%d" % (span.start, span.stop - 1)))
        return Asked(url, known.scheme, known.host, known.port, target, headers)

    def _parsed(self, address: str) -> Asked:
        url = httpx.URL(address)
        headers = dict(self._headers)
        token = self._environment.token_for(url.scheme, url.host, url.port)
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        request = httpx.Request("GET", url, headers=headers)
        if url.userinfo:
            next(httpx.BasicAuth(url.username, url.password).auth_flow(request))
        port = url.port or (443 if url.scheme == "https" else 80)
        host = url.raw_host.decode("ascii")
        raw = tuple(request.headers.raw)
        return Asked(address, url.scheme, host, port, url.raw_path, raw)
