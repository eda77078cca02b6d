"""The routes of the server and what they answer."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from grokfetch.serving.fields import Refused, as_integer, is_text
from grokfetch.serving.following import Following, Stream, unless_gone
from grokfetch.serving.gate import OPEN, CrossOrigin, Gate, read_json, read_object
from grokfetch.serving.metrics import Metrics
from grokfetch.serving.model import Served, Tokenizer
from grokfetch.serving.reply import Reply
from grokfetch.serving.requests import Completion, read_completion
from grokfetch.serving.responses import HANDLERS, as_json
from grokfetch.serving.text import Numbers, decoded
from grokfetch.serving.worker import Worker

__all__ = ["Access", "application"]


@dataclasses.dataclass(frozen=True, slots=True)
class Access:
    """Who may use the server, and where its responses are logged.

    key: bearer token that clients must send; None for none. origins: of web pages whose scripts
    may send requests; "*" for all. log: called with a line for each response; None for no log.
    """

    key: str | None = None
    origins: tuple[str, ...] = ()
    log: Callable[[str], object] | None = None


def application(
    worker: Worker, served: Served, tokenizer: Tokenizer | None, access: Access | None = None
) -> Starlette:
    """The server as an ASGI application; the worker's thread runs during its lifespan.

    Args:
        worker: runs the model.
        served: the model as clients see it.
        tokenizer: the tokenizer; None if clients must send token ids.
        access: who may use it; None for everybody.
    """
    access = access or Access()
    metrics = Metrics(worker, served.slots)
    desk = _Desk(worker, served, tokenizer, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        worker.start()
        yield
        await worker.stop()

    async def health(_: Request) -> Response:
        return as_json({"status": "ok", "slots": served.slots, "slots_in_use": worker.working})

    async def numbers(_: Request) -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def index(_: Request) -> Response:
        listed = [f"{next(iter(methods - {'HEAD'}))} {path}" for path, methods in ways]
        return as_json({"model": served.name, "routes": listed})

    routes = [
        Route("/", index),
        Route("/v1/models", desk.models, methods=["GET"]),
        Route("/v1/models/{name:path}", desk.model, methods=["GET"]),
        Route("/v1/completions", desk.completions, methods=["POST"]),
        Route("/v1/chat/completions", desk.chat, methods=["POST"]),
        Route("/tokenizer_info", desk.tokenizer_info, methods=["GET"]),
        Route("/tokenize", desk.tokenize, methods=["POST"]),
        Route("/detokenize", desk.detokenize, methods=["POST"]),
        Route("/health", health),
        Route("/metrics", numbers),
    ]
    ways = [(route.path.replace(":path", ""), route.methods or set()) for route in routes]
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=HANDLERS)
    app.add_middleware(
        Gate,
        metrics=metrics,
        paths={route.path for route in routes} - OPEN,
        key=access.key,
        log=access.log,
    )
    if access.origins:
        # Outside the gate, because a browser's preflight request has no key.
        app.add_middleware(
            CrossOrigin,
            allow_origins=access.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    return app


class _Desk:
    """Answers requests about the model."""

    def __init__(
        self, worker: Worker, served: Served, tokenizer: Tokenizer | None, metrics: Metrics
    ) -> None:
        self._worker = worker
        self._served = served
        self._tokenizer: Tokenizer = tokenizer or Numbers()
        self._metrics = metrics
        self._created = int(time.time())

    async def models(self, _: Request) -> Response:
        """The list of models, which has one."""
        return as_json({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        """A model by its id."""
        name = request.path_params["name"]
        if name != self._served.name:
            raise Refused(
                f"there is no model {name!r:.80}", param="model", code="model_not_found", status=404
            )
        return as_json(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._created,
            "owned_by": "grokfetch",
            "max_model_len": self._served.context,
        }

    async def chat(self, _: Request) -> Response:
        """Refused: a base model does not chat."""
        raise Refused(
            f"{self._served.name} is a base model: it continues text and does not chat; "
            "use /v1/completions",
            code="model_not_chat",
        )

    async def completions(self, request: Request) -> Response:
        """Continue prompts."""
        start = time.monotonic()
        wanted = read_completion(await read_json(request), self._served)
        if wanted.stop and isinstance(self._tokenizer, Numbers):
            raise Refused("stop needs a tokenizer, and this server has none", param="stop")
        self._check_count(wanted)
        encoded = await asyncio.to_thread(self._encoded, wanted)
        texts = self._worker.open(wanted.generations(encoded, self._served))
        self._metrics.prompt_tokens.inc(sum(map(len, encoded)))
        reply = Reply(wanted, encoded, self._served, self._tokenizer)
        following = Following(texts, reply, self._metrics, start)
        if wanted.stream:
            return Stream(following, usage=wanted.include_usage)
        with contextlib.closing(following):
            return as_json(await unless_gone(request, following.whole()))

    def _check_count(self, wanted: Completion) -> None:
        """Refuse a request that has more texts than the server can ever take at once."""
        if len(wanted.prompts) * wanted.candidates > self._worker.capacity:
            raise Refused(
                f"this server takes at most {self._worker.capacity} texts at once",
                param="n" if wanted.candidates > 1 else "prompt",
            )

    def _encoded(self, wanted: Completion) -> list[tuple[int, ...]]:
        return [
            wanted.truncated(
                tuple(self._tokenizer.encode(prompt)) if isinstance(prompt, str) else prompt,
                self._served,
            )
            for prompt in wanted.prompts
        ]

    async def tokenizer_info(self, _: Request) -> Response:
        """Answers vLLM's clients, such as lm-evaluation-harness."""
        return as_json(
            {"eos_token": self._own_tokenizer().piece(self._served.eos), "bos_token": None}
        )

    async def tokenize(self, request: Request) -> Response:
        """Token ids of a text; the name of the end of a sequence stands for its id."""
        tokenizer, text = self._own_tokenizer(), (await read_object(request)).get("prompt")
        if not isinstance(text, str) or not is_text(text):
            raise Refused(
                "prompt must not contain half a character (a lone surrogate)", param="prompt"
            )
        eos = self._served.eos
        tokens = (
            [eos]
            if text == tokenizer.piece(eos)
            else await asyncio.to_thread(tokenizer.encode, text)
        )
        return as_json(
            {"tokens": tokens, "count": len(tokens), "max_model_len": self._served.context}
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of token ids."""
        tokenizer, tokens_given = self._own_tokenizer(), (await read_object(request)).get("tokens")
        if not isinstance(tokens_given, list):
            raise Refused("tokens must be a list of token ids", param="tokens")
        tokens = [token for token in map(as_integer, tokens_given) if token is not None]
        if len(tokens) < len(tokens_given) or not all(
            0 <= one < self._served.vocabulary for one in tokens
        ):
            raise Refused(
                f"tokens must be a list of token ids from 0 to {self._served.vocabulary - 1:,}",
                param="tokens",
            )
        return as_json({"prompt": decoded(tokenizer, tokens)})

    def _own_tokenizer(self) -> Tokenizer:
        if isinstance(self._tokenizer, Numbers):
            raise Refused("this server has no tokenizer", code="tokenizer_missing", status=404)
        return self._tokenizer
