"""The routes of the server and what they answer; errors of every kind in OpenAI's form."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from grokfetch.serving.metrics import Metrics
from grokfetch.serving.model import Served, Words
from grokfetch.serving.reply import Reply, error_body, event
from grokfetch.serving.requests import Completion, Refused, read_completion
from grokfetch.serving.text import Numbers
from grokfetch.serving.worker import Busy, Failed, Texts, Worker

__all__ = ["LARGEST_BODY", "application"]

LARGEST_BODY = 4 * 1024 * 1024
"""Bytes of a request; a full context of token ids takes some 60 kB."""

INVALID = "invalid_request_error"

T = TypeVar("T")


def application(
    worker: Worker, served: Served, words: Words | None, api_key: str | None
) -> Starlette:
    """The server as an ASGI application; its lifespan is that of the worker's thread.

    Args:
        worker: over the model.
        served: the model as clients see it.
        words: the tokenizer; None where only token ids are spoken.
        api_key: what clients must send as a bearer token; None for nothing.
    """
    metrics = Metrics(worker, served.slots)
    desk = _Desk(worker, served, words, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    async def health(_: Request) -> Response:
        return _json({"status": "ok", "slots": served.slots, "slots_in_use": worker.working})

    async def numbers(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    locked = [
        Route("/v1/models", desk.models, methods=["GET"]),
        Route("/v1/models/{name:path}", desk.model, methods=["GET"]),
        Route("/v1/completions", desk.completions, methods=["POST"]),
        Route("/v1/chat/completions", desk.chat, methods=["POST"]),
        Route("/tokenizer_info", desk.tokenizer_info, methods=["GET"]),
        Route("/tokenize", desk.tokenize, methods=["POST"]),
        Route("/detokenize", desk.detokenize, methods=["POST"]),
    ]
    if api_key is not None:
        for route in locked:
            route.app = _locked(route.app, api_key)
    app = Starlette(
        routes=[*locked, Route("/health", health), Route("/metrics", numbers)],
        lifespan=lifespan,
        exception_handlers=_HANDLERS,
    )
    app.add_middleware(_Counted, metrics=metrics, paths={route.path for route in locked})
    return app


class _Desk:
    """Answers requests about the model."""

    def __init__(
        self, worker: Worker, served: Served, words: Words | None, metrics: Metrics
    ) -> None:
        self._worker = worker
        self._served = served
        self._words: Words = words or Numbers()
        self._metrics = metrics
        self._created = int(time.time())

    async def models(self, _: Request) -> Response:
        """The one model there is."""
        return _json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """A model by its id."""
        name = request.path_params["name"]
        if name != self._served.name:
            raise Refused(
                f"there is no model {name!r:.80}", param="model", code="model_not_found", status=404
            )
        return _json(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "grokfetch",
            "max_model_len": self._served.context,
        }

    async def chat(self, _: Request) -> Response:
        """Refused: nobody has taught this model to chat."""
        raise Refused(
            f"{self._served.name} is a base model: it continues a text and knows no chat; "
            "use /v1/completions",
            code="model_not_chat",
        )

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        start = time.monotonic()
        wanted = read_completion(await _body(request), self._served)
        if wanted.stop and isinstance(self._words, Numbers):
            raise Refused("stop needs a tokenizer, and this server has none", param="stop")
        self._check_count(wanted)
        encoded = await asyncio.to_thread(self._encoded, wanted)
        texts = self._worker.open(wanted.generations(encoded, self._served))
        prompt_tokens = sum(map(len, encoded))
        self._metrics.prompt_tokens.inc(prompt_tokens)
        reply = Reply(wanted, prompt_tokens, self._served, self._words)
        following = _Following(texts, reply, self._metrics, start)
        if wanted.stream:
            return _Stream(following, wanted)
        with contextlib.closing(following):
            return _json(await _unless_gone(request, following.whole()))

    def _check_count(self, wanted: Completion) -> None:
        """Refuse what would find no room however long its client waited."""
        if len(wanted.prompts) * wanted.n > self._worker.capacity:
            raise Refused(
                f"this server takes at most {self._worker.capacity} texts at once",
                param="n" if wanted.n > 1 else "prompt",
            )

    def _encoded(self, wanted: Completion) -> list[tuple[int, ...]]:
        return [
            tuple(self._words.encode(prompt)) if isinstance(prompt, str) else prompt
            for prompt in wanted.prompts
        ]

    async def tokenizer_info(self, _: Request) -> Response:
        """What vLLM's clients ask, lm-evaluation-harness among them."""
        return _json({"eos_token": self._real_words().piece(self._served.eos), "bos_token": None})

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text; the name of the end of a sequence stands for its id."""
        words, text = self._real_words(), (await _object(request)).get("prompt")
        if not isinstance(text, str):
            raise Refused("prompt must be a text", param="prompt")
        eos = self._served.eos
        tokens = [eos] if text == words.piece(eos) else await asyncio.to_thread(words.encode, text)
        return _json(
            {"tokens": tokens, "count": len(tokens), "max_model_len": self._served.context}
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        words, tokens = self._real_words(), (await _object(request)).get("tokens")
        if not isinstance(tokens, list) or not all(
            type(token) is int and 0 <= token < self._served.vocabulary for token in tokens
        ):
            raise Refused("tokens must be a list of token ids", param="tokens")
        stream = words.stream()
        text = "".join(stream.push(token) for token in tokens) + stream.finish()
        return _json({"prompt": text.removeprefix(" ")})

    def _real_words(self) -> Words:
        if isinstance(self._words, Numbers):
            raise Refused("this server has no tokenizer", code="tokenizer_missing", status=404)
        return self._words


class _Following:
    """Makes a reply of what becomes known of its texts, and frees their slots in the end."""

    def __init__(self, texts: Texts, reply: Reply, metrics: Metrics, start: float) -> None:
        self._texts = texts
        self._reply = reply
        self._metrics = metrics
        self._start = start
        self._done = False

    async def whole(self) -> dict[str, Any]:
        """The response in one piece."""
        async for index, piece in self._pieces():
            self._reply.add(index, piece)
        return self._reply.whole()

    async def events(self, *, usage: bool) -> AsyncIterator[bytes]:
        """The response as server-sent events."""
        try:
            async for index, piece in self._pieces():
                if piece.text or piece.finish_reason or piece.logprobs:
                    yield event(self._reply.chunk(index, piece))
            if usage:
                yield event(self._reply.last_chunk())
        except Failed:
            yield event(_MODEL_FAILED)
        yield event("[DONE]")

    async def _pieces(self) -> AsyncIterator[tuple[int, Any]]:
        first = True
        async for index, emission in self._texts:
            if first and emission.token is not None:
                first = False
                self._metrics.first_token.observe(time.monotonic() - self._start)
            piece = self._reply.take(index, emission)
            if piece.finish_reason is not None:
                self._texts.drop(index)
            yield index, piece
        self._done = True

    def close(self) -> None:
        """Free the slots, and count."""
        self._texts.close()
        self._metrics.generated_tokens.inc(self._reply.generated)
        self._metrics.duration.observe(time.monotonic() - self._start)
        if not self._done:
            self._metrics.disconnects.inc()


class _Stream(StreamingResponse):
    """A response in events; a client that goes away ends it at once."""

    def __init__(self, following: _Following, wanted: Completion) -> None:
        self._following = following
        super().__init__(
            following.events(usage=wanted.include_usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Even if the client has gone before the first event.
        with contextlib.closing(self._following):
            await super().__call__(scope, receive, send)


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, given up when the client goes away.

    Raises:
        ClientDisconnect: it has.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _body(request: Request) -> object:
    """The JSON of a request.

    Raises:
        Refused: there is none, or too much.
    """
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST_BODY:
            raise Refused(
                f"the body is larger than {LARGEST_BODY} bytes", code="body_too_large", status=413
            )
        parts.append(part)
    try:
        return json.loads(b"".join(parts))
    except (ValueError, RecursionError):
        raise Refused("the body is no JSON", code="invalid_json") from None


async def _object(request: Request) -> dict[str, Any]:
    body = await _body(request)
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    return body


def _locked(app: ASGIApp, key: str) -> ASGIApp:
    """The same for clients that know the key."""

    async def checked(scope: Scope, receive: Receive, send: Send) -> None:
        header = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, given = header.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), key.encode()):
            raise Refused("no valid API key", code="invalid_api_key", status=401)
        await app(scope, receive, send)

    return checked


class _Counted:
    """Counts responses by path and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: set[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = scope["path"] if scope["path"] in self._paths else "other"
                self._metrics.requests.labels(path, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counted if scope["type"] == "http" else send)


def _json(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    return Response(json.dumps(content), status, headers, "application/json")


_MODEL_FAILED = error_body("the model could not go on; the server's log says why", "server_error")

Handler = Callable[[Request, Any], Awaitable[Response]]


async def _refused(_: Request, error: Refused) -> Response:
    return _json(error_body(error.message, INVALID, error.param, error.code), error.status)


async def _busy(_: Request, error: Busy) -> Response:
    message = f"the queue is full, {error}"
    headers = {"Retry-After": str(error.retry_after)}
    return _json(error_body(message, "rate_limit_error", None, "queue_full"), 429, headers)


async def _failed(_: Request, __: Exception) -> Response:
    return _json(_MODEL_FAILED, 500)


async def _gone(_: Request, __: ClientDisconnect) -> Response:
    # Nobody reads it; the status is what nginx logs for this.
    return Response(status_code=499)


async def _http(_: Request, error: HTTPException) -> Response:
    return _json(error_body(error.detail, INVALID), error.status_code, error.headers)


async def _unforeseen(_: Request, __: Exception) -> Response:
    return _json(error_body("an unforeseen error; the server's log has it", "server_error"), 500)


_HANDLERS: Mapping[Any, Handler] = {
    Refused: _refused,
    Busy: _busy,
    Failed: _failed,
    ClientDisconnect: _gone,
    HTTPException: _http,
    Exception: _unforeseen,
}
