"""Several hosts that fetch from one seed: who asks it for what, and how often it sends a byte."""

import dataclasses
import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.release import publish_files
from support.torrents import content

from grokfetch.events import Outcome
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.fetch.swarm.fan_out import Share, priorities, share_of
from grokfetch.folder.store import Store
from grokfetch.torrent.metainfo import parse_torrent

PIECE = 1 << 15
SEED = (b"s" * 20, True)
A, B, C = (letter * 20 for letter in (b"a", b"b", b"c"))


def others(*ids):
    return {(peer, False) for peer in ids}


def test_hosts_of_one_seed_have_shares_that_together_are_all_and_never_overlap():
    shares = [share_of(me, {SEED, *others(*{A, B, C} - {me})}) for me in (A, B, C)]
    for piece in range(100):
        assert sum(piece in share for share in shares) == 1


@pytest.mark.parametrize(
    "peers",
    [{SEED}, others(B, C), {SEED, (b"t" * 20, True), *others(B)}, set()],
    ids=["no other host", "no seed", "two seeds", "nobody"],
)
def test_without_other_hosts_or_with_another_number_of_seeds_nothing_is_divided(peers):
    assert share_of(A, peers) is None


def test_a_host_asks_for_its_share_first_and_for_others_once_another_host_has_them():
    usual, copies = [3] * 6, [1, 1, 1, 2, 2, 2]
    levels = priorities(range(6), usual, copies, Share(0, 2))
    assert levels[1] == 0
    assert levels[0] == levels[2] == levels[4] > levels[3] == levels[5] > 0


def test_a_host_whose_share_has_come_asks_for_all_the_rest():
    assert all(priorities([1, 3, 5], [3] * 6, [1] * 6, Share(0, 2)).values())


def test_what_is_wanted_earlier_comes_earlier_in_the_share_and_beside_it():
    usual = [1, 1, 6, 6]
    levels = priorities(range(4), usual, [2] * 4, Share(0, 2))
    assert levels[2] > levels[0] > levels[3] > levels[1] > 0


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


@pytest.mark.slow
def test_a_slow_seed_sends_four_hosts_little_more_than_one_copy(tmp_path, published):
    root, torrent = published
    size = 48 * PIECE
    slow = dataclasses.replace(SwarmSettings.loopback(), up=400_000)
    ports = free_ports(4)
    with seed(torrent, root, slow) as seeder, ThreadPoolExecutor(4) as pool:
        addresses = [f"127.0.0.1:{port}" for port in (seeder.port, *ports)]

        def host(port):
            settings = dataclasses.replace(
                SwarmSettings.loopback(tuple(addresses)), listen=f"127.0.0.1:{port}"
            )
            store = Store(tmp_path / str(port))
            source = Swarm(parse_torrent(torrent), settings)
            return list(fetch(store, source, limits=Limits(metadata_s=20, stall_s=20)))[-1]

        assert all(isinstance(end, Outcome) for end in pool.map(host, ports))
        assert seeder.uploaded() < 1.6 * size
