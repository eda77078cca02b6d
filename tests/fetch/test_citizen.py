"""A citizen of the swarm: seeding what is proven, limits, proxy, encryption, trackers."""

import base64
import contextlib
import dataclasses
import http.server
import json
import re
import select
import signal
import socket
import threading
import time

import libtorrent
import pytest
from support.damage import spoil
from support.listener import Listener
from support.program import grokfetch, invoke, started
from support.release import publish_files
from support.torrents import content, torrent_of

from grokfetch import errors
from grokfetch.commands.seed import Goal, Unchanged
from grokfetch.commands.value_types import Rate, proxy_of
from grokfetch.events import Outcome
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.swarm import Proxy, Swarm, SwarmSettings, seed
from grokfetch.fetch.swarm.session import session_settings
from grokfetch.folder.lock import SEEDER, read_owner
from grokfetch.folder.store import Store
from grokfetch.torrent.metainfo import parse_torrent

PIECE = 1 << 15
FILES = {"a": content(20 * PIECE), "b": content(11 * PIECE + 5), "c": content(77)}
SIZE = sum(map(len, FILES.values()))
HERE = SwarmSettings.loopback()
LIMITS = Limits(metadata_s=20, stall_s=20)
LOOPBACK = ("--listen", "127.0.0.1:0", "--no-discovery")


@pytest.fixture(scope="module", params=["v1", "v2", "hybrid"])
def published(request, tmp_path_factory):
    """(folder, torrent) in each version of BitTorrent."""
    folder = tmp_path_factory.mktemp(request.param)
    return folder, publish_files(folder, FILES, PIECE, request.param)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    return folder, publish_files(folder, FILES, PIECE)


def get(root, torrent, port, limits=LIMITS, **settings):
    """Fetch from one peer; the last event."""
    known = dataclasses.replace(HERE, peers=(f"127.0.0.1:{port}",) if port else (), **settings)
    return list(fetch(Store(root), Swarm(parse_torrent(torrent), known), limits=limits))[-1]


@contextlib.contextmanager
def seeding(*arguments):
    """The program in a separate process and its port, once it seeds; it must end by itself."""
    with started(*arguments, *LOOPBACK, until="sharing") as (child, lines):
        yield child, int(re.search(r"port (\d+)", lines[-1])[1])
        child.wait(20)


@pytest.fixture
def whole(tmp_path, published):
    """A folder that was fetched, and its torrent."""
    folder, torrent = published
    with seed(torrent, folder, HERE) as seeder:
        get(tmp_path / "whole", torrent, seeder.port)
    return tmp_path / "whole", torrent


# --- seeding -------------------------------------------------------------------------------------


def test_a_fetched_folder_is_shared_until_the_ratio_is_reached(tmp_path, whole):
    folder, torrent = whole
    with seeding("seed", folder, "--ratio", "1") as (child, port):
        pieces = Store(folder).layout().piece_count
        assert get(tmp_path / "new", torrent, port) == Outcome(SIZE, pieces, 0)
    assert child.returncode == 0


@pytest.mark.parametrize(
    "published",
    ["hybrid", *(pytest.param(version, marks=pytest.mark.slow) for version in ("v1", "v2"))],
    indirect=True,
)
def test_only_what_is_proven_is_shared(tmp_path, whole):
    folder, torrent = whole
    spoil(folder / "top/a", 5)
    layout = Store(folder).layout()
    doubted = set(layout.pieces_over(layout.payload[0]))
    with seeding("seed", folder) as (child, port):
        with pytest.raises(errors.Stalled):
            get(tmp_path / "new", torrent, port, Limits(stall_s=1, save_s=0))
        child.send_signal(signal.SIGINT)
    assert Store(tmp_path / "new").record().pieces == set(range(layout.piece_count)) - doubted


def test_ctrl_c_ends_seeding_well_and_says_what_was_shared(whole):
    with seeding("seed", whole[0]) as (child, _):
        assert read_owner(Store(whole[0]).state, SEEDER).pid == child.pid
        child.send_signal(signal.SIGINT)
        assert re.search(r"0 B uploaded in .*, ratio 0\.00\n$", child.stderr.read())
    assert child.returncode == 0
    assert read_owner(Store(whole[0]).state, SEEDER) is None


def test_fetch_goes_on_seeding_if_it_is_told_to(tmp_path, hybrid):
    folder, torrent = hybrid
    with seed(torrent, folder, HERE) as seeder:
        arguments = ("fetch", folder / "top.torrent", "--to", tmp_path / "one", "--seed")
        peer = ("--peer", f"127.0.0.1:{seeder.port}")
        with seeding(*arguments, "--ratio", "1", *peer) as (child, port):
            before = seeder.uploaded()
            get(tmp_path / "two", torrent, port)
            assert seeder.uploaded() == before
    assert child.returncode == 0
    assert (tmp_path / "two/top/a").read_bytes() == FILES["a"]


def test_seeding_ends_when_its_time_is_over(whole):
    result = invoke("seed", whole[0], "--for", "0.1s", *LOOPBACK)
    assert "ratio 0.00" in result.stderr


def test_a_machine_reads_how_seeding_goes(whole):
    text = grokfetch("seed", whole[0], "--for", "0.1s", "--json", *LOOPBACK)
    first, sharing, finished = map(json.loads, text.splitlines())
    assert (first["event"], first["command"], first["schema"]) == ("started", "seed", 1)
    assert sharing["event"] == "seeding"
    assert 0 < sharing["port"] < 65536
    assert sharing["pieces"] == len(Store(whole[0]).record().pieces)
    assert (sharing["uploaded"], sharing["peers"]) == (0, 0)
    assert finished["event"] == "finished"
    assert (finished["uploaded"], finished["ratio"]) == (0, 0)


def test_while_it_is_shared_a_folder_is_read_and_not_written(whole):
    folder, _ = whole
    with seeding("seed", folder) as (child, _):
        with pytest.raises(errors.StateLocked), Store(folder).lock():
            pass
        with Store(folder).lock(exclusive=False):
            pass
        child.send_signal(signal.SIGINT)


def test_a_file_that_changes_is_shared_no_more(whole):
    store = Store(whole[0])
    look = Unchanged(store, store.torrent(), store.layout())
    look.again()
    spoil(whole[0] / "top/b", 5)
    with pytest.raises(errors.NotProven, match="changed"):
        look.again()


def test_a_folder_without_anything_proven_is_not_shared(tmp_path, whole):
    folder, _ = whole
    for name in FILES:
        spoil(folder / "top" / name, 5)
    grokfetch("seed", folder, *LOOPBACK, code=errors.NotProven.exit_code)
    tmp_path.joinpath("empty").mkdir()
    grokfetch("seed", tmp_path / "empty", *LOOPBACK, code=errors.StateMissing.exit_code)


def test_the_goal_is_whichever_comes_first():
    assert not Goal().reached(1e9, 1e9)
    assert Goal(ratio=2.0, seconds=60).reached(2.0, 0)
    assert Goal(ratio=2.0, seconds=60).reached(0, 60)
    assert not Goal(ratio=2.0, seconds=60).reached(1.9, 59)


@pytest.mark.parametrize("arguments", [("--for", "soon"), ("--ratio", "0"), ("--up", "fast")])
def test_goals_and_rates_that_are_none_are_wrong_calls(tmp_path, arguments):
    grokfetch("seed", tmp_path, *arguments, code=2)


def test_a_goal_without_seeding_is_a_wrong_call(tmp_path):
    grokfetch("fetch", "--to", tmp_path, "--ratio", "1", code=2)


# --- taking part ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rate"), [("1", 1), ("500k", 500_000), ("2.5M", 2_500_000), ("1G", 10**9)]
)
def test_rates_are_read(text, rate):
    assert Rate().convert(text, None, None) == rate


def test_proxies_are_read():
    assert proxy_of("socks5://h:1") == Proxy("h", 1)
    assert proxy_of("socks5://u%40:p%3a@[::1]:1080") == Proxy("::1", 1080, "u@", "p:")
    assert proxy_of("socks5h://h:1") == Proxy("h", 1)
    assert proxy_of("http://u:p@h:8080/") == Proxy("h", 8080, "u", "p", "http")
    assert "secret" not in repr(proxy_of("socks5://u:secret@h:1"))


@pytest.mark.parametrize(
    "text", ["h:1", "gopher://h:1", "http://h", "socks5://h", "socks5://h:x", "socks5://:1"]
)
def test_what_is_no_proxy_is_a_wrong_call(tmp_path, text):
    grokfetch("seed", tmp_path, "--proxy", text, code=2)


def test_each_way_to_find_peers_can_be_left_out():
    ways = ("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp")

    def on(**settings):
        found = session_settings(libtorrent, SwarmSettings(**settings))
        return [way for way in ways if found[way]]

    assert on() == list(ways)
    assert on(discovery=False) == []
    assert on(dht=False) == ["enable_lsd", "enable_upnp", "enable_natpmp"]
    assert on(lsd=False) == ["enable_dht", "enable_upnp", "enable_natpmp"]
    assert on(proxy=Proxy("h", 1)) == ["enable_dht", "enable_lsd"]
    assert on(proxy=Proxy("h", 1, kind="http")) == ["enable_lsd"]


def test_past_an_http_proxy_no_udp_is_sent():
    settings = SwarmSettings(proxy=Proxy("h", 1, kind="http"), lsd=False)
    found = session_settings(libtorrent, settings)
    assert not found["enable_outgoing_utp"]
    assert settings.asked(["udp://t:1", "http://t:1/a"]) == ["http://t:1/a"]
    assert settings.finds_peers(["http://t:1/a"])
    alone = dataclasses.replace(settings, listen="0.0.0.0:0")
    assert not alone.finds_peers(["udp://t:1"])
    assert dataclasses.replace(alone, proxy=Proxy("h", 1)).finds_peers(["udp://t:1"])


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_rate_limit_holds_among_local_peers_too(tmp_path, hybrid, way):
    folder, torrent = hybrid
    mine, theirs = ({"up": 2 * SIZE}, {}) if way == "up" else ({}, {"down": 2 * SIZE})
    with seed(torrent, folder, dataclasses.replace(HERE, **mine)) as seeder:
        start = time.monotonic()
        get(tmp_path, torrent, seeder.port, **theirs)
        assert time.monotonic() - start > 0.25


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        ("required", "required", True),
        ("required", "preferred", True),
        ("off", "preferred", True),
        ("required", "off", False),
        ("off", "required", False),
    ],
)
def test_encryption_is_agreed_on_or_there_is_no_connection(tmp_path, hybrid, one, other, meet):
    folder, torrent = hybrid
    with seed(torrent, folder, dataclasses.replace(HERE, encryption=one)) as seeder:
        if meet:
            get(tmp_path, torrent, seeder.port, encryption=other)
        else:
            with pytest.raises(errors.Stalled):
                get(tmp_path, torrent, seeder.port, Limits(stall_s=0.5), encryption=other)
            assert not seeder.uploaded()


class Socks(Listener):
    """A SOCKS5 proxy for one connection at a time that wants a user and a password."""

    def __init__(self):
        super().__init__()
        self.users = set()
        self.reached = set()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            connection.recv(262)
            connection.sendall(b"\x05\x02")
            login = connection.recv(513)
            self.users.add((login[2 : 2 + login[1]], login[3 + login[1] :]))
            connection.sendall(b"\x01\x00")
            request = connection.recv(262)
            if request[:4] != b"\x05\x01\x00\x01":
                connection.sendall(b"\x05\x07\x00\x01" + bytes(6))
                return
            target = socket.inet_ntoa(request[4:8]), int.from_bytes(request[8:10])
            with socket.create_connection(target) as other:
                self.reached.add(target[1])
                connection.sendall(b"\x05\x00\x00\x01" + bytes(6))
                self._relay(connection, other)

    def _relay(self, one, other):
        ways = {one: other, other: one}
        while True:
            for source in select.select(list(ways), [], [])[0]:
                data = source.recv(1 << 16)
                if not data:
                    return
                ways[source].sendall(data)


def test_peers_are_reached_through_the_proxy_and_only_so(tmp_path, hybrid):
    folder, torrent = hybrid
    with seed(torrent, folder, HERE) as seeder, Socks() as proxy:
        known = Proxy("127.0.0.1", proxy.port, "me", "secret")
        get(tmp_path / "a", torrent, seeder.port, proxy=known)
        assert proxy.reached == {seeder.port}
        assert (b"me", b"secret") in proxy.users
        sent = seeder.uploaded()
        gone = dataclasses.replace(known, port=1)
        with pytest.raises(errors.Stalled):
            get(tmp_path / "b", torrent, seeder.port, Limits(stall_s=0.5), proxy=gone)
        assert seeder.uploaded() == sent


class Connect(Socks):
    """An HTTP proxy that takes CONNECT, with a user and a password."""

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            request = b""
            while not request.endswith(b"\r\n\r\n"):
                data = connection.recv(4096)
                if not data:
                    return
                request += data
            first, *headers = request.decode().split("\r\n")
            method, target, _ = first.split()
            logins = [line.split()[-1] for line in headers if line.lower().startswith("proxy-auth")]
            self.users.update(base64.b64decode(login) for login in logins)
            if method != "CONNECT":
                connection.sendall(b"HTTP/1.1 405 No\r\nContent-Length: 0\r\n\r\n")
                return
            host, _, port = target.rpartition(":")
            with socket.create_connection((host, int(port))) as other:
                self.reached.add(int(port))
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                self._relay(connection, other)


def test_peers_are_reached_through_an_http_proxy(tmp_path, hybrid):
    folder, torrent = hybrid
    with seed(torrent, folder, HERE) as seeder, Connect() as proxy:
        known = Proxy("127.0.0.1", proxy.port, "me", "secret", "http")
        get(tmp_path / "a", torrent, seeder.port, proxy=known)
        assert proxy.reached == {seeder.port}
        assert proxy.users == {b"me:secret"}


class Tracker(http.server.BaseHTTPRequestHandler):
    """Answers announces with one peer and counts them."""

    def do_GET(self):
        self.server.asked.set()
        peer = bytes([127, 0, 0, 1]) + self.server.peer.to_bytes(2)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"d8:intervali60e5:peers6:" + peer + b"e")

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("place", ["nonsense", "203.0.113.7:1"])
def test_where_there_is_no_listening_nothing_is_shared(hybrid, place):
    folder, torrent = hybrid
    with (
        pytest.raises(errors.OutOfReach, match=f"cannot listen on {place}"),
        seed(torrent, folder, dataclasses.replace(HERE, listen=place)),
    ):
        pass


@pytest.mark.parametrize("trackers", [True, False])
def test_trackers_are_asked_unless_they_are_left_out(tmp_path, hybrid, trackers):
    folder, _ = hybrid
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Tracker) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        server.asked = threading.Event()
        address = f"http://127.0.0.1:{server.server_address[1]}/announce"
        torrent = torrent_of(folder / "top", PIECE, trackers=[address])
        with seed(torrent, folder, dataclasses.replace(HERE, trackers=False)) as seeder:
            server.peer = seeder.port
            if trackers:
                get(tmp_path, torrent, None)
            else:
                with pytest.raises(errors.Stalled):
                    get(tmp_path, torrent, None, Limits(stall_s=1), trackers=False)
        assert server.asked.is_set() == trackers
        server.shutdown()
