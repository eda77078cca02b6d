"""A checkpoint that is fetched as it is read: only what is looked at is fetched."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import threading
from pathlib import PurePosixPath

import numpy as np
import pytest
from support import golden
from support.fake_swarm import Elsewhere, FakeSwarm, NoPeers
from support.patience import PATIENCE_S, wait_for
from support.peer import Peer
from support.release import PIECE, publish
from support.torrents import content, v1_torrent
from support.web_server import WebServer

import loader
from grokfetch.errors import NoModel, StateLocked
from grokfetch.fetch import fetch
from grokfetch.fetch.mirror import Together, division
from grokfetch.fetch.mirror.division import Patience
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.fetch.wanted import Network
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.manifest.selection import ON_DEMAND, Extract, Request
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import encode_torrent
from loader.weights.checkpoint import model_of

GATE = "transformer/decoder_layer_3/moe/linear/w"
ROUTER = "transformer/decoder_layer_5/router/w"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return root, *publish(root)


@pytest.fixture(scope="module")
def seeded(published):
    root, torrent, _ = published
    with seed(encode_torrent(torrent), root, SwarmSettings.loopback()) as peer:
        yield peer


def loopback(*ports):
    return SwarmSettings.loopback(tuple(f"127.0.0.1:{port}" for port in ports))


def network(*ports, web_seeds=()):
    return Network(loopback(*ports), mirrors=bool(web_seeds), web_seeds=web_seeds)


def opened(published, folder, *ports, **options):
    source = str(published[0] / "tiny.json")
    given = network(*ports, **options)
    return loader.open_checkpoint(source, folder, fetch=True, network=given)


def proven(folder):
    return Store(folder).record().pieces


def count(published):
    _, torrent, _ = published
    return parse_info(torrent.info, torrent.piece_layers).piece_count


def test_only_the_pieces_under_what_is_read_come_and_they_are_proven(published, seeded, tmp_path):
    with opened(published, tmp_path, seeded.port) as grok:
        assert len(grok) == len(golden.CHECKPOINT)
        part = grok[GATE][3, :, 8:16]
        assert np.array_equal(part, golden.CHECKPOINT[GATE][3, :, 8:16])
    few = proven(tmp_path)
    assert 0 < len(few) < count(published) // 10
    selection = str(Store(tmp_path).selection())
    assert selection == "what was read"
    with opened(published, tmp_path) as grok:
        # There is no peer, and none is needed.
        assert np.array_equal(grok[GATE][3, :, 8:16], part)
    assert proven(tmp_path) == few


def test_what_is_read_later_extends_what_was_asked_for_and_is_remembered(
    published, seeded, tmp_path
):
    with opened(published, tmp_path, seeded.port) as grok:
        assert np.array_equal(grok[ROUTER].weight, golden.CHECKPOINT[ROUTER].weight)
        first = len(Store(tmp_path).asked())
        wanted = golden.CHECKPOINT[GATE].dequantize(np.s_[1])
        assert np.array_equal(grok[GATE].dequantize(np.s_[1]), wanted)
        assert len(Store(tmp_path).asked()) > first
    *_, summary = verify(Store(tmp_path))
    assert summary.complete


def test_prefetch_brings_tensors_and_parts_before_they_are_read(published, seeded, tmp_path):
    with opened(published, tmp_path, seeded.port) as grok:
        with pytest.raises(KeyError, match="near it"):
            grok.prefetch(["transformer/decoder_layer_5/router/x"])
        grok.prefetch([ROUTER, (GATE, np.s_[2])])
        wait_for(lambda: not grok.store.demand.ahead)
    with opened(published, tmp_path) as grok:
        assert np.array_equal(grok[ROUTER].weight, golden.CHECKPOINT[ROUTER].weight)
        assert np.array_equal(grok[GATE][2], golden.CHECKPOINT[GATE][2])


def test_mirrors_bring_what_is_read_where_there_is_no_peer(published, tmp_path):
    root, _, manifest = published
    files = {
        f"release/{file.path}": root.joinpath("release", file.path).read_bytes()
        for file in manifest.files
    }
    torrent = str(root / "tiny.torrent")
    with WebServer(files) as server:
        given = network(web_seeds=(server.url,))
        source = loader.open_checkpoint(
            torrent, tmp_path, fetch=True, network=given, manifest=root / "tiny.json"
        )
        with source as grok:
            part = grok[GATE][3, :, 8:16]
            assert np.array_equal(part, golden.CHECKPOINT[GATE][3, :, 8:16])
            assert np.array_equal(grok[ROUTER].weight, golden.CHECKPOINT[ROUTER].weight)
    assert 0 < len(proven(tmp_path)) < count(published) // 5


def test_a_torrent_without_a_manifest_is_read_too_but_its_hyperparameters_are_not_known(
    published, seeded, tmp_path
):
    torrent = published[0] / "tiny.torrent"
    given = network(seeded.port)
    with loader.open_checkpoint(torrent, tmp_path, fetch=True, network=given) as grok:
        assert list(grok) == list(golden.CHECKPOINT)
        assert grok.nbytes == golden.CHECKPOINT.nbytes
        part = grok[GATE].dequantize(np.s_[3, :, 8:16])
        assert np.array_equal(part, golden.CHECKPOINT[GATE].dequantize(np.s_[3, :, 8:16]))
        with pytest.raises(NoModel, match="how wide a head is"):
            grok.config  # noqa: B018 - to look is what is tested
    few = proven(tmp_path)
    assert 0 < len(few) < count(published)
    with loader.open_checkpoint(None, tmp_path, fetch=True, network=network()) as grok:
        # The names were kept, and nothing is requested.
        assert np.array_equal(grok[GATE].dequantize(np.s_[3, :, 8:16]), part)
    assert proven(tmp_path) == few
    with pytest.raises(NoModel):
        model_of(Store(tmp_path))


FILES = {"a": content(8 * PIECE), "b": content(8 * PIECE, 1)}
PLAIN = v1_torrent(FILES, PIECE)


@contextlib.contextmanager
def demanding(folder, source):
    store = Arriving(folder, on_demand=True)
    nothing = Request(extract=Extract(ON_DEMAND, ()))
    with store.filled(fetch(store, source, request=nothing, demand=store.demand)):
        yield store


@pytest.fixture
def impatient(monkeypatch):
    """Awaited pieces are soon not left to a swarm that brings no bytes, or others, for ever."""
    monkeypatch.setattr(division, "DEMAND_QUIET_S", 0.2)


def test_what_a_busy_swarm_does_not_bring_comes_from_a_mirror(tmp_path, impatient):
    with WebServer({f"top/{name}": data for name, data in FILES.items()}) as server:
        swarm = Elsewhere(PLAIN)
        with demanding(tmp_path, Together(swarm, [server.url])) as store:
            store.require(PurePosixPath("top/a"), 3 * PIECE, 10)
            assert swarm.orders
    assert tmp_path.joinpath("top/a").read_bytes()[3 * PIECE :][:10] == FILES["a"][3 * PIECE :][:10]


def test_what_no_mirror_has_is_asked_of_the_swarm_again(tmp_path, impatient):
    class Later(FakeSwarm):
        """Silent at first."""

        def download(self, order):
            if not self.orders:
                self.orders.append(order)
                yield from NoPeers(PLAIN).download(order)
            yield from super().download(dataclasses.replace(order, want=wanted(order)))

    def wanted(order):
        return frozenset(order.demand.waited)

    with WebServer({"top/a": FILES["a"]}) as server:
        swarm = Later(PLAIN, dict(FILES))
        with demanding(tmp_path, Together(swarm, [server.url])) as store:
            store.require(PurePosixPath("top/a"), 0, 10)
            store.require(PurePosixPath("top/b"), 0, 10)
    assert tmp_path.joinpath("top/b").read_bytes()[:10] == FILES["b"][:10]
    assert len(swarm.orders) > 1


def test_what_is_read_on_demand_comes_from_the_peer_that_has_it_and_is_right(tmp_path):
    stream = b"".join(FILES.values())

    def honest(piece, begin, length):
        lied.wait(PATIENCE_S)
        return stream[piece * PIECE + begin :][:length]

    def lie(_piece, _begin, length):
        lied.set()
        return bytes(length)

    lied = threading.Event()
    with (
        Peer(PLAIN.v1, 16, lie, [9]) as liar,
        Peer(PLAIN.v1, 16, honest, [2, 9]) as other,
        demanding(tmp_path, Swarm(PLAIN, loopback(liar.port, other.port))) as store,
    ):
        store.require(PurePosixPath("top/b"), PIECE, 10)
        store.require(PurePosixPath("top/a"), 2 * PIECE, 10)
        assert liar.sent
        assert set(other.asked) == {2, 9}
    assert tmp_path.joinpath("top/b").read_bytes()[PIECE:][:10] == FILES["b"][PIECE:][:10]
    assert proven(tmp_path) == {2, 9}


CHILD = """
import sys
import loader
from grokfetch.fetch.swarm import SwarmSettings
from grokfetch.fetch.wanted import Network
root, folder, peer, *names = sys.argv[1:]
given = {
    "manifest": f"{root}/tiny.json",
    "network": Network(SwarmSettings.loopback((peer,)), mirrors=False),
}
with loader.open_checkpoint(f"{root}/tiny.torrent", folder, fetch=True, **given) as grok:
    for name in names:
        grok[name].weight.sum()
        print("read", flush=True)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_ends_the_reading_and_what_was_proven_is_not_fetched_again(
    published, tmp_path, number
):
    root, torrent, manifest = published
    layout = parse_info(torrent.info, torrent.piece_layers)
    stream = b"".join(
        bytes(file.size) if file.pad else root.joinpath(file.path).read_bytes()
        for file in layout.files
    )

    def block(piece, begin, length):
        return stream[piece * PIECE + begin :][:length]

    [there] = [layout.file("release" / it.file) for it in manifest.tensors if it.name == ROUTER]
    pieces = set(layout.pieces_over(there))
    with Peer(torrent.v1, layout.piece_count, block, pieces) as some:
        given = [str(root), str(tmp_path), f"127.0.0.1:{some.port}", ROUTER, GATE]
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, *given],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as child:
            assert child.stdout.readline() == "read\n"
            wait_for(lambda: pieces <= proven(tmp_path))
            child.send_signal(number)
            assert child.stdout.read() == ""
    assert proven(tmp_path) == pieces
    with Peer(torrent.v1, layout.piece_count, block) as whole:
        with opened(published, tmp_path, whole.port) as grok:
            assert grok.store.demand.waited == ()
            assert np.array_equal(grok[ROUTER].weight, golden.CHECKPOINT[ROUTER].weight)
            assert np.array_equal(grok[GATE].weight, golden.CHECKPOINT[GATE].weight)
        assert pieces.isdisjoint(whole.asked)


def test_a_swarm_is_waited_for_as_long_as_it_brings_what_is_waited_for():
    patience = Patience(1_000_000)
    assert not patience.ends(0.0, set(), 0, 0.0)
    assert not patience.ends(10.0, {1, 2}, 0, 0.0)
    assert not patience.ends(11.9, {1, 2}, 0, 0.0)
    assert patience.ends(12.1, {1, 2}, 0, 0.0)
    # Other bytes come, at one piece per second.
    assert not patience.ends(12.2, {1, 2}, 1, 1e6)
    assert not patience.ends(15.9, {1, 2}, 2, 1e6)
    assert patience.ends(16.1, {1, 2, 3}, 3, 1e6)
    # One that a reader waited for has come.
    assert not patience.ends(16.2, {2, 3}, 4, 1e6)
    assert not patience.ends(100.0, set(), 4, 1e6)
    assert not patience.ends(200.0, {9}, 4, 1e6)


def test_a_folder_that_another_process_holds_is_refused(published, seeded, tmp_path):
    held = Store(tmp_path).lock()
    with held, pytest.raises(StateLocked), opened(published, tmp_path, seeded.port):
        pass


def test_fetch_and_a_folder_go_together(tmp_path):
    for given in ({"source": tmp_path, "folder": tmp_path}, {"source": tmp_path, "fetch": True}):
        with pytest.raises(TypeError, match="fetch=True"):
            loader.open_checkpoint(**given)
