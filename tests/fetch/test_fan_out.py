"""Several hosts fetch from one seed: which pieces each requests, and how often a byte is sent."""

import dataclasses
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from types import SimpleNamespace

import libtorrent
import pytest
from support.release import publish_files
from support.torrents import content

from grokfetch.events import Outcome, Status
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.demand import Demand
from grokfetch.fetch.swarm import Swarm, SwarmSettings, fan_out, seed
from grokfetch.fetch.swarm.fan_out import (
    Demanded,
    FanOut,
    Patience,
    Peer,
    Share,
    priorities,
    share_of,
)
from grokfetch.fetch.swarm.session import session_settings
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.folder.store import Store
from grokfetch.torrent.metainfo import parse_torrent

PIECE = 1 << 15
A, B, C = (letter * 20 for letter in (b"a", b"b", b"c"))
SEED = Peer(b"s" * 20, seeds=True, divides=False)


def others(*ids):
    return {Peer(peer, seeds=False, divides=True) for peer in ids}


def test_hosts_of_one_seed_have_shares_that_together_are_all_and_never_overlap():
    shares = [share_of(me, {SEED, *others(*{A, B, C} - {me})}) for me in (A, B, C)]
    for piece in range(100):
        assert sorted(share.turn(piece, share.rank) for share in shares) == [0, 1, 2]
        assert all(
            shares[share.owner(piece)].turn(piece, share.owner(piece)) == 0 for share in shares
        )


@pytest.mark.parametrize("hosts", [2, 3, 8, 16])
def test_help_with_a_share_is_spread_over_all_other_hosts(hosts):
    pieces = range(0, hosts * (hosts - 1) * 5, hosts)
    helpers = [r for p in pieces for r in range(hosts) if Share(0, hosts).turn(p, r) == 1]
    assert {helpers.count(rank) for rank in range(1, hosts)} == {5}


@pytest.mark.parametrize(
    "peers",
    [
        {SEED},
        others(B, C),
        {SEED, Peer(b"t" * 20, seeds=True, divides=False), *others(B)},
        {SEED, Peer(B, seeds=False, divides=False)},
        set(),
    ],
    ids=["no other host", "no seed", "two seeds", "another program", "nobody"],
)
def test_without_hosts_that_divide_or_with_another_number_of_seeds_nothing_is_divided(peers):
    assert share_of(A, peers) is None


def test_a_host_asks_for_its_share_first_and_for_others_once_another_host_has_them():
    usual, copies = [3] * 8, [1, 1, 1, 1, 1, 2, 2, 2]
    levels = priorities(range(8), usual, copies, Share(0, 2))
    assert levels[1] == levels[3] == 0
    assert levels[0] >= levels[2] >= levels[4] > levels[5] == levels[6] == levels[7] > 0


def opened(levels):
    return {piece for piece, level in levels.items() if level}


def test_hosts_whose_shares_have_come_divide_the_rest_of_another_but_for_what_is_under_way():
    usual, copies = [3] * 60, [1] * 60
    left = range(0, 60, 3)
    helped = [opened(priorities(left, usual, copies, Share(rank, 3))) for rank in (1, 2)]
    assert all(helped)
    assert not helped[0] & helped[1]
    assert helped[0] | helped[1] == set(left) - {0}


def test_a_helper_begins_at_the_end_to_which_the_owner_comes_last():
    usual, copies = [3] * 60, [1] * 60
    helped = priorities(range(0, 60, 3), usual, copies, Share(1, 3))
    own = priorities(range(0, 60, 3), usual, copies, Share(0, 3))
    first, last = min(opened(helped)), max(opened(helped))
    assert helped[last] > helped[first]
    assert own[last] < own[0]


def test_a_host_with_enough_of_its_own_helps_nobody():
    levels = priorities(range(60), [3] * 60, [1] * 60, Share(1, 3))
    assert opened(levels) == set(range(1, 60, 3))


def test_what_a_helper_has_begun_it_brings_to_an_end():
    usual, copies = [3] * 60, [1] * 60
    assert not opened(priorities([0], usual, copies, Share(1, 3)))
    assert opened(priorities([0], usual, copies, Share(1, 3), begun={0})) == {0}


def test_where_only_what_is_not_brought_by_its_owner_is_left_a_host_asks_for_it():
    for rank in range(4):
        assert all(priorities([7], [3] * 8, [1] * 8, Share(rank, 4), patient=False).values())


def test_patience_is_two_seconds_and_longer_where_pieces_have_taken_longer_but_by_steps():
    patience = Patience(0.0)
    assert patience.lasts(9, 1.9)
    assert patience.lasts(9, 3.8)
    assert not patience.lasts(9, 4.0)
    assert not patience.lasts(8, 20.0)
    assert patience.lasts(8, 23.9)
    assert not patience.lasts(8, 24.1)


def test_a_host_soon_looks_again_if_only_libtorrent_takes_long(monkeypatch):
    now, looked = [0.0], []

    def peers():
        looked.append(now[0])
        now[0] += 1.0
        return []

    clock = SimpleNamespace(monotonic=lambda: now[0], thread_time=lambda: 0.001 * len(looked))
    monkeypatch.setattr(fan_out, "time", clock)
    order = SimpleNamespace(demand=Demand(), urgency={}, layout=SimpleNamespace(piece_count=3))
    alone = SimpleNamespace(heed=lambda *_: None)
    session, handle = SimpleNamespace(peer_id=A), SimpleNamespace(get_peer_info=peers)
    divided = FanOut(session, handle, order, alone)
    divided.heed({0}, set())
    divided.heed({0}, set())
    now[0] += fan_out.TURN_S
    divided.heed({0}, set())
    assert looked == [0.0, 1.0 + fan_out.TURN_S]


def test_what_is_wanted_earlier_comes_earlier_in_the_share_and_beside_it():
    usual = [1, 1, 6, 6, 6, 6]
    levels = priorities(range(6), usual, [1, 2, 1, 2, 1, 1], Share(0, 2))
    assert levels[2] > levels[0] > levels[3] > levels[1] > levels[5] == 0


def test_what_readers_wait_for_comes_first_in_the_share_and_then_what_they_will_need():
    demanded = Demanded(waited=(8, 4), ahead=(6,))
    levels = priorities(range(10), [6] * 10, [1] * 10, Share(0, 2), demanded=demanded)
    assert levels[8] == levels[4] > levels[6] > levels[0] >= levels[2] > levels[1] == 0


def test_of_what_other_hosts_have_that_comes_first_which_readers_wait_for():
    levels = priorities(range(4), [6] * 4, [2] * 4, Share(0, 2), demanded=Demanded(waited=(3,)))
    assert levels[3] > levels[0] == levels[1] == levels[2] > 0


def test_what_readers_wait_for_is_left_to_its_owner_until_it_is_late():
    waited = (1, 3)
    levels = priorities(
        range(20), [3] * 20, [1] * 20, Share(0, 2), demanded=Demanded(waited, late={3})
    )
    assert levels[1] == 0
    assert levels[3] > levels[0] > 0


@pytest.mark.parametrize(
    ("peers", "near"),
    [
        (("10.0.0.2:1", "[fd00::1]:2"), True),
        (("10.0.0.2:1", "1.1.1.1:2"), False),
        (("host.example:1",), False),
        ((), False),
    ],
)
def test_utp_is_not_called_with_where_all_named_peers_are_in_private_networks(peers, near):
    settings = session_settings(libtorrent, SwarmSettings(peers=peers))
    assert settings.get("enable_outgoing_utp", True) is not near


@pytest.mark.parametrize(
    ("left_out", "near"),
    [
        ({"dht": False, "trackers": False}, True),
        ({"dht": False}, False),
        ({"trackers": False}, False),
        ({"dht": False, "trackers": False, "lsd": False}, False),
        ({"dht": False, "trackers": False, "discovery": False}, False),
        ({"dht": False, "trackers": False, "peers": ("1.1.1.1:2",)}, False),
    ],
)
def test_utp_is_not_called_with_where_peers_can_only_be_found_in_the_local_network(left_out, near):
    settings = session_settings(libtorrent, SwarmSettings(**left_out))
    assert settings.get("enable_outgoing_utp", True) is not near


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return root, publish_files(root, {"a": content(24 * PIECE), "b": content(24 * PIECE)}, PIECE)


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def host(port, peers, torrent, store, **options):
    settings = dataclasses.replace(SwarmSettings.loopback(peers), listen=f"127.0.0.1:{port}")
    source = Swarm(parse_torrent(torrent), settings)
    return fetch(store, source, limits=Limits(metadata_s=20, stall_s=20), **options)


@pytest.mark.slow
def test_a_slow_seed_sends_four_hosts_little_more_than_one_copy(tmp_path, published):
    root, torrent = published
    size = 48 * PIECE
    slow = dataclasses.replace(SwarmSettings.loopback(), up=400_000)
    ports = free_ports(4)
    with seed(torrent, root, slow) as seeder, ThreadPoolExecutor(4) as pool:
        peers = tuple(f"127.0.0.1:{port}" for port in (seeder.port, *ports))

        def run(port):
            return list(host(port, peers, torrent, Store(tmp_path / str(port))))[-1]

        assert all(isinstance(end, Outcome) for end in pool.map(run, ports))
        assert seeder.uploaded() < 1.6 * size


@pytest.mark.slow
def test_a_host_that_comes_late_is_given_what_the_seed_has_sent_already(tmp_path, published):
    root, torrent = published
    slow = dataclasses.replace(SwarmSettings.loopback(), up=400_000)
    ports = free_ports(3)
    under_way = threading.Event()
    with seed(torrent, root, slow) as seeder, ThreadPoolExecutor(3) as pool:
        peers = tuple(f"127.0.0.1:{port}" for port in (seeder.port, *ports))

        def run(port, late):
            if late:
                assert under_way.wait(20)
            for event in host(port, peers, torrent, Store(tmp_path / str(port))):
                if isinstance(event, Status) and event.done > 8 * PIECE:
                    under_way.set()
            return event

        assert all(isinstance(end, Outcome) for end in pool.map(run, ports, [False, False, True]))


@pytest.mark.slow
def test_hosts_go_on_with_another_seed_where_the_one_that_they_divide_goes_away(
    tmp_path, published
):
    root, torrent = published
    slow = dataclasses.replace(SwarmSettings.loopback(), up=400_000)
    first, second, *ports = free_ports(4)
    peers = tuple(f"127.0.0.1:{port}" for port in (first, second, *ports))
    under_way = threading.Event()
    with ThreadPoolExecutor(2) as pool:

        def run(port):
            for event in host(port, peers, torrent, Store(tmp_path / str(port))):
                if isinstance(event, Status) and event.done > 8 * PIECE:
                    under_way.set()
            return event

        with seed(torrent, root, dataclasses.replace(slow, listen=f"127.0.0.1:{first}")):
            ends = [pool.submit(run, port) for port in ports]
            assert under_way.wait(20)
        assert not any(end.done() for end in ends)
        with seed(torrent, root, dataclasses.replace(slow, listen=f"127.0.0.1:{second}")):
            assert all(isinstance(end.result(), Outcome) for end in ends)


@pytest.mark.slow
def test_readers_that_wait_for_the_same_share_what_the_seed_sends(tmp_path, published):
    root, torrent = published
    slow = dataclasses.replace(SwarmSettings.loopback(), up=400_000)
    ports = free_ports(4)
    with seed(torrent, root, slow) as seeder, ThreadPoolExecutor(4) as pool:
        peers = tuple(f"127.0.0.1:{port}" for port in (seeder.port, *ports))

        def run(port):
            store = Arriving(tmp_path / str(port))
            with store.filled(host(port, peers, torrent, store, demand=store.demand)):
                layout = store.layout()
                for file in sorted(layout.payload, key=lambda file: file.path, reverse=True):
                    store.require(PurePosixPath(file.path))

        list(pool.map(run, ports))
        assert seeder.uploaded() < 1.6 * 48 * PIECE
