"""Whatever a mirror answers: it ends, nothing unproven is believed, and a good answer helps again.

Scripts of answers (`support.scripted_mirror`) are played to the very code that fetches, over
connections without a network, in time that passes at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from functools import cache
from pathlib import PurePosixPath
from types import SimpleNamespace

import httpx
import pytest
from support.fuzzing import CORPUS, try_a_few, try_for_a_while
from support.scripted_mirror import MARKS, URL, Mirror, PlayedMirror, connected
from support.torrents import content, v1_torrent
from support.virtual_time import Clock

from grokfetch.errors import GrokfetchError, OutOfReach
from grokfetch.events import Arrived, Notice
from grokfetch.fetch.mirror import (
    MirrorSettings,
    answers,
    bring_tokenizer,
    deliver,
    direct,
    document,
    http,
    lengths,
    pass_by,
    passing,
    pool,
    read_document,
    state,
)
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, TokenizerSource
from grokfetch.torrent.info_dictionary import parse_info

PIECE = 16384
FILES = {"a": content(2 * PIECE + 5000), "b/c": content(10), "d": content(PIECE)}
TOP = {f"top/{name}": data for name, data in FILES.items()}
PATHS = [PurePosixPath(name) for name in TOP]
SETTINGS = MirrorSettings(connections=2, patience_s=2.0, rest_s=0.01, attempts=3)
LARGEST = 100_000
LONGEST_TEXT = 500
MOST_S = 3600.0
"""Longer than anything takes with such small files, apart from pauses that a mirror asks for."""

GOOD = (
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes <<range>>\r\n"
    b'Content-Length: <<length>>\r\nETag: "x"\r\n\r\n<<body>>'
)
CHUNKED = (
    b"HTTP/1.1 206 Partial Content\r\nContent-Range: bytes <<range>>\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n<<chunks>>"
)
WHOLE = b'HTTP/1.1 200 OK\r\nContent-Length: <<size>>\r\nETag: "x"\r\n\r\n<<body>>'
ENDED = b"HTTP/1.0 200 OK\r\nServer: old\r\nContent-Type: text/html\r\n\r\n<<body>><<end>>"
MULTIPART = (
    b"HTTP/1.1 206 Partial Content\r\nContent-Type: multipart/byteranges; boundary=x\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n40\r\n--x\r\nContent-Range: bytes <<range>>\r\n\r\n"
    b"<<half>>\r\n--x--\r\n0\r\n\r\n"
)
LIMITED = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n"
MOVED = b"HTTP/1.1 302 Found\r\nLocation: <<url>>?signed=1\r\nContent-Length: 5\r\n\r\nmoved"
EARLY = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"
SEEDS = [
    GOOD,
    CHUNKED,
    b"<<next>>".join([WHOLE, GOOD]),
    b"<<next>>".join([ENDED, CHUNKED]),
    b"<<next>>".join([MULTIPART, WHOLE]),
    b"<<next>>".join([LIMITED, MOVED, WHOLE, b"HTTP/1.1 404 Gone\r\nContent-Length: 0\r\n\r\n"]),
    b"<<next>>".join([EARLY + GOOD, b"HTTP/1.1 503 Busy\r\nSet-Cookie: a=b\r\n\r\n<<end>>", WHOLE]),
    b"<<next>>".join([WHOLE, GOOD.replace(b"<<body>>", b"<<half>><<reset>>"), GOOD]),
    b"<<next>>".join([GOOD.replace(b"<<body>>", b"<<wrong>>"), WHOLE]),
    b"<<next>>".join([GOOD.replace(b"<<body>>", b"<<half>><<silence>>"), WHOLE, LIMITED]),
    b"<<next>>".join([CHUNKED.replace(b"<<chunks>>", b"<<here>>5\r\nabcde\r\n<<endless>>"), WHOLE]),
]


@cache
def layout():
    known = v1_torrent(FILES, PIECE)
    return parse_info(known.info, known.piece_layers)


@pytest.fixture
def network(monkeypatch, tmp_path):
    """What every attempt uses: a clock, a mirror and a folder."""
    known = SimpleNamespace(clock=Clock(), mirror=None, folder=tmp_path)

    async def connect(_, host, port, **__):
        return await connected(known.mirror, host, port)

    monkeypatch.setattr(direct.Sockets, "connect_tcp", connect)
    monkeypatch.setattr(asyncio, "run", known.clock.run)
    for module in (answers, direct, http, passing, pool, state):
        clock = SimpleNamespace(monotonic=known.clock.monotonic, time=lambda: 1.7e9)
        monkeypatch.setattr(module, "time", clock)
    context = httpx.create_ssl_context(trust_env=False)
    monkeypatch.setattr(httpx, "create_ssl_context", lambda **_: context)
    monkeypatch.setattr(document, "LARGEST", LARGEST)
    store = Store(tmp_path / "tokenizer")
    wanted = TokenizerSource(
        path=PurePosixPath("tokenizer.model"),
        size=len(FILES["a"]),
        sha256=hashlib.sha256(FILES["a"]).hexdigest(),
        url=f"{URL}/top/a",
    )
    with store.lock():
        store.save_manifest(Manifest("tiny", (), tokenizer=wanted))
    return known


def check_text(text):
    """Check that a message is short, and contains no control sequences for a terminal."""
    assert len(text) <= LONGEST_TEXT
    assert text.isprintable()


def check_notice(notice):
    check_text(notice.text)


def pieces(network, settings=SETTINGS):
    """Check that what has arrived is right; finally all has, or the mirror is given up."""
    known = layout()
    mirror = state.Mirror(network.mirror.url, "mirror", SETTINGS.connections)
    root = network.folder / "pieces"
    arrived = []
    with pool.Pool([mirror], known, root, list(range(known.piece_count)), settings) as brings:
        while True:
            last = not brings.busy
            for event in brings.take(5.0):
                if isinstance(event, Arrived):
                    arrived += event.pieces
                else:
                    check_text(event.text)
            if last:
                break
    assert len(set(arrived)) == len(arrived)
    assert mirror.dropped or mirror.lacks or len(arrived) == known.piece_count
    for piece in arrived:
        for part in known.segments(piece):
            data = root.joinpath(part.file.path).read_bytes()
            right = TOP[str(part.file.path)]
            end = part.offset + part.length
            assert data[part.offset : end] == right[part.offset : end]
    for path in PATHS:
        root.joinpath(path).unlink(missing_ok=True)


class Taker:
    """Receives a file, and not a byte more."""

    def __init__(self, size):
        self.size = size
        self.done = 0
        self.ended = False

    def take(self, data):
        self.done += len(data)
        assert self.done <= self.size

    def restart(self):
        self.done = 0

    def end(self):
        self.ended = True


def whole_files(network):
    """Check that a complete file has its length, and that a reason is given for any other."""
    takers = {path: Taker(len(data)) for path, data in zip(PATHS, FILES.values(), strict=True)}
    told = {}

    def tell(address, path, what):
        assert address == URL
        if isinstance(what, Notice):
            check_text(what.text)
        elif not isinstance(what, int):
            assert path not in told
            told[path] = what

    deliver({URL: takers}, SETTINGS, tell, lambda _: None)
    assert told.keys() == takers.keys()
    for path, what in told.items():
        if what is None:
            assert takers[path].done == takers[path].size
        else:
            check_text(what.what)


def passing_files(network):
    """Check that of streamed files exactly the promised bytes are hashed and counted."""
    promised = lengths(URL, PATHS, SETTINGS, check_notice)
    takers = {path: Taker(length[0]) for path, length in promised.items()}
    counts = []
    files = {path: (promised[path], takers[path]) for path in PATHS}
    pass_by(URL, files, SETTINGS, counts.append, check_notice)
    assert all(taker.ended and taker.done == taker.size for taker in takers.values())
    assert sum(counts) == sum(taker.size for taker in takers.values())


def documents(network):
    """Check that no document is too large, and that a tokenizer is the right one or missing."""
    notice = bring_tokenizer(Store(network.folder / "tokenizer"), SETTINGS)
    check_text(notice.text)
    tokenizer = network.folder / "tokenizer" / "tokenizer.model"
    assert tokenizer.exists() == ("sha256 matches" in notice.text)
    if tokenizer.exists():
        assert tokenizer.read_bytes() == FILES["a"]
        tokenizer.unlink()
    assert len(read_document(f"{URL}/top/d", SETTINGS)) <= LARGEST


TARGETS = [pieces, whole_files, passing_files, documents]
each_target = pytest.mark.parametrize("target", TARGETS, ids=lambda it: it.__name__)


def played(target, network):
    """A function that plays a script to a target, and checks what must hold for all targets."""

    def attempt(script):
        network.mirror = mirror = Mirror(TOP, script)
        rests_s = 600.0 * len(mirror.script)
        with network.clock.most(MOST_S + rests_s):
            try:
                target(network)
            except GrokfetchError as error:
                check_text(error.what)

    return attempt


@each_target
def test_a_mirror_that_answers_well_is_believed(target, network):
    played(target, network)(b"")
    with contextlib.suppress(AttributeError):
        assert not network.mirror.script


@each_target
def test_treacherous_answers_and_a_few_variants_do_no_harm(target, network):
    try_a_few(played(target, network), "mirror", SEEDS, few=40, tokens=MARKS)


def test_a_document_that_never_ends_has_its_time(network, monkeypatch):
    monkeypatch.setattr(document, "LARGEST", 10**9)
    chunk = b"ea60\r\n" + bytes(60_000) + b"\r\n"
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    network.mirror = Mirror(TOP, head + b"<<here>>" + chunk + b"<<endless>>")
    # In that time so much may arrive without being too much.
    network.mirror.answers = 100
    began = network.clock.now
    with network.clock.most(MOST_S), pytest.raises(OutOfReach, match="within 300 s"):
        read_document(f"{URL}/top/a", SETTINGS)
    assert network.clock.now - began < 302


@pytest.mark.slow
@each_target
def test_half_a_minute_of_new_answers_does_no_harm(target, network, tmp_path):
    try_for_a_while(played(target, network), "mirror", SEEDS, tmp_path, tokens=MARKS)


def test_the_treacherous_answers_do_no_harm_on_real_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "LEAST_RATE", 1 << 20)
    network = SimpleNamespace(folder=tmp_path)
    impatient = dataclasses.replace(SETTINGS, patience_s=0.2)
    with PlayedMirror(TOP) as server:
        for script in SEEDS + [file.read_bytes() for file in sorted((CORPUS / "mirror").glob("*"))]:
            network.mirror = server.play(script)
            pieces(network, impatient)
