"""JSON responses, and errors of every kind in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from grokfetch.serving.fields import Refused
from grokfetch.serving.reply import error_body
from grokfetch.serving.worker import Busy, Failed

__all__ = ["HANDLERS", "MODEL_FAILED", "as_json", "refusal"]

INVALID = "invalid_request_error"

CLOSING = {"ambiguous_length", "body_too_slow"}
"""Codes of refusals after which it is unknown where the next request begins."""

MODEL_FAILED = error_body("the model could not go on; the server's log says why", "server_error")


def as_json(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """A response of JSON."""
    return Response(json.dumps(content), status, headers, "application/json")


def refusal(error: Refused) -> Response:
    """The response to a request that cannot be served."""
    headers = {"Connection": "close"} if error.code in CLOSING else None
    body = error_body(error.message, INVALID, error.param, error.code)
    return as_json(body, error.status, headers)


async def _refused(_: Request, error: Refused) -> Response:
    return refusal(error)


async def _busy(_: Request, error: Busy) -> Response:
    message = f"the queue is full, {error}"
    headers = {"Retry-After": str(error.retry_after)}
    return as_json(error_body(message, "rate_limit_error", None, "queue_full"), 429, headers)


async def _failed(_: Request, __: Exception) -> Response:
    return as_json(MODEL_FAILED, 500)


async def _gone(_: Request, __: ClientDisconnect) -> Response:
    # Nobody reads it; the status is what nginx logs for this.
    return Response(status_code=499)


async def _http(_: Request, error: HTTPException) -> Response:
    detail = "no such path; GET / lists all" if error.status_code == 404 else error.detail
    return as_json(error_body(detail, INVALID), error.status_code, error.headers)


async def _unforeseen(_: Request, __: Exception) -> Response:
    return as_json(error_body("an unforeseen error; the server's log has it", "server_error"), 500)


HANDLERS: Mapping[Any, Callable[[Request, Any], Awaitable[Response]]] = {
    Refused: _refused,
    Busy: _busy,
    Failed: _failed,
    ClientDisconnect: _gone,
    HTTPException: _http,
    Exception: _unforeseen,
}
"""The handler of each exception."""
