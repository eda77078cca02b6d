"""Ranges of files over HTTP: redirects, and what the answers of servers mean.

Nothing that a server says is trusted further than it can be checked here; its bytes are hashed by
the caller. Foreign exceptions become one of three: the mirror has not got this file (`Refused`), it
cannot serve us at all (`Faulty`), or it may do better next time (`Failed`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Self

from grokfetch import __version__
from grokfetch.fetch.mirror.addresses import inward

if TYPE_CHECKING:
    # A tenth of a second to import, which only those pay who ask a mirror.
    import httpx

__all__ = ["Failed", "Faulty", "Http", "Refused", "Span", "proxy_of", "redirected"]

MOST_REDIRECTS = 10

LONGEST_REST_S = 600.0
"""A server that wants to be left alone for longer than this is asked again all the same."""

CONNECT_TIMEOUT_S = 15.0


class Refused(Exception):
    """The mirror does not have this file, or another one in its place."""


class Faulty(Exception):
    """The mirror is of no use at all: what it does cannot be right."""


class Failed(Exception):
    """It did not work this time. `rest_s` is how long the server asks to be left alone."""

    def __init__(self, what: str, rest_s: float = 0.0) -> None:
        super().__init__(what)
        self.rest_s = rest_s


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """The bytes from `start` up to `stop` of a file of `size` bytes."""

    start: int
    stop: int
    size: int


class Http:
    """A client with open connections, for one event loop.

    Args:
        connections: how many at most are kept open.
        patience_s: how long a server may be silent.
        proxy: host, port, user and password of a SOCKS5 proxy through which everything goes;
            otherwise those of the environment (`HTTPS_PROXY`, `NO_PROXY`) are heeded.
    """

    def __init__(
        self,
        connections: int,
        patience_s: float,
        proxy: tuple[str, int, str, str] | None = None,
    ) -> None:
        import httpx

        self._client = httpx.AsyncClient(
            proxy=None if proxy is None else proxy_of(*proxy),
            trust_env=proxy is None,
            headers={"User-Agent": f"grokfetch/{__version__}", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(
                patience_s, connect=min(patience_s, CONNECT_TIMEOUT_S), pool=None
            ),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=connections),
        )
        self._patience_s = patience_s
        # Where redirects led, so that not every range goes the long way.
        self._direct: dict[str, str] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    @contextlib.asynccontextmanager
    async def opened(self, url: str, span: Span) -> AsyncIterator[AsyncIterator[bytes]]:
        """The bytes of a span as they come; fewer or more of them is for the caller to notice.

        Raises:
            Refused, Faulty, Failed: here, or while the bytes are read.
        """
        response = await self._open(url, span)
        try:
            yield self._chunks(response)
        finally:
            await response.aclose()

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        with self._translated():
            async for chunk in response.aiter_raw():
                yield chunk

    async def _open(self, url: str, span: Span) -> httpx.Response:
        known = self._direct.get(url)
        if known is not None:
            try:
                return await self._ask(known, span)
            except (Refused, Failed):
                # Signed addresses expire; the way to them is asked again.
                self._direct.pop(url, None)
        response = await self._ask(url, span)
        if str(response.url) != url:
            self._direct[url] = str(response.url)
        return response

    async def _ask(self, url: str, span: Span) -> httpx.Response:
        headers = {"Range": f"bytes={span.start}-{span.stop - 1}"}
        for _ in range(MOST_REDIRECTS + 1):
            with self._translated():
                request = self._client.build_request("GET", url, headers=headers)
                response = await self._client.send(request, stream=True)
            try:
                if not response.has_redirect_location:
                    _check(response, span)
                    return response
                url = redirected(response)
            except BaseException:
                await response.aclose()
                raise
            await response.aclose()
        raise Failed(f"it redirects more than {MOST_REDIRECTS} times")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.TimeoutException:
            raise Failed(f"it was silent for {self._patience_s:g} s") from None
        except httpx.InvalidURL as error:
            raise Faulty(f"its address cannot be used: {error}") from None
        except httpx.HTTPError as error:
            raise Failed(str(error) or type(error).__name__) from None


def proxy_of(host: str, port: int, user: str, password: str) -> httpx.Proxy:
    """A SOCKS5 proxy as httpx names it."""
    import httpx

    # The proxy looks names up, so that not even they are told to anybody else.
    address = f"[{host}]" if ":" in host else host
    return httpx.Proxy(f"socks5://{address}:{port}", auth=(user, password) if user else None)


def redirected(response: httpx.Response) -> str:
    """Where a redirect leads.

    Raises:
        Faulty: its address cannot be followed.
    """
    import httpx

    here = response.url
    try:
        there = here.join(response.headers["location"])
    except httpx.InvalidURL as error:
        raise Faulty(f"it redirects to an address that cannot be used: {error}") from None
    if there.scheme not in ("http", "https"):
        raise Faulty(f"it redirects to {there.scheme}, which is not HTTP")
    if here.scheme == "https" and there.scheme != "https":
        raise Faulty("it redirects from https to http")
    if inward(there.host) and not inward(here.host):
        raise Faulty("it redirects into the private network")
    return str(there)


def _check(response: httpx.Response, span: Span) -> None:
    """Make sure that an answer holds the span that was asked for."""
    status = response.status_code
    coding = response.headers.get("content-encoding", "identity")
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT) and coding != "identity":
        raise Faulty(f"it sends {coding} where plain bytes were asked for")
    if status == HTTPStatus.PARTIAL_CONTENT:
        _check_range(response.headers.get("content-range", ""), span)
    elif status == HTTPStatus.OK:
        length = response.headers.get("content-length")
        if (span.start, span.stop) != (0, span.size):
            raise Faulty("it ignores Range")
        if length is not None and length != str(span.size):
            raise Refused(f"it has {length} bytes there, not {span.size}")
    elif status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
        raise Refused("it has fewer bytes there")
    elif status in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_MANY_REQUESTS) or status >= 500:
        raise Failed(f"it answers {status}", _rest(response.headers.get("retry-after", "")))
    else:
        raise Refused(f"it answers {status}")


def _check_range(text: str, span: Span) -> None:
    found = re.fullmatch(r"bytes (\d{1,20})-(\d{1,20})/(\d{1,20}|\*)", text.strip())
    if found is None or int(found[1]) != span.start:
        raise Faulty("it answers with another range than the one asked for")
    if found[3] not in ("*", str(span.size)):
        raise Refused(f"it has {found[3]} bytes there, not {span.size}")
    if int(found[2]) + 1 < span.stop:
        raise Failed("it answers with a shorter range than the one asked for")


def _rest(text: str) -> float:
    return min(float(text), LONGEST_REST_S) if re.fullmatch(r"\d{1,9}", text) else 0.0
