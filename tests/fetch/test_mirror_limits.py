"""Mirrors that limit, truncate, expire or fail: nothing is requested twice without need."""

import contextlib
import dataclasses
import math
import time
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_swarm import NoPeers
from support.torrents import content, v1_torrent
from support.web_server import WebServer

from grokfetch.errors import Stalled
from grokfetch.events import Notice
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.mirror import MirrorSettings, Together, jobs
from grokfetch.fetch.mirror.environment import Environment
from grokfetch.fetch.mirror.http import redirected
from grokfetch.fetch.mirror.rate_limit import LONGEST_REST_S, rest_asked_for
from grokfetch.fetch.mirror.state import Mirror
from grokfetch.fetch.swarm import Swarm, SwarmSettings
from grokfetch.folder.store import Store

PIECE = 32768
FILES = {"a": content(60 * PIECE - 100), "b": content(40 * PIECE)}
SIZE = sum(map(len, FILES.values()))
PATHS = {f"top/{name}": data for name, data in FILES.items()}
SETTINGS = MirrorSettings(connections=3, patience_s=5, rest_s=0.01, attempts=3)
LIMITS = Limits(metadata_s=20, stall_s=20)
TORRENT = v1_torrent(FILES, PIECE)
ALONE = SwarmSettings.loopback()


@pytest.fixture
def server():
    with WebServer(dict(PATHS)) as server:
        yield server


def run(root, *addresses, swarm=None, **settings):
    settings = dataclasses.replace(SETTINGS, **settings)
    source = Together(swarm or NoPeers(TORRENT), addresses, settings=settings)
    events = list(fetch(Store(root), source, limits=LIMITS))
    for name, data in FILES.items():
        assert (root / "top" / name).read_bytes() == data
    return [event.text for event in events if isinstance(event, Notice)]


# --- limits --------------------------------------------------------------------------------------


def test_what_a_limiting_server_refused_is_asked_for_again_in_runs_as_large_as_before(
    tmp_path, server
):
    run(tmp_path / "plain", server.url)
    plain = len(server.asked)
    server.asked.clear()
    server.status, server.failures, server.headers = 429, 4, {"Retry-After": "0"}
    assert run(tmp_path / "limited", server.url) == []
    assert len(server.asked) == plain + 4


@pytest.mark.parametrize("header", ["Retry-After", "RateLimit"])
def test_a_mirror_that_says_how_long_to_wait_is_left_alone_and_not_dropped(
    tmp_path, server, header
):
    told = {"Retry-After": "1", "RateLimit": '"api";r=0;t=1'}[header]
    server.status, server.failures, server.headers = 429, 3, {header: told}
    times = []
    server.before = lambda _path: times.append(time.monotonic())
    run(tmp_path, server.url, attempts=1)
    refused = max(times[:3])
    assert min(times[3:]) - refused >= 1 - 0.05


def test_fewer_connections_go_to_who_limits_and_more_again_later():
    mirror = Mirror("http://h/", "h", 8.0, active=8)
    mirror.limit(1.0, 0.0, SETTINGS)
    assert mirror.allowed == 4
    # Requests in flight when it limited us count once.
    mirror.limit(1.0, 0.0, SETTINGS)
    assert mirror.allowed == 4
    for _ in range(20):
        mirror.limit(math.inf, 0.0, SETTINGS)
    assert mirror.allowed == 1
    for _ in range(40):
        mirror.grow(8)
    assert mirror.allowed == 8


NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("headers", "rest_s"),
    [
        ({}, None),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "soon"}, None),
        ({"retry-after": formatdate(NOW + 90, usegmt=True)}, 90),
        ({"retry-after": formatdate(NOW - 90, usegmt=True)}, 0),
        # If the server tells its time, its clock decides.
        (
            {
                "retry-after": formatdate(NOW + 5000, usegmt=True),
                "date": formatdate(NOW + 4990, usegmt=True),
            },
            10,
        ),
        ({"ratelimit": '"resolvers";r=0;t=271'}, 271),
        ({"ratelimit": '"api";r=3;t=12, "resolvers";r=0;t=55'}, 55),
        ({"ratelimit": '"api";r=3;t=12'}, None),
        ({"ratelimit": "limit=100, remaining=0, reset=30"}, 30),
        ({"ratelimit-remaining": "0", "ratelimit-reset": "40"}, 40),
        ({"x-ratelimit-remaining": "0", "x-ratelimit-reset": str(int(NOW) + 50)}, 50),
        ({"x-ratelimit-remaining": "5", "x-ratelimit-reset": "40"}, None),
        ({"retry-after": "999999"}, LONGEST_REST_S),
    ],
)
def test_how_long_a_server_asks_to_be_left_alone(headers, rest_s):
    assert rest_asked_for(headers, NOW) == rest_s


@given(
    st.dictionaries(
        st.sampled_from(["retry-after", "ratelimit", "date", "ratelimit-reset"]), st.text()
    )
)
def test_whatever_the_headers_say_the_rest_has_bounds(headers):
    rest_s = rest_asked_for(headers, NOW)
    assert rest_s is None or 0 <= rest_s <= LONGEST_REST_S


# --- answers that end too early ------------------------------------------------------------------


@pytest.mark.parametrize("piece", [PIECE, 1 << 20])
def test_a_server_that_ends_every_answer_half_way_still_completes_and_no_byte_comes_twice(
    tmp_path, server, piece
):
    server.cut_after = 0.5
    torrent = v1_torrent(FILES, piece)
    assert run(tmp_path, server.url, swarm=NoPeers(torrent), attempts=1) == []


def test_a_server_that_sends_one_byte_at_a_time_is_dropped(tmp_path, server, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_ANSWERS", 5)
    server.cut_after = 1e-9
    with pytest.raises(Stalled, match="in the middle of an answer"):
        run(tmp_path, server.url, swarm=Swarm(TORRENT, ALONE))
    assert len(server.asked) < 200


# --- what is wrong is said, and soon -------------------------------------------------------------


def first_notice(root, *addresses, swarm=None, **settings):
    """The first message, and the seconds until it comes."""
    source = Together(
        swarm or NoPeers(TORRENT), addresses, settings=dataclasses.replace(SETTINGS, **settings)
    )
    start = time.monotonic()
    with contextlib.closing(fetch(Store(root), source, limits=LIMITS)) as events:
        text = next(event.text for event in events if isinstance(event, Notice))
    return text, time.monotonic() - start


WRONG = {
    "refused": "the connection is refused",
    "host": "the host cannot be resolved",
    "password": "a password",
    "circle": "redirects more than 10 times",
    "proxy": "ALL_PROXY names a proxy that cannot be used",
    "500": "it answers 500",
}


def make_wrong(server, how):
    """An address that is wrong in some way, and the environment to be in."""
    if how == "refused":
        return "http://127.0.0.1:1/", Environment()
    if how == "host":
        return "http://nowhere.invalid/", Environment()
    if how == "proxy":
        return server.url, Environment({"all": ("ALL_PROXY", "gopher://h:1")})
    if how == "circle":
        server.redirects = {path: f"{server.url}/{path}" for path in PATHS}
    else:
        server.status = {"password": 401, "500": 500}[how]
    return server.url, Environment()


@pytest.mark.parametrize("how", WRONG)
def test_what_is_wrong_with_a_mirror_is_said_when_it_is_first_known(tmp_path, server, how):
    address, environment = make_wrong(server, how)
    text, seconds = first_notice(tmp_path, address, rest_s=10, environment=environment)
    assert WRONG[how] in text
    assert seconds < 2


@pytest.mark.parametrize("how", WRONG)
def test_without_a_source_left_the_fetch_ends_then_and_says_why(tmp_path, server, how):
    address, environment = make_wrong(server, how)
    start = time.monotonic()
    with pytest.raises(Stalled, match=WRONG[how]) as caught:
        run(tmp_path, address, swarm=Swarm(TORRENT, ALONE), environment=environment)
    assert "no way to find any" in str(caught.value)
    assert time.monotonic() - start < 10 < LIMITS.stall_s


def test_where_peers_may_come_the_error_at_the_end_says_what_was_wrong_with_mirrors(tmp_path):
    source = Together(NoPeers(TORRENT), ("http://127.0.0.1:1/",), settings=SETTINGS)
    with pytest.raises(Stalled, match=r"no data for 1 s.*is dropped: the connection is refused"):
        list(fetch(Store(tmp_path), source, limits=Limits(stall_s=1)))


# --- addresses that expire, servers that stumble ------------------------------------------------


def test_a_signed_address_that_answers_with_a_page_once_it_has_expired_is_asked_for_anew(
    tmp_path, server, monkeypatch
):
    monkeypatch.setattr(jobs, "SPAN", 4 * PIECE)
    signed = {f"{path}?signed": data for path, data in PATHS.items()}
    server.files |= signed

    def expire(_path):
        if len(server.asked) == 5:
            server.pages = dict.fromkeys(signed, b"<html>expired")

    with WebServer({}) as front:
        front.redirects = {path: f"{server.url}/{path}?signed" for path in PATHS}
        front.before = lambda _path: server.pages.clear()
        server.before = expire
        assert run(tmp_path, front.url, connections=1) == []
        assert len(front.asked) <= 4


def test_one_ignored_range_in_many_does_not_drop_a_mirror(tmp_path, server):
    count = 0

    def ignore(_path):
        nonlocal count
        count += 1
        server.no_range = count % 5 == 0

    server.before = ignore
    notices = run(tmp_path, server.url, connections=1)
    assert notices == [f"mirror {server.url} is asked again later: it ignores Range"]


@pytest.mark.parametrize(
    ("name", "address", "there", "allowed"),
    [
        ("files.example", "10.1.2.3", "http://10.9.9.9/a", True),
        ("files.example", "10.1.2.3", "http://cache.lan/a", True),
        ("fileserver", None, "http://192.168.0.7/a", True),
        ("files.example", "10.1.2.3", "http://169.254.169.254/a", False),
        ("files.example", "10.1.2.3", "http://127.0.0.1/a", False),
        ("files.example", "93.184.216.34", "http://10.9.9.9/a", False),
        ("files.example", "93.184.216.34", "http://fileserver/a", False),
        ("files.example", None, "http://10.9.9.9/a", False),
        ("127.0.0.1", None, "http://10.9.9.9/a", True),
    ],
)
def test_a_redirect_from_the_local_network_may_lead_to_another_host_of_it(
    name, address, there, allowed
):
    server = None if address is None else (address, 80)
    with contextlib.nullcontext() if allowed else pytest.raises(Exception, match="private network"):
        assert redirected(f"http://{name}/a", there, server) == there
