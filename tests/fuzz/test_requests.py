"""Whatever a client sends: each request is answered as HTTP wants it, and every connection ends.

Raw bytes (`support.raw_requests`) go to the protocol and the application that serve, without a
socket, in time that passes at once; the model is an echo, made of what the real one would be given.
"""

from __future__ import annotations

import contextlib
import json
import logging

import pytest
from support.fuzzing import try_a_few, try_for_a_while
from support.raw_requests import MARKS, Echo, Endpoint, answers, check_body
from support.serving import SERVED, Letters
from support.virtual_time import Clock

from grokfetch.commands.serve import Jobs
from grokfetch.serving import gate
from grokfetch.serving.app import Access, application
from grokfetch.serving.server import Server
from grokfetch.serving.worker import Worker

KEY = "sesame"
LARGEST_BODY = 20_000
MOST_S = 3600.0
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
    CHUNKED.replace(b"10\r\n", b"10\r\n<<endless>>"),
]


GOOD = request("POST", "/v1/completions", BODY, "Connection: close")


class Notebook(logging.Handler):
    """Errors that are logged, which are finds."""

    def __init__(self):
        super().__init__(logging.ERROR)
        self.errors = []

    def emit(self, record):
        self.errors.append(logging.Formatter().format(record))


@pytest.fixture
def attempt(monkeypatch):
    """Says bytes to a server, and checks all promises."""
    monkeypatch.setattr(gate, "LARGEST_BODY", LARGEST_BODY)
    notebook, clock, echo = Notebook(), Clock(), Echo(SERVED.vocabulary)
    worker = Worker(Jobs(echo), SERVED.slots, 2)
    clock.working = lambda: bool(worker.texts)
    access = Access(KEY, ("http://a",), log=lambda line: line)
    app = application(worker, SERVED, Letters(), access)
    methods = []

    async def noted(scope, receive, send):
        methods.append(scope["method"])
        await app(scope, receive, send)

    config = Server(app, lambda _: None, "golden").config
    config.load()
    config.loaded_app = noted
    endpoint = Endpoint(config, config.http)

    def said(text):
        methods.clear()
        with clock.most(MOST_S):
            return loop.run_until_complete(endpoint.converse(text))

    def attempt(text):
        told = said(text)
        broken = any(mark in text for mark in (b"<<reset>>", b"<<end>>"))
        check(told, methods, broken=broken)
        after = said(GOOD)
        ((status, _, body),) = answers(after, methods)
        assert status == 200
        assert json.loads(body)["usage"]["completion_tokens"] == 3
        assert not worker.texts
        assert not echo.jobs
        assert not notebook.errors, "\n".join(notebook.errors)

    async def start():
        worker.start()

    with contextlib.closing(clock.loop()) as loop:
        loop.set_exception_handler(lambda _, context: notebook.errors.append(str(context)))
        loop.run_until_complete(start())
        # Uvicorn's are not handed on to the others.
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


def check(told, methods, *, broken):
    """Every request is answered, and every answer is one that a client can understand."""
    found = list(answers(told, methods))
    assert broken or len(methods) <= len(found) <= len(methods) + 1
    for index, (status, headers, body) in enumerate(found):
        assert status in STATUSES
        if not broken or index + 1 < len(found):
            head = methods[index : index + 1] == ["HEAD"]
            check_body(headers, body, head=head)
        if headers.get(b"connection") == b"close":
            assert index + 1 == len(found)


def test_well_formed_requests_are_answered_as_such(attempt):
    for seed in SEEDS:
        attempt(seed)


def test_treacherous_requests_and_a_few_variants_do_no_harm(attempt):
    try_a_few(attempt, "request", SEEDS, tokens=MARKS)


@pytest.mark.slow
def test_half_a_minute_of_new_requests_does_no_harm(attempt, tmp_path):
    try_for_a_while(attempt, "request", SEEDS, tmp_path, tokens=MARKS)
