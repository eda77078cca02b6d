"""What clients may leave open, write in odd ways, or never finish, sent over plain sockets."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time

import httpx
import pytest
from support.serving import DEADLINE_S, P1, Held, error, post, serving

from grokfetch.serving import connection, gate
from grokfetch.serving import server as listening


@pytest.fixture
def url():
    """A server over a model that answers everything at once with one token."""
    model = Held()
    for _ in range(50):
        model.steps.release()
    with serving(model) as (url, _):
        yield url


def speak(url, request, *, until_closed=False):
    """A server's answer to some bytes, up to the end of the connection or of the headers."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(request)
        told = b""
        while until_closed or b"\r\n\r\n" not in told:
            part = connection.recv(65536)
            if not part:
                break
            told += part
        return told


@pytest.mark.parametrize("path", ["/v1/models/", "/v1/models/golden/", "/health/", "/"])
def test_a_slash_at_the_end_of_a_path_is_none(url, path):
    assert httpx.get(url + path).status_code == 200
    assert httpx.head(url + path).status_code == 200
    assert httpx.head(url + path).content == b""


def test_openais_client_with_a_slash_too_many_is_answered(url):
    import openai

    body = {"prompt": P1, "temperature": 0}
    assert httpx.post(f"{url}/v1/completions/", json=body).status_code == 200
    with openai.OpenAI(base_url=f"{url}/v1/", api_key="none", max_retries=0) as client:
        assert client.completions.create(model="golden", prompt=P1).usage.completion_tokens == 1


def test_the_routes_are_listed_at_the_root(url):
    told = httpx.get(url).json()
    assert told["model"] == "golden"
    assert {"POST /v1/completions", "GET /v1/models", "GET /health"} <= set(told["routes"])


@pytest.mark.parametrize("encoding", ["gzip", "BR", "deflate, gzip"])
def test_a_compressed_body_is_refused_as_such(url, encoding):
    answer = httpx.post(
        f"{url}/v1/completions",
        content=gzip.compress(json.dumps({"prompt": P1}).encode()),
        headers={"Content-Encoding": encoding},
    )
    assert (answer.status_code, error(answer)["code"]) == (415, "unsupported_encoding")
    plain = {"Content-Encoding": "identity"}
    body = {"prompt": P1}
    assert httpx.post(f"{url}/v1/completions", json=body, headers=plain).status_code == 200


def test_a_body_whose_length_is_told_twice_is_refused_and_the_connection_ends(url):
    told = speak(
        url,
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n",
        until_closed=True,
    )
    assert told.startswith(b"HTTP/1.1 400")
    assert b"ambiguous_length" in told
    # The second request may be part of the first one's body, so it is not answered.
    assert told.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_headers_that_never_end_end_the_connection(url, sent, monkeypatch):
    monkeypatch.setattr(connection, "HEADERS_S", 0.2)
    assert speak(url, sent, until_closed=True) == b""


def test_a_body_that_never_ends_is_answered_and_the_connection_ends(url, monkeypatch):
    monkeypatch.setattr(gate, "BODY_S", 0.2)
    told = speak(
        url,
        b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{"prompt',
        until_closed=True,
    )
    assert told.startswith(b"HTTP/1.1 408")
    assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_slow"


def test_hundreds_of_half_sent_bodies_are_held_no_longer_than_one(url, monkeypatch):
    monkeypatch.setattr(gate, "BODY_S", 1.0)
    host, port = url.removeprefix("http://").split(":")
    half = b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{"prompt'
    with contextlib.ExitStack() as opened:
        clients = [
            opened.enter_context(socket.create_connection((host, int(port)), timeout=DEADLINE_S))
            for _ in range(200)
        ]
        for client in clients:
            client.sendall(half)
        assert post(url).status_code == 200
        for client in clients:
            with client.makefile("rb") as told:
                assert told.read().startswith(b"HTTP/1.1 408")


def test_a_slow_answer_ends_no_connection(monkeypatch):
    monkeypatch.setattr(connection, "HEADERS_S", 0.2)
    monkeypatch.setattr(gate, "BODY_S", 0.2)
    model = Held()
    with serving(model) as (url, _):
        waiting = threading.Timer(0.6, model.steps.release)
        waiting.start()
        assert post(url).status_code == 200
        waiting.join()


def test_a_connection_is_kept_between_requests_for_as_long_as_it_says(monkeypatch):
    assert listening.KEEP_ALIVE_S > 60
    monkeypatch.setattr(listening, "KEEP_ALIVE_S", 1)
    with serving(Held()) as (url, _):
        start = time.monotonic()
        told = speak(url, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", until_closed=True)
        assert told.startswith(b"HTTP/1.1 200")
        assert time.monotonic() - start >= 0.9


def test_only_clients_with_the_key_are_served():
    model = Held()
    with serving(model, key="s\u00e9same") as (url, _):
        for given_key in (None, "Bearer wrong", "Basic s\u00e9same", "Bearer"):
            headers = {} if given_key is None else {"Authorization": given_key.encode()}
            answer = httpx.get(f"{url}/v1/models", headers=headers)
            assert (answer.status_code, error(answer)["code"]) == (401, "invalid_api_key")
        right = {"Authorization": "Bearer s\u00e9same".encode()}
        assert httpx.get(f"{url}/v1/models", headers=right).status_code == 200
        assert httpx.get(f"{url}/health").status_code == 200


def test_scripts_of_the_pages_that_were_named_may_ask_and_no_others():
    page, other = "https://example.org", "https://example.net"
    asked = {"Access-Control-Request-Method": "POST"}
    headers = {"Access-Control-Request-Headers": "authorization, content-type"}
    with serving(Held(), key="secret", origins=(page,)) as (url, _):
        # A browser asks without the key whether it may send the key.
        may = httpx.options(
            f"{url}/v1/completions", headers={"Origin": page} | asked | headers
        ).headers
        assert may["access-control-allow-origin"] == page
        assert "authorization" in may["access-control-allow-headers"].lower()
        refused = httpx.options(f"{url}/v1/completions", headers={"Origin": other} | asked)
        assert "access-control-allow-origin" not in refused.headers
        answer = httpx.get(f"{url}/v1/models", headers={"Origin": page})
        assert answer.headers["access-control-allow-origin"] == page
    with serving(Held()) as (url, _):
        answer = httpx.get(f"{url}/v1/models", headers={"Origin": page})
        assert "access-control-allow-origin" not in answer.headers


def test_each_request_is_a_line_of_the_log_where_one_is_wanted():
    lines = []
    with serving(Held(), log=lines.append) as (url, _):
        httpx.get(f"{url}/v1/models/")
        httpx.get(f"{url}/n%0Aothing")
    assert [line.split(" ", 3)[2:3] for line in lines] == [["127.0.0.1"]] * 2
    assert "GET /v1/models 200" in lines[0]
    assert "GET /n\\nothing 404" in lines[1]
