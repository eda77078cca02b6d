"""What a reader waits for comes first: over real swarms and mirrors, well-behaved and not."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import pytest
from support.fake_swarm import Elsewhere, FakeSwarm, NoPeers
from support.patience import PATIENCE_S, wait_for
from support.peer import Peer
from support.torrents import content, lay_down, manifest_of, v1_torrent
from support.web_server import WebServer

from grokfetch.errors import StateLocked
from grokfetch.events import Outcome, Status
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.demand import Demand
from grokfetch.fetch.mirror import MirrorSettings, Together, division
from grokfetch.fetch.source import Order
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.fetch.swarm.urgent import Urgent
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.folder.store import Store
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import encode_torrent

PIECE = 32768
PIECES = 40
FILES = {"a": content(20 * PIECE), "b": content(20 * PIECE, 1)}
STREAM = b"".join(FILES.values())
TORRENT = v1_torrent(FILES, PIECE)
LAYOUT = parse_info(TORRENT.info, TORRENT.piece_layers)
NEVER_SAVED = Limits(metadata_s=20, stall_s=60, save_s=1000)
"""The record is written at the beginning and at the end of a fetch only."""


def span(piece):
    """The place of a piece, as `require` takes it: path, start and length."""
    return PurePosixPath("top", "ab"[piece // 20]), piece % 20 * PIECE, PIECE


def block(piece, begin, length):
    return STREAM[piece * PIECE + begin :][:length]


def peer(answers, pieces=None, ready=None):
    return Peer(TORRENT.v1, PIECES, answers, pieces, ready)


def swarm(*ports):
    return Swarm(TORRENT, SwarmSettings.loopback(tuple(f"127.0.0.1:{port}" for port in ports)))


class Enough(Exception):
    """Ends a fetch before everything is there."""


@contextlib.contextmanager
def filled(root, source, limits=NEVER_SAVED):
    """A folder that is being filled, until the block ends."""
    store = Arriving(root)
    with (
        contextlib.suppress(Enough),
        store.filled(fetch(store, source, limits=limits, demand=store.demand)),
    ):
        yield store
        raise Enough


def content_at(root, piece):
    path, start, length = span(piece)
    return (root / path).read_bytes()[start : start + length]


# --- the value ------------------------------------------------------------------------------------


def test_who_asks_first_is_served_first_and_what_is_needed_next_stands_behind():
    demand = Demand()
    demand.ask([7, 8], ahead=True)
    demand.ask([5, 3])
    demand.ask([3, 8, 1])
    assert demand.waited == (5, 3, 8, 1)
    assert demand.ahead == (7,)
    demand.answer([3, 7, 20])
    assert demand.waited == (5, 8, 1)
    assert demand.ahead == ()


def test_what_is_proven_is_not_asked_for_and_who_waits_is_woken():
    woken, rung = [], []
    demand = Demand(lambda: woken.append(True))
    demand.follow({1, 2}.__contains__)
    with demand.bell(lambda: rung.append(True)):
        demand.ask([1, 2])
        assert not rung
        demand.ask([3], ahead=True)
        demand.ask([3, 4])
    demand.ask([5])
    assert len(rung) == 2
    demand.answer([9])
    assert not woken
    demand.answer([4])
    assert woken == [True]
    assert demand.proven([1, 2, 3]) == {1, 2}


def test_the_events_say_what_is_waited_for_by_piece_and_by_tensor(tmp_path):
    store = Arriving(tmp_path)
    store.demand.ask([19, 20, 21])
    source = FakeSwarm(TORRENT, dict(FILES))
    manifest = manifest_of(FILES, TORRENT.info_hash)
    events = list(fetch(store, source, manifest=manifest, demand=store.demand))
    told = [(it.demanded, it.waiting) for it in events if isinstance(it, Status) and it.demanded]
    assert ((20, 21), ("tensor of b",)) in told
    assert [it for it in events if isinstance(it, Status)][-1].demanded == ()


# --- swarms ---------------------------------------------------------------------------------------


SLOW = 40_000
"""Bytes per second; everything then takes half a minute, and a piece one second."""


def test_a_demanded_piece_comes_before_those_that_peers_were_asked_for_before(tmp_path):
    lay_down(tmp_path / "seed", FILES)
    settings = dataclasses.replace(SwarmSettings.loopback(), up=SLOW)
    with (
        seed(encode_torrent(TORRENT), tmp_path / "seed", settings) as other,
        filled(tmp_path / "to", swarm(other.port)) as store,
    ):
        wait_for(lambda: store.demand.proven(range(PIECES)))
        last = max(set(range(PIECES)) - store.demand.proven(range(PIECES)))
        store.require(*span(last))
        assert content_at(tmp_path / "to", last) == block(last, 0, PIECE)
        assert len(store.demand.proven(range(PIECES))) < PIECES // 2
        # It is not in the record yet.
        assert store.record().pieces == frozenset()
    assert last in Store(tmp_path / "to").record().pieces


def test_several_readers_are_served_in_the_order_in_which_they_asked(tmp_path):
    class Watched(FakeSwarm):
        """Begins when all three have asked."""

        def download(self, order):
            ready.wait(PATIENCE_S)
            yield from super().download(order)

        def _next(self, order, left):
            brought.append(super()._next(order, left))
            return brought[-1]

    ready, brought, order = threading.Event(), [], [35, 12, 24]
    source = Watched(TORRENT, dict(FILES))
    with filled(tmp_path, source) as store, ThreadPoolExecutor() as pool:
        readers = []
        for piece in order:
            readers.append(pool.submit(store.require, *span(piece)))
            wait_for(lambda: len(store.demand.waited) == len(readers))
        ready.set()
        for reader in readers:
            reader.result(PATIENCE_S)
    assert brought[:3] == order


def test_a_demanded_piece_comes_from_the_one_peer_that_has_it(tmp_path):
    first, last = range(20), range(20, 40)
    with (
        peer(lambda *_: None, first) as silent,
        peer(block, last) as other,
        filled(tmp_path, swarm(silent.port, other.port)) as store,
    ):
        store.require(*span(33))
        assert content_at(tmp_path, 33) == block(33, 0, PIECE)
        assert 33 not in silent.asked


def test_a_demanded_piece_that_comes_wrong_is_brought_by_another_peer(tmp_path):
    def lie(_piece, _begin, length):
        return bytes(length)

    class Lied:
        """Let the liar send the whole piece: of two who send a bad one, neither can be blamed."""

        def wait(self, _seconds):
            wait_for(lambda: liar.sent == 2)

    with (
        peer(lie, [30]) as liar,
        peer(block, ready=Lied()) as other,
        filled(tmp_path, swarm(liar.port, other.port)) as store,
    ):
        store.require(*span(30))
        assert content_at(tmp_path, 30) == block(30, 0, PIECE)
        assert liar.sent


def test_a_demanded_piece_that_does_not_read_back_right_is_asked_for_again_at_once(tmp_path):
    source = FakeSwarm(TORRENT, dict(FILES), corrupt={30: 1})
    with filled(tmp_path, source) as store:
        store.require(*span(30))
        first, second, *_ = source.orders
        assert len(second.want) >= len(first.want) - 2
        assert content_at(tmp_path, 30) == block(30, 0, PIECE)


def test_what_lies_there_is_read_back_in_the_order_in_which_it_is_waited_for(tmp_path):
    lay_down(tmp_path, FILES)
    store = Arriving(tmp_path)
    store.demand.ask([33, 21])
    events = fetch(store, NoPeers(TORRENT), limits=NEVER_SAVED, demand=store.demand)
    proven = [piece for event in events if hasattr(event, "pieces") for piece in order(event)]
    assert sorted(proven) == list(range(PIECES))
    assert set(proven[:2]) == {33, 21}


def order(event):
    return event.pieces if isinstance(event.pieces, tuple) else ()


# --- mirrors --------------------------------------------------------------------------------------

ONE_BY_ONE = MirrorSettings(connections=1, patience_s=30, rest_s=0.01, attempts=3)


@pytest.fixture
def impatient(monkeypatch):
    """Awaited pieces are soon not left to a swarm that brings no bytes, or others, for ever."""
    monkeypatch.setattr(division, "DEMAND_QUIET_S", 0.2)


def test_a_mirror_is_asked_for_demanded_ranges_next_though_its_connections_are_busy(tmp_path):
    demanded = threading.Event()

    class Slow(WebServer):
        """Does not answer the first request before something is demanded, and proven."""

    with Slow({f"top/{name}": data for name, data in FILES.items()}) as server:
        requests = iter(range(1000))

        def before(_path):
            if next(requests) == 0:
                demanded.wait(PATIENCE_S)

        server.before = before
        source = Together(NoPeers(TORRENT), [server.url], settings=ONE_BY_ONE)
        with filled(tmp_path, source) as store:
            # The swarm has the first half of the pieces, the mirror the second.
            wait_for(lambda: server.asked)
            store.require(*span(39))
            demanded.set()
            assert content_at(tmp_path, 39) == block(39, 0, PIECE)


def test_what_a_silent_swarm_was_to_bring_comes_from_a_mirror_when_somebody_waits_for_it(
    tmp_path, impatient
):
    released = threading.Event()

    def before(_path):
        released.wait(PATIENCE_S)

    with WebServer({f"top/{name}": data for name, data in FILES.items()}) as server:
        server.before = before
        source = Together(NoPeers(TORRENT), [server.url], settings=ONE_BY_ONE)
        with filled(tmp_path, source) as store, ThreadPoolExecutor() as pool:
            reading = pool.submit(store.require, *span(3))
            wait_for(lambda: any("top/a" in path for path in server.asked))
            released.set()
            reading.result(PATIENCE_S)
            assert content_at(tmp_path, 3) == block(3, 0, PIECE)


def test_what_a_busy_swarm_does_not_bring_comes_from_a_mirror_and_the_rest_stays_divided(
    tmp_path, impatient
):
    done = threading.Event()

    def before(path):
        # Their own half keeps the mirrors busy.
        if "top/b" in path:
            done.wait(PATIENCE_S)

    with WebServer({f"top/{name}": data for name, data in FILES.items()}) as server:
        server.before = before
        busy = Elsewhere(TORRENT)
        settings = dataclasses.replace(ONE_BY_ONE, connections=2)
        with filled(tmp_path, Together(busy, [server.url], settings=settings)) as store:
            store.require(*span(3))
            done.set()
            assert content_at(tmp_path, 3) == block(3, 0, PIECE)
    first, then = (order.want for order in busy.orders[:2])
    assert 3 in first
    assert 3 not in then
    assert {0, 1, 2, 4} <= then


# --- what ends it ---------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path, PurePosixPath
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.swarm import Swarm, SwarmSettings
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.torrent.metainfo import parse_torrent
torrent = parse_torrent(Path(sys.argv[2]).read_bytes())
source = Swarm(torrent, SwarmSettings.loopback((sys.argv[3],)))
store = Arriving(Path(sys.argv[1]))
limits = Limits(20, 60, save_s=0.05)
with store.filled(fetch(store, source, limits=limits, demand=store.demand)):
    store.require(PurePosixPath("top/b"), 0, 5 * 32768)
    print("read", flush=True)
    store.require(PurePosixPath("top/a"))
    print("not to be seen", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_the_waiting_and_the_next_fetch_keeps_what_was_proven(tmp_path, number):
    there = range(20, 26)
    torrent = tmp_path / "top.torrent"
    torrent.write_bytes(encode_torrent(TORRENT))
    with peer(block, there) as other:
        where = [str(tmp_path / "to"), str(torrent), f"127.0.0.1:{other.port}"]
        with subprocess.Popen(
            [sys.executable, "-c", CHILD, *where],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as child:
            assert child.stdout.readline() == "read\n"
            wait_for(lambda: set(range(20, 25)) <= Store(tmp_path / "to").record().pieces)
            child.send_signal(number)
            assert child.stdout.read() == ""
    proven = Store(tmp_path / "to").record().pieces
    assert set(range(20, 25)) <= proven <= set(there)
    again = FakeSwarm(TORRENT, dict(FILES))
    assert isinstance(list(fetch(Store(tmp_path / "to"), again))[-1], Outcome)
    assert set(range(20, 25)).isdisjoint(again.fetched)
    assert again.orders[0].demand.waited == ()


def test_a_demand_is_refused_while_another_process_holds_the_folder(tmp_path):
    source = FakeSwarm(TORRENT, dict(FILES))
    with Store(tmp_path).lock(), pytest.raises(StateLocked), filled(tmp_path, source) as store:
        store.require(*span(3))
    assert not source.orders


class Told:
    """What libtorrent is told, in place of a torrent of it."""

    def __init__(self, pieces):
        self.levels = dict.fromkeys(pieces, 4)
        self.after_each_call = []

    def prioritize_pieces(self, levels):
        self.levels |= dict(levels)
        self.after_each_call.append(dict(self.levels))

    def set_piece_deadline(self, piece, _milliseconds):
        self.prioritize_pieces([(piece, 7)])

    def set_queue_time(self, _seconds):
        pass


@pytest.mark.parametrize("waited", [[], [5, 3]])
def test_no_peer_that_connects_meanwhile_hears_that_nothing_is_wanted(tmp_path, waited):
    demand = Demand(lambda: None)
    demand.ask(waited)
    want = frozenset(range(PIECES))
    order = Order(TORRENT, LAYOUT, tmp_path, frozenset(), want, demand=demand)
    told = Told(want)
    Urgent(told, told, order).heed(set(want), set())
    assert 0 in told.levels.values()
    assert all(any(levels.values()) for levels in told.after_each_call)
    assert all(told.levels[piece] == 7 for piece in waited)
