"""Connections to mirrors: kept, renewed, and never believed further than one answer goes."""

import asyncio
import contextlib
import socket
from pathlib import PurePosixPath

import httpx
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokfetch.errors import StorageFailed
from grokfetch.fetch.mirror.answers import Failed, Short, Span
from grokfetch.fetch.mirror.environment import Environment
from grokfetch.fetch.mirror.exchange import Asking
from grokfetch.fetch.mirror.http import Http
from grokfetch.fetch.mirror.transfer import Writer
from grokfetch.torrent.layout import LayoutFile

BODY = b"0123456789"
WHOLE = Span(0, len(BODY), len(BODY))
ANSWER = b"HTTP/1.1 206 x\r\nContent-Length: 10\r\nContent-Range: bytes 0-9/10\r\n\r\n" + BODY
END = b"<end>"
"""At the end of an answer: the connection ends too."""


class Server:
    """Gives each connection the answers of a script, one for each request."""

    def __init__(self, *scripts):
        self._scripts = iter(scripts)
        self.heads = []
        self.connections = 0

    async def talk(self, reader, writer):
        self.connections += 1
        with contextlib.closing(writer), contextlib.suppress(OSError, asyncio.IncompleteReadError):
            for answer in next(self._scripts):
                self.heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
                writer.write(answer.removesuffix(END))
                await writer.drain()
                if answer.endswith(END):
                    return
            await reader.read()


def ask(server, *paths, user=""):
    """What comes for each path, one after another: bytes, or the error."""

    async def main():
        found = []
        async with await asyncio.start_server(server.talk, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            async with Http(2, 5.0) as http:
                for path in paths:
                    try:
                        url = f"http://{user}127.0.0.1:{port}/{path}"
                        async with http.opened(url, WHOLE) as chunks:
                            found.append(b"".join([bytes(chunk) async for chunk in chunks]))
                    except Failed as error:
                        found.append(error)
        return found

    return asyncio.run(main())


def test_one_connection_serves_one_request_after_another():
    server = Server([ANSWER] * 3)
    assert ask(server, "a", "b", "c") == [BODY] * 3
    assert server.connections == 1
    assert [head.split()[1] for head in server.heads] == ["/a", "/b", "/c"]


def test_a_connection_that_ends_when_it_is_used_again_is_made_anew():
    server = Server([ANSWER, END], [ANSWER])
    assert ask(server, "a", "b") == [BODY, BODY]
    assert server.connections == 2


def test_what_follows_an_answer_is_no_answer_to_the_next_request():
    false = ANSWER.replace(BODY, b"9876543210")
    server = Server([ANSWER + false], [ANSWER])
    assert ask(server, "a", "b") == [BODY, BODY]
    assert server.connections == 2


def test_an_answer_that_ends_too_early_is_short_and_its_connection_is_not_used_again():
    server = Server([ANSWER[:-4] + END], [ANSWER])
    first, second = ask(server, "a", "b")
    assert isinstance(first, Short)
    assert second == BODY


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 206 x\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 101 x\r\n\r\n",
    ],
)
def test_an_answer_that_is_none_is_a_failure_of_this_request_only(answer):
    server = Server([answer], [answer], [ANSWER])
    first, second = ask(server, "a", "b")
    assert isinstance(first, Failed)
    assert second == BODY


def test_messages_before_an_answer_are_passed_over():
    early = b"HTTP/1.1 103 x\r\nLink: y\r\n\r\n"
    assert ask(Server([early + early + ANSWER, ANSWER]), "a", "b") == [BODY, BODY]


def test_user_and_password_of_an_address_are_sent_and_no_others():
    server = Server([ANSWER, ANSWER])
    ask(server, "a", user="me:my%20word@")
    assert "authorization: basic bwu6bxkgd29yza==" in server.heads[0].lower()
    ask(server := Server([ANSWER]), "a")
    assert "authorization" not in server.heads[0].lower()


@given(
    st.sampled_from(["http://h", "http://u:p@h:81/a b/%20", "https://H/x/../y", "http://[::1]/"]),
    st.lists(st.text(st.sampled_from("aZ9._~-%/?#:@ \u00e9\0"), max_size=4), max_size=3),
)
def test_what_is_remembered_of_a_folder_makes_no_other_request(site, names):
    asking = Asking({"Accept": "*/*"}, Environment())
    url = "/".join((site, *names))
    for _ in range(2):
        try:
            wanted = httpx.URL(url)
        except httpx.InvalidURL:
            with pytest.raises(httpx.InvalidURL):
                asking.asked(url, None)
            continue
        asked = asking.asked(url, None)
        host = httpx.Request("GET", wanted).headers["host"].encode()
        assert (asked.url, asked.target, asked.headers[0]) == (
            *(url, wanted.raw_path),
            (b"Host", host),
        )
        assert (asked.scheme, asked.host) == (wanted.scheme, wanted.raw_host.decode())


def test_of_many_files_written_one_is_open_at_a_time(tmp_path):
    before = psutil.Process().num_fds()
    files = [LayoutFile(PurePosixPath(f"top/{n % 3}/{n}"), 4, 4 * n) for n in range(50)]
    with Writer(tmp_path) as writer:
        for file in files:
            writer.write(file, 2, memoryview(b"cd"))
            writer.write(file, 0, memoryview(b"ab"))
        assert psutil.Process().num_fds() <= before + 1
    assert psutil.Process().num_fds() == before
    assert all((tmp_path / file.path).read_bytes() == b"abcd" for file in files)


def test_a_file_that_cannot_be_opened_is_named_and_the_one_before_is_closed(tmp_path):
    (tmp_path / "b").mkdir()
    before = psutil.Process().num_fds()
    with Writer(tmp_path) as writer:
        writer.write(LayoutFile(PurePosixPath("a"), 1, 0), 0, memoryview(b"x"))
        with pytest.raises(StorageFailed) as failure:
            writer.write(LayoutFile(PurePosixPath("b"), 1, 1), 0, memoryview(b"x"))
    assert failure.value.path == str(tmp_path / "b")
    assert psutil.Process().num_fds() == before


def test_no_more_is_taken_in_than_is_read():
    size = 24 << 20
    span = Span(0, size, size)
    head = f"HTTP/1.1 206 x\r\nContent-Length: {size}\r\nContent-Range: bytes 0-{size - 1}/{size}"
    left = []

    async def talk(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head.encode() + b"\r\n\r\n" + bytes(size))
        left.append(writer.transport)
        with contextlib.closing(writer):
            await reader.read()

    async def main():
        async with await asyncio.start_server(talk, "127.0.0.1", 0) as listening:
            port = listening.sockets[0].getsockname()[1]
            async with Http(1, 5.0) as http, http.opened(f"http://127.0.0.1:{port}/", span) as it:
                taken = len(await anext(it))
                for _ in range(2_000):
                    await asyncio.sleep(0)
                held_back = left[0].get_write_buffer_size()
                async for chunk in it:
                    taken += len(chunk)
        return taken, held_back

    taken, held_back = asyncio.run(main())
    assert taken == size
    assert held_back > size // 4


def test_a_host_all_of_whose_addresses_refuse_is_said_to_refuse(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    found = [
        (socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{host}", port)) for host in (1, 2)
    ]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    async def main():
        async with Http(1, 5.0) as http, http.opened(f"http://two.example:{port}/", WHOLE):
            pass

    with pytest.raises(Failed, match="the connection is refused"):
        asyncio.run(main())
