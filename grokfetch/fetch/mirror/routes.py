"""The route of a request: through the proxy for its host, or directly."""

from __future__ import annotations

import ssl
from functools import cached_property

import httpx

from grokfetch.fetch.mirror.direct import Direct
from grokfetch.fetch.mirror.environment import Environment
from grokfetch.fetch.mirror.exchange import Answer, Asked, named

__all__ = ["ProxyServer", "Routes"]

ProxyServer = tuple[str, str, int, str, str]
"""Scheme ("socks5" or "http"), host, port, user and password of a proxy."""


class Routes:
    """Sends each request through the proxy for its host, or directly.

    Args:
        connections: how many at most are kept open.
        environment: proxies and certificates.
        proxy: for everything, whatever the environment says.
        timeout: how long to wait for each operation.
    """

    def __init__(
        self,
        connections: int,
        environment: Environment,
        proxy: ProxyServer | None,
        timeout: httpx.Timeout,
    ) -> None:
        self._connections = connections
        self._environment = environment
        self._proxy = None if proxy is None else _proxy(*proxy)
        self._timeout = timeout
        self._direct = Direct(connections, timeout, lambda: self._context)
        self._proxied: dict[str | None, httpx.AsyncBaseTransport] = {}

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return _context(self._environment)

    async def answer(self, asked: Asked) -> Answer:
        """The answer; its body is still to be read.

        Raises:
            ProxyUnusable: the environment names a proxy that cannot be used.
            httpx.TransportError: there is no answer.
        """
        proxy = self._proxy
        address = None
        if proxy is None:
            address = self._environment.proxy(asked.scheme, asked.host, asked.port)
            if address is None:
                return await self._direct.answer(asked)
        if address not in self._proxied:
            self._proxied[address] = self._transport(proxy or httpx.Proxy(address or ""))
        request = httpx.Request(
            "GET",
            asked.url,
            headers=asked.headers,
            extensions={"timeout": self._timeout.as_dict()},
        )
        response = await self._proxied[address].handle_async_request(request)
        assert isinstance(response.stream, httpx.AsyncByteStream)
        return Answer(
            asked.url, response.status_code, named(response.headers.raw), response.stream, None
        )

    def _transport(self, proxy: httpx.Proxy) -> httpx.AsyncBaseTransport:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._connections)
        return httpx.AsyncHTTPTransport(
            verify=self._context, trust_env=False, limits=limits, proxy=proxy
        )

    async def aclose(self) -> None:
        """Close all idle connections."""
        await self._direct.aclose()
        for transport in self._proxied.values():
            await transport.aclose()


def _context(environment: Environment) -> ssl.SSLContext:
    path = environment.certificates
    if path is None:
        return httpx.create_ssl_context(trust_env=False)
    if path.is_dir():
        return ssl.create_default_context(capath=path)
    return ssl.create_default_context(cafile=path)


def _proxy(scheme: str, host: str, port: int, user: str, password: str) -> httpx.Proxy:
    # The proxy looks up names, so that nobody else learns them.
    address = f"[{host}]" if ":" in host else host
    return httpx.Proxy(f"{scheme}://{address}:{port}", auth=(user, password) if user else None)
