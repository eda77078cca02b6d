"""The checks that every request passes before its route, and reading of its body."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grokfetch.serving.fields import Refused
from grokfetch.serving.metrics import Metrics
from grokfetch.serving.responses import refusal
from grokfetch.units import seconds_text

__all__ = ["BODY_S", "LARGEST_BODY", "OPEN", "CrossOrigin", "Gate", "read_json", "read_object"]

LARGEST_BODY = 4 * 1024 * 1024
"""Limit in bytes of a request; a full context of token ids takes some 60 kB."""

BODY_S = 60.0
"""Timeout in seconds for a request's body."""

OPEN = {"/", "/health", "/metrics"}
"""Paths that need no key."""


class Gate:
    """Passes on requests that are well formed and have the key; counts and logs all.

    A slash at the end of a path is removed, because not all clients write it.

    Args:
        app: the application behind the gate.
        metrics: counts responses by path and status.
        paths: the paths that are counted by name; all others are "other".
        key: bearer token that clients must send; None for none.
        log: called with a line for each response; None for no log.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        paths: set[str],
        key: str | None,
        log: Callable[[str], object] | None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths
        self._key = key
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = {**scope, "path": scope["path"].rstrip("/") or "/"}
        start, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.requests.labels(path, status).inc()
            await send(message)

        try:
            await self._checked(scope)(scope, receive, counted)
        finally:
            if self._log is not None:
                self._log(_line(scope, status, time.monotonic() - start))

    def _checked(self, scope: Scope) -> ASGIApp:
        """What answers a request: the application, or a refusal."""
        headers = dict(scope["headers"])
        try:
            _check_framing(headers)
            if self._key is not None and scope["path"] not in OPEN:
                _check_key(headers, self._key)
        except Refused as error:
            return refusal(error)
        return self._app


class CrossOrigin(CORSMiddleware):
    """Answers preflight requests of browsers, outside the gate."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on; badly framed requests go to the gate, which refuses them."""
        if scope["type"] == "http":
            try:
                _check_framing(dict(scope["headers"]))
            except Refused:
                await self.app(scope, receive, send)
                return
        await super().__call__(scope, receive, send)


def _check_framing(headers: Mapping[bytes, bytes]) -> None:
    """Refuse what a proxy could have parsed differently (RFC 9112, 6.1; RFC 9110, 8.4)."""
    if b"content-length" in headers and b"transfer-encoding" in headers:
        raise Refused(
            "a request must not have both Content-Length and Transfer-Encoding",
            code="ambiguous_length",
        )
    encoding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if encoding.strip().lower() not in {"", "identity"}:
        raise Refused(
            f"the body is compressed ({encoding:.40}), which this server does not support",
            code="unsupported_encoding",
            status=415,
        )


def _check_key(headers: Mapping[bytes, bytes], key: str) -> None:
    scheme, _, credentials = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(credentials.strip(), key.encode()):
        raise Refused("no valid API key", code="invalid_api_key", status=401)


def _line(scope: Scope, status: int, seconds: float) -> str:
    """A line for the log; what a client wrote is quoted where it is not printable."""
    client = scope.get("client")
    path = scope["path"].encode("unicode_escape").decode()
    return (
        f"{time.strftime('%Y-%m-%d %H:%M:%S')} {client[0] if client else '-'} "
        f"{scope['method']} {path:.200} {status or 'no answer'} {seconds_text(seconds)}"
    )


async def read_json(request: Request) -> object:
    """The JSON of a request.

    Raises:
        Refused: the body is not JSON, too large, or does not arrive within `BODY_S`.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                size += len(part)
                if size > LARGEST_BODY:
                    raise Refused(
                        f"the body is larger than {LARGEST_BODY >> 20} MiB",
                        code="body_too_large",
                        status=413,
                    )
                parts.append(part)
    except TimeoutError:
        raise Refused(
            f"the body did not arrive within {BODY_S:g} s", code="body_too_slow", status=408
        ) from None
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError):
        raise Refused("the body is not valid JSON", code="invalid_json") from None


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object of a request.

    Raises:
        Refused: as `read_json`, or it is something else.
    """
    body = await read_json(request)
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    return body
