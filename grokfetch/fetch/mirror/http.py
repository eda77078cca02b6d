"""Ranges of files over HTTP: redirects, and what the answers of servers mean.

Nothing that a server says is trusted further than it can be checked here; its bytes are hashed by
the caller. Foreign exceptions become one of ours: the mirror has not got this file (`Refused`), it
cannot serve us at all (`Faulty`), or it may do better next time (`Failed`, `Limited`, `Short`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from http import HTTPStatus
from types import TracebackType
from typing import Self

import httpx

from grokfetch import __version__
from grokfetch.fetch.mirror.addresses import Zone, zone
from grokfetch.fetch.mirror.environment import Environment, ProxyUnusable
from grokfetch.fetch.mirror.rate_limit import rest_asked_for

__all__ = [
    "IGNORES_RANGE",
    "Changed",
    "Failed",
    "Faulty",
    "Http",
    "Limited",
    "ProxyServer",
    "Refused",
    "Short",
    "Span",
    "redirected",
]

MOST_REDIRECTS = 10

CONNECT_TIMEOUT_S = 15.0

IGNORES_RANGE = "it ignores Range"

LIMITING = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)

ProxyServer = tuple[str, str, int, str, str]
"""Scheme ("socks5" or "http"), host, port, user and password of a proxy."""


class Refused(Exception):
    """The mirror does not have this file, or another one in its place."""


class Changed(Refused):
    """What the mirror has there is not what it was, or not as long as it should be."""


class Faulty(Exception):
    """The mirror is of no use at all: what it does cannot be right."""


class Failed(Exception):
    """It did not work this time."""


class Limited(Failed):
    """The server wants fewer requests, and none for `rest_s`, or does not say for how long."""

    def __init__(self, what: str, rest_s: float | None) -> None:
        super().__init__(what)
        self.rest_s = rest_s


class Short(Failed):
    """The answer ended before its time; what has come of it is good."""


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """The bytes from `start` up to `stop` of a file of `size` bytes, and of that ETag if given."""

    start: int
    stop: int
    size: int
    etag: str | None = None


class Http:
    """A client with open connections, for one event loop.

    Args:
        connections: how many at most are kept open.
        patience_s: how long a server may be silent.
        proxy: through which everything goes; otherwise those of the environment are heeded.
        environment: proxies, certificates, and what the Hub is sent.
    """

    def __init__(
        self,
        connections: int,
        patience_s: float,
        proxy: ProxyServer | None = None,
        environment: Environment | None = None,
    ) -> None:
        self._environment = environment or Environment()
        self._client = httpx.AsyncClient(
            transport=_Routes(connections, self._environment, proxy),
            trust_env=False,
            headers={"User-Agent": f"grokfetch/{__version__}", "Accept-Encoding": "identity"},
            timeout=httpx.Timeout(
                patience_s, connect=min(patience_s, CONNECT_TIMEOUT_S), pool=None
            ),
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
            Refused, Faulty, Failed: here, or while the bytes are read (of these only `Short`, or
                `Failed` for silence).
        """
        response = await self._open(url, span)
        try:
            yield self._chunks(response)
        finally:
            await response.aclose()

    async def document(self, url: str, largest: int) -> bytes:
        """All that lies at an address.

        Raises:
            Refused, Faulty, Failed: there is nothing, or more than `largest` bytes.
        """
        response = await self._ask(url, None)
        data = bytearray()
        try:
            async for chunk in self._chunks(response):
                data += chunk
                if len(data) > largest:
                    raise Refused(f"it is larger than {largest:,} bytes")
        finally:
            await response.aclose()
        return bytes(data)

    async def length(self, url: str) -> tuple[int, str | None]:
        """Bytes of what lies at an address, and its ETag; nothing of it is read.

        Raises:
            Refused, Faulty, Failed: there is nothing, or it is not said how long it is.
        """
        response = await self._ask(url, None)
        await response.aclose()
        size, etag = response.headers.get("content-length"), response.headers.get("etag")
        if size is None:
            raise Faulty("it does not say how long the file is")
        return int(size), etag

    async def _chunks(self, response: httpx.Response) -> AsyncIterator[bytes]:
        try:
            with self._translated():
                left = int(response.headers.get("content-length", "0"))
                stream = response.aiter_raw()
                async for chunk in stream:
                    left -= len(chunk)
                    if not left:
                        # Only an answer that was read to its end leaves its connection open.
                        async for _ in stream:
                            pass
                    yield chunk
        except _Broken:
            raise Short("its connection ended in the middle of an answer") from None

    async def _open(self, url: str, span: Span) -> httpx.Response:
        remembered = self._direct.get(url)
        if remembered is not None:
            try:
                return await self._ask(remembered, span)
            except Limited:
                raise
            except (Refused, Faulty, Failed):
                # Signed addresses expire, some with a page instead of an error; the way to them is
                # asked again.
                self._direct.pop(url, None)
        response = await self._ask(url, span)
        if str(response.url) != url:
            self._direct[url] = str(response.url)
        return response

    async def _ask(self, url: str, span: Span | None) -> httpx.Response:
        for _ in range(MOST_REDIRECTS + 1):
            with self._translated():
                headers = self._headers(httpx.URL(url), span)
                request = self._client.build_request("GET", url, headers=headers)
                response = await self._send(request)
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

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            # A server may close an open connection just when it is used again (RFC 9112, 9.3.1).
            return await self._client.send(request, stream=True)

    def _headers(self, url: httpx.URL, span: Span | None) -> dict[str, str]:
        headers = {} if span is None else {"Range": f"bytes={span.start}-{span.stop - 1}"}
        token = self._environment.token_for(url.scheme, url.host, url.port)
        return headers if token is None else {**headers, "Authorization": f"Bearer {token}"}

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.TimeoutException:
            raise Failed(f"it was silent for {self._patience_s:g} s") from None
        except httpx.InvalidURL as error:
            raise Faulty(f"its address cannot be used: {error}") from None
        except ProxyUnusable as error:
            raise Faulty(str(error)) from None
        except httpx.ProxyError as error:
            raise Failed(f"the proxy refuses: {error}") from None
        except httpx.HTTPError as error:
            raise _meaning(error) from None


class _Broken(Failed):
    """The connection ended."""


def _meaning(error: httpx.HTTPError) -> Exception:
    """What an error of a connection means, by what caused it."""
    cause: BaseException | None = error
    text = str(error) or "the connection ended"
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return Faulty(f"its certificate is not valid: {cause.verify_message}")
        if isinstance(cause, ssl.SSLError):
            return Failed(f"no secure connection: {cause.reason or cause}")
        if isinstance(cause, socket.gaierror):
            return Failed(f"the host cannot be resolved ({cause.strerror})")
        if isinstance(cause, ConnectionRefusedError):
            return Failed("the connection is refused")
        if isinstance(cause, OSError) and cause.strerror:
            text = cause.strerror
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        else:
            cause = cause.__cause__ or cause.__context__
    return _Broken(text)


class _Routes(httpx.AsyncBaseTransport):
    """Sends each request by the proxy that is meant for its host, or by none."""

    def __init__(
        self, connections: int, environment: Environment, proxy: ProxyServer | None
    ) -> None:
        self._limits = httpx.Limits(max_connections=None, max_keepalive_connections=connections)
        self._environment = environment
        self._proxy = None if proxy is None else _proxy(*proxy)
        self._context = _context(environment)
        self._transports: dict[str | None, httpx.AsyncHTTPTransport] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        address = None
        if self._proxy is None:
            port = url.port or (443 if url.scheme == "https" else 80)
            address = self._environment.proxy(url.scheme, url.host, port)
        if address not in self._transports:
            self._transports[address] = httpx.AsyncHTTPTransport(
                verify=self._context,
                trust_env=False,
                limits=self._limits,
                proxy=self._proxy if address is None else httpx.Proxy(address),
            )
        return await self._transports[address].handle_async_request(request)

    async def aclose(self) -> None:
        for transport in self._transports.values():
            await transport.aclose()


def _context(environment: Environment) -> ssl.SSLContext:
    path = environment.certificates
    if path is None:
        return httpx.create_ssl_context(trust_env=False)
    if path.is_dir():
        return ssl.create_default_context(capath=path)
    return ssl.create_default_context(cafile=path)


def _proxy(scheme: str, host: str, port: int, user: str, password: str) -> httpx.Proxy:
    # The proxy looks names up, so that nobody else learns even those.
    address = f"[{host}]" if ":" in host else host
    return httpx.Proxy(f"{scheme}://{address}:{port}", auth=(user, password) if user else None)


def redirected(response: httpx.Response) -> str:
    """Where a redirect leads.

    Raises:
        Faulty: its address cannot be followed.
    """
    here = response.url
    try:
        target = here.join(response.headers["location"])
    except httpx.InvalidURL as error:
        raise Faulty(f"it redirects to an address that cannot be used: {error}") from None
    if target.scheme not in ("http", "https"):
        raise Faulty(f"it redirects to {target.scheme}, which is not HTTP")
    if here.scheme == "https" and target.scheme != "https":
        raise Faulty("it redirects from https to http")
    ends = zone(target.host)
    if ends not in ("world", _zone(response)) and _zone(response) != "machine":
        raise Faulty("it redirects into the private network")
    return str(target)


def _zone(response: httpx.Response) -> Zone:
    """Where the host is that has answered: by its name, or by its address if that is known."""
    by_name = zone(response.url.host)
    stream = response.extensions.get("network_stream")
    if by_name != "world" or stream is None or stream.get_extra_info("is_proxy"):
        return by_name
    address = stream.get_extra_info("server_addr")
    return zone(str(address[0])) if address else by_name


def _check(response: httpx.Response, span: Span | None) -> None:
    """Make sure that an answer holds the beginning of the span that was asked for, or all."""
    status, headers = response.status_code, response.headers
    coding = headers.get("content-encoding", "identity")
    if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT) and coding != "identity":
        raise Faulty(f"it sends {coding} where plain bytes were asked for")
    if status == HTTPStatus.OK and span is None:
        return
    if span and span.etag and status < 300 and headers.get("etag") != span.etag:
        raise Changed(f"its ETag is {headers.get('etag')} there, and was {span.etag}")
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


def _denial(status: int, headers: httpx.Headers) -> Exception:
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
