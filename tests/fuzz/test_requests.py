"""Whatever a client sends: each request is answered as HTTP wants it, and every connection ends.

Raw bytes (`support.raw_requests`) go to the protocol and the application that serve, without a
socket, in time that passes at once; the model is an echo, made of what the real one would be given.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import httpx
import pytest
from support import golden
from support.fuzzing import CORPUS, SECONDS, try_a_few, try_for_a_while
from support.patience import wait_for
from support.raw_requests import MARKS, MOST_HELD, Echo, Endpoint, answers, check_body, parts
from support.serving import DEADLINE_S, SERVED, Letters, serving
from support.virtual_time import Clock

from grokfetch.commands.serve import Jobs
from grokfetch.serving import connection, gate
from grokfetch.serving import server as listening
from grokfetch.serving.app import Access, application
from grokfetch.serving.server import Server
from grokfetch.serving.worker import Worker
from loader.inference.batching import Batch

KEY = "sesame"
LARGEST_BODY = 20_000
MOST_S = 3600.0
PAUSES = 1000
STEPS = 2000
STATUSES = {200, 400, 401, 404, 405, 408, 413, 415, 429, 499}


def request(method, path, body=None, *headers):
    lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEY}", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", "Content-Length: <<length>>"]
    head = "\r\n".join(lines).encode() + b"\r\n\r\n"
    return head if body is None else head + json.dumps(body).encode()


BODY = {"model": "golden", "prompt": [5, 6], "max_tokens": 3, "temperature": 0.5, "stop": ["x"]}
MANY = BODY | {"prompt": ["\u4e05\u4e06", "\u4e07"], "n": 2, "logprobs": 3, "echo": True, "seed": 7}
STREAM = BODY | {"stream": True, "stream_options": {"include_usage": True}, "top_k": 5}
OTHERS = BODY | {"logit_bias": {"5": -3.0, "511": 1}, "min_tokens": 1, "best_of": 2, "min_p": 0.1}
LONG = STREAM | {"max_tokens": 100}
LARGE = {"prompt": [5], "max_tokens": 100, "n": 4, "logprobs": 5, "echo": True}
CHAT = {"model": "golden", "messages": [{"role": "user", "content": "hello"}]}
CHUNKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\n"
    b'Transfer-Encoding: chunked\r\n\r\n10\r\n{"prompt": [5, 6\r\n<<next>>2\r\n]}\r\n0\r\n\r\n'
)
SEEDS = [
    request("POST", "/v1/completions", BODY),
    request("POST", "/v1/completions", MANY) + b"<<end>>",
    request("POST", "/v1/completions", STREAM) + b"<<next>>" + request("GET", "/health"),
    request("POST", "/v1/completions", STREAM, "Connection: close"),
    request("POST", "/v1/completions", OTHERS, "Expect: 100-continue"),
    request("POST", "/v1/completions", BODY)[:-9] + b"<<silence>>",
    request("POST", "/v1/completions", BODY)[:-9] + b"<<reset>>",
    request("POST", "/v1/chat/completions", CHAT) + request("GET", "/v1/models/golden"),
    request("POST", "/tokenize", {"prompt": "\u4e05"})
    + request("POST", "/detokenize", {"tokens": [5, 6]}),
    request("GET", "/metrics") + request("HEAD", "/") + request("OPTIONS", "/v1/models", None),
    request(
        "OPTIONS", "/v1/models", None, "Origin: http://a", "Access-Control-Request-Method: GET"
    ),
    request("GET", "/v1/models/%ff%00?a=%", None, "Upgrade: websocket", "Connection: Upgrade"),
    request("GET", "/%2e%2e//x", None, "Cookie: " + "a=b; " * 50 + "<<endless>>"),
    request("GET", "/health")[:-4] + b"\r\nX: y<<slowly>>\r\nZ: y\r\n\r\n",
    request("PUT", "/nowhere", [1] * 500)[:-100] + b"<<slowly>>",
    CHUNKED + CHUNKED + request("GET", "/v1/models"),
    CHUNKED.replace(b"10\r\n", b"<<next>>10\r\n0123456789abcdef\r\n<<endless>>10\r\n"),
    request("POST", "/v1/completions", STREAM | {"max_tokens": 100})
    + b"<<next>>" * 9
    + b"<<reset>>",
    b"<<deaf>>" + request("POST", "/v1/completions", LARGE | {"stream": True}),
    b"<<deaf>>" + request("POST", "/v1/completions", LARGE) + request("GET", "/health"),
    b"<<deaf>>" + request("GET", "/metrics", None, "X: " + "y" * 400) + b"<<endless>>",
    b"<<sips>>" + request("POST", "/v1/completions", LARGE) + request("GET", "/health"),
    b"<<sips>>" + request("POST", "/v1/completions", LARGE | {"stream": True}),
]


GOOD = request("POST", "/v1/completions", BODY, "Connection: close")


class Notebook(logging.Handler):
    """Collects logged errors, which are failures."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.errors = []

    def emit(self, record):
        self.errors.append(logging.Formatter().format(record))


@pytest.fixture
def attempt(monkeypatch):
    """Sends bytes to a server, and checks all promises."""
    monkeypatch.setattr(gate, "LARGEST_BODY", LARGEST_BODY)
    notebook, clock, echo = Notebook(), Clock(), Echo(SERVED.vocabulary)
    worker = Worker(Jobs(echo), SERVED.slots, 2)
    clock.working = lambda: bool(worker.texts)
    access = Access(KEY, ("http://a",), log=lambda line: line)
    app = application(worker, SERVED, Letters(), access)
    scopes = []

    async def noted(scope, receive, send):
        scopes.append(scope)
        size = 0

        async def counted():
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            assert size <= LARGEST_BODY + MOST_HELD
            return message

        await app(scope, counted, send)

    config = Server(app, lambda _: None, "golden").config
    config.load()
    config.loaded_app = noted
    endpoint = Endpoint(config, config.http)

    def said(text):
        scopes.clear()
        echo.pauses, echo.steps = PAUSES, STEPS
        with clock.most(MOST_S):
            return loop.run_until_complete(endpoint.converse(text))

    def attempt(text):
        told = said(text)
        broken = endpoint.left or any(mark in text for mark in (b"<<reset>>", b"<<end>>"))
        check(told, scopes, broken=broken)
        assert not worker.texts
        after = said(GOOD)
        ((status, _, body),) = answers(after, ["POST"])
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] == 3
        assert not echo.jobs
        assert not notebook.errors, "\n".join(notebook.errors)

    async def start():
        worker.start()

    with contextlib.closing(clock.loop()) as loop:
        loop.set_exception_handler(lambda _, context: notebook.errors.append(str(context)))
        loop.run_until_complete(start())
        # Uvicorn's loggers do not pass records on to the root logger.
        loggers = [logging.getLogger(), logging.getLogger("uvicorn")]
        for logger in loggers:
            logger.addHandler(notebook)
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        try:
            yield attempt
        finally:
            for logger in loggers:
                logger.removeHandler(notebook)
            loop.run_until_complete(worker.stop())


def check(told, scopes, *, broken):
    """Check that every request is answered, in a way that a client can understand."""
    methods = [scope["method"] for scope in scopes]
    found = list(answers(told, methods, broken=broken))
    assert broken or len(scopes) <= len(found) <= len(scopes) + 1
    for index, (status, headers, body) in enumerate(found):
        assert status in STATUSES
        if not broken or index + 1 < len(found):
            check_body(headers, body, head=methods[index : index + 1] == ["HEAD"])
        names = dict(scopes[index]["headers"]).keys() if index < len(scopes) else set()
        ambiguous = {b"content-length", b"transfer-encoding"} <= names
        assert status >= 400 or not ambiguous
        if headers.get(b"connection") == b"close" or ambiguous:
            assert index + 1 == len(found)


def test_well_formed_requests_are_answered_as_such(attempt):
    for seed in SEEDS:
        attempt(seed)


def test_treacherous_requests_and_a_few_variants_do_no_harm(attempt):
    try_a_few(attempt, "request", SEEDS, few=150, tokens=MARKS)


@pytest.mark.slow
def test_half_a_minute_of_new_requests_does_no_harm(attempt, tmp_path):
    try_for_a_while(attempt, "request", SEEDS, tmp_path, tokens=MARKS)


def test_the_treacherous_requests_do_no_harm_on_real_sockets(monkeypatch):
    for module, name in (
        (connection, "HEADERS_S"),
        (connection, "UNREAD_S"),
        (listening, "KEEP_ALIVE_S"),
        (gate, "BODY_S"),
    ):
        monkeypatch.setattr(module, name, 0.5)
    monkeypatch.setattr(gate, "LARGEST_BODY", LARGEST_BODY)
    texts = SEEDS + [file.read_bytes() for file in sorted((CORPUS / "request").glob("*"))]
    with serving(Jobs(Echo(SERVED.vocabulary)), queue=100, key=KEY) as (url, worker):
        with ThreadPoolExecutor(len(texts)) as clients:
            for told in clients.map(partial(spoken, url), texts):
                assert b"HTTP/1.1 5" not in told
        assert spoken(url, GOOD).startswith(b"HTTP/1.1 200")
        wait_for(lambda: not worker.texts)


def spoken(url, text):
    """Everything that a server answers over a socket until the connection ends."""
    host, port = url.removeprefix("http://").split(":")
    told = b""
    with (
        socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection,
        # The server may have closed the connection already.
        contextlib.suppress(ConnectionError),
    ):
        for part in parts(text):
            if isinstance(part, bytes):
                connection.sendall(part)
            elif part == "reset":
                return told
            elif part == "end":
                connection.shutdown(socket.SHUT_WR)
        while part := connection.recv(65536):
            told += part
    return told


FIELDS = [
    *sorted(OTHERS.keys() - {"model"}),
    "logprobs",
    "n",
    "echo",
    "seed",
    "top_k",
    "top_p",
    "stream",
    "ignore_eos",
]
FIELDS += ["presence_penalty", "frequency_penalty", "repetition_penalty", "truncate_prompt_tokens"]
VALUES = [0, 1, 2, -1, 5, 0.01, -2.0, 100.0, 5e-324, 1e-7, 1e308, 16.0, 2**31, 2**32, 2**63 - 1]
VALUES += [
    -(2**63) + 1,
    None,
    True,
    [],
    [0],
    [511] * 120,
    [[1], [2, 3]],
    "",
    "\u4e05",
    ["", "\u4e06"],
]
VALUES += [["", "\u4e06"], {}, {"0": 100, "511": -100}, {"5": 1e-300}]
FEW, TINY = [0, 1, 2, 5], [0, 0.01, 1, 1e-7, 5e-324]
FITTING = {
    "echo": [True, False],
    "stream": [True, False],
    "ignore_eos": [True, False],
    "presence_penalty": [-2.0, 0, 0.01, 5e-324],
    "frequency_penalty": [2.0, 0, 0.01, 5e-324],
    "prompt": ["\u4e05", [0], [511] * 120, [[1], [2, 3]], ["\u4e07", "\u4e06"]],
    "logit_bias": [{}, {"0": 100, "511": -100}, {"5": 1e-300}, {"5": -3.0, "511": 1}],
    "temperature": [*TINY, 2.0],
    "min_p": TINY,
    "top_p": [0.01, 1, 1e-7, 5e-324],
    "top_k": [*FEW, -1, 511, 2**31 - 1],
    "repetition_penalty": [0.01, 1, 2, 1e-7],
    "max_tokens": FEW,
    "min_tokens": FEW,
    "logprobs": FEW,
    "truncate_prompt_tokens": [1, 2, 5, 100],
    "seed": [0, -1, 2**31, 2**63 - 1, -(2**63) + 1],
    "stop": ["\u4e05", ["\u4e06", "\u4e07\u4e05"]],
    "n": [1, 2],
    "best_of": [1, 2],
}
"""Allowed values, most of them at a limit."""


def bodies(dice):
    """A body that probably reaches the model, with values at the limits of what is allowed."""
    chosen = dice.choices(FIELDS, k=dice.randint(1, 6))
    wild = dice.random() < 0.2
    return BODY | {name: dice.choice(VALUES if wild else FITTING[name]) for name in chosen}


@pytest.mark.slow
def test_half_a_minute_of_new_bodies_fails_no_step_of_the_model():
    seed = time.time_ns()
    dice = random.Random(seed)
    deadline, statuses = time.monotonic() + SECONDS, Counter()
    batch = Batch(golden.engine(), SERVED.slots, chunk=16)
    with (
        serving(Jobs(batch), queue=100) as (url, worker),
        httpx.Client(base_url=url, timeout=DEADLINE_S) as client,
    ):
        while time.monotonic() < deadline:
            body = bodies(dice)
            answer = client.post("/v1/completions", json=body)
            statuses[answer.status_code] += 1
            assert answer.status_code in {200, 400, 429}, body
            assert "server_error" not in answer.text, body
            if answer.status_code == 200 and not body.get("stream"):
                answer.json()
        assert not worker.failures
    assert statuses[200]
    print(f"{statuses} of bodies, seed {seed}")  # noqa: T201
