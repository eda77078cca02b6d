"""The way of a request: by the proxy that is meant for its host, or directly."""

from __future__ import annotations

import ssl
from functools import cached_property

import httpx

from grokfetch.fetch.mirror.direct import Direct
from grokfetch.fetch.mirror.environment import Environment

__all__ = ["ProxyServer", "Routes"]

ProxyServer = tuple[str, str, int, str, str]
"""Scheme ("socks5" or "http"), host, port, user and password of a proxy."""


class Routes(httpx.AsyncBaseTransport):
    """Sends each request by the proxy that is meant for its host, or by none.

    Args:
        connections: how many at most are kept open.
        environment: proxies and certificates.
        proxy: through which everything goes, whatever the environment says.
    """

    def __init__(
        self, connections: int, environment: Environment, proxy: ProxyServer | None
    ) -> None:
        self._connections = connections
        self._environment = environment
        self._proxy = None if proxy is None else _proxy(*proxy)
        self._transports: dict[str | None, httpx.AsyncBaseTransport] = {}

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return _context(self._environment)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """The answer, its body still to be read.

        Raises:
            ProxyUnusable: the environment names a proxy that cannot be used.
            httpx.TransportError: there is no answer.
        """
        url = request.url
        address = None
        if self._proxy is None:
            port = url.port or (443 if url.scheme == "https" else 80)
            address = self._environment.proxy(url.scheme, url.host, port)
        if address not in self._transports:
            self._transports[address] = self._transport(address)
        return await self._transports[address].handle_async_request(request)

    def _transport(self, address: str | None) -> httpx.AsyncBaseTransport:
        proxy = self._proxy if address is None else httpx.Proxy(address)
        if proxy is None:
            return Direct(self._connections, lambda: self._context)
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=self._connections)
        return httpx.AsyncHTTPTransport(
            verify=self._context, trust_env=False, limits=limits, proxy=proxy
        )

    async def aclose(self) -> None:
        """Close all connections of which nothing is asked."""
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
