"""A response while it is made: whole or in events, and what happens when its client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from grokfetch.serving.metrics import Metrics
from grokfetch.serving.reply import Reply, event
from grokfetch.serving.responses import MODEL_FAILED
from grokfetch.serving.worker import Failed, Texts

__all__ = ["Following", "Stream", "unless_gone"]

T = TypeVar("T")


class Following:
    """Makes a reply from the emissions of its texts, and frees their slots at the end."""

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
            yield event(MODEL_FAILED)
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


class Stream(StreamingResponse):
    """A response in events; a client that goes away ends it at once."""

    def __init__(self, following: Following, *, usage: bool) -> None:
        self._following = following
        super().__init__(
            following.events(usage=usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, and free the slots."""
        # Even if the client leaves before the first event.
        with contextlib.closing(self._following):
            await super().__call__(scope, receive, send)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of some work, cancelled when the client goes away.

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
