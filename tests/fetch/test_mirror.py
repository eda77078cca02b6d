"""Mirrors: real HTTP on 127.0.0.1, well-behaved and not, alone and together with swarms."""

import contextlib
import dataclasses
import hashlib
import threading
import time
from pathlib import PurePosixPath

import pytest
from support.fake_swarm import FakeSwarm, NoPeers
from support.program import grokfetch, invoke
from support.torrents import content, lay_down, manifest_of, torrent_of, v1_torrent, v2_torrent
from support.web_server import SocksProxy, WebServer

from grokfetch.errors import OutOfReach, Stalled, StorageFailed
from grokfetch.events import Arrived, Finding, Notice, Origin, Outcome, Status, Summary
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.mirror import MirrorSettings, Together, division
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.manifest.schema import TokenizerSource, encode
from grokfetch.torrent.metainfo import encode_torrent, parse_torrent

PIECE = 32768
FILES = {
    "ckpt-0/a": content(12 * PIECE - 100),
    "ckpt-0/b c": content(1000),
    "ckpt-0/d": content(9 * PIECE),
    "empty": b"",
    "readme": content(100),
}
SIZE = sum(map(len, FILES.values()))
SETTINGS = MirrorSettings(connections=3, patience_s=20, rest_s=0.01, attempts=3)
IMPATIENT = dataclasses.replace(SETTINGS, patience_s=2)
"""For mirrors that fall silent on purpose; a busy machine makes a good one silent for a while."""
LIMITS = Limits(metadata_s=20, stall_s=20)
TOP = {f"top/{name}".replace(" ", "%20"): data for name, data in FILES.items()}
BARE = {name.replace(" ", "%20"): data for name, data in FILES.items()}


@pytest.fixture(params=["v1", "v2"])
def torrent(request):
    if request.param == "v1":
        return v1_torrent(FILES, PIECE)
    return parse_torrent(v2_torrent(FILES, PIECE))


@pytest.fixture
def top():
    """A mirror with the layout of BEP 19."""
    with WebServer(dict(TOP)) as server:
        yield server


@pytest.fixture
def bare():
    """A mirror without the torrent's top folder, as Hugging Face."""
    with WebServer({f"main/{name}": data for name, data in BARE.items()}) as server:
        yield server


@pytest.fixture
def torrent_v1():
    """A torrent for tests where the version makes no difference."""
    return v1_torrent(FILES, PIECE)


def run(root, swarm, *addresses, settings=SETTINGS, limits=LIMITS, **kwargs):
    source = Together(swarm, addresses, settings=settings, **kwargs)
    return list(fetch(Store(root), source, limits=limits))


def notices(events):
    return [event.text for event in events if isinstance(event, Notice)]


def whole(root):
    *findings, summary = (e for e in verify(Store(root)) if isinstance(e, Finding | Summary))
    there = {name: (root / "top" / name).read_bytes() for name in FILES}
    return summary.complete and not findings and there == FILES


# --- one good mirror, nobody else -----------------------------------------------------------------


def test_without_any_peer_a_web_seed_brings_everything(tmp_path, torrent, top):
    events = run(tmp_path, NoPeers(torrent), top.url)
    assert events[-1] == Outcome(SIZE, Store(tmp_path).layout().piece_count, 0)
    assert events[-2].sent == {Origin("mirror", top.url): SIZE}
    assert whole(tmp_path)
    assert not notices(events)
    assert not [event for event in events if isinstance(event, Finding)]


def test_the_torrent_and_the_magnet_link_name_web_seeds_too(tmp_path, torrent, top):
    named = dataclasses.replace(torrent, web_seeds=(f"{top.url}/",))
    run(tmp_path / "torrent", NoPeers(named))
    assert whole(tmp_path / "torrent")
    run(tmp_path / "magnet", NoPeers(torrent), strange=(top.url,))
    assert whole(tmp_path / "magnet")


@pytest.mark.parametrize("layout", ["top", "bare"])
def test_a_template_is_tried_without_and_with_the_top_folder(tmp_path, torrent, top, bare, layout):
    server = {"top": top, "bare": bare}[layout]
    address = {"top": f"{top.url}/{{path}}", "bare": f"{bare.url}/main/{{path}}"}[layout]
    events = run(tmp_path, NoPeers(torrent), address)
    assert whole(tmp_path)
    assert not notices(events)
    # The form that worked is remembered, so at most the first requests fail.
    missed = [path for path in server.asked if path not in server.files]
    assert len(missed) <= (SETTINGS.connections if layout == "top" else 0)


def test_a_torrent_of_one_file_lies_at_the_address_itself(tmp_path):
    data = FILES["ckpt-0/d"]
    info = torrent_of_one_file(data)
    with WebServer({"some/where": data, "folder/one": data}) as server:
        for index, address in enumerate(("some/where", "folder/", "folder/{path}")):
            run(tmp_path / str(index), NoPeers(info), f"{server.url}/{address}")
            assert (tmp_path / str(index) / "one").read_bytes() == data


def torrent_of_one_file(data):
    return parse_torrent(v2_torrent({"one": data}, PIECE, name="one"))


def test_redirects_are_followed_and_their_end_is_remembered(tmp_path, torrent, top, bare):
    bare.redirects = {
        f"main/{name}": f"{top.url}/top/{name}?signed=1" for name in BARE if name != "readme"
    }
    top.files |= {f"{path}?signed=1": data for path, data in TOP.items()}
    run(tmp_path, NoPeers(torrent), f"{bare.url}/main/{{path}}")
    assert whole(tmp_path)
    assert len(bare.asked) < len(top.asked)


def test_a_redirect_to_something_else_than_http_ends_the_mirror(tmp_path, torrent_v1, top, bare):
    bare.redirects = {f"main/{name}": "file:///etc/passwd" for name in BARE}
    events = run(tmp_path, NoPeers(torrent_v1), f"{bare.url}/main/{{path}}", top.url)
    assert whole(tmp_path)
    assert any("redirects to file" in text for text in notices(events))


def test_a_circle_of_redirects_ends_the_mirror(tmp_path, torrent_v1, top, bare):
    bare.redirects = {f"main/{name}": f"{bare.url}/main/{name}" for name in BARE}
    settings = dataclasses.replace(SETTINGS, attempts=1)
    events = run(
        tmp_path, NoPeers(torrent_v1), f"{bare.url}/main/{{path}}", top.url, settings=settings
    )
    assert whole(tmp_path)
    assert any("more than 10 times" in text for text in notices(events))


def test_a_second_fetch_asks_for_the_bad_piece_only(tmp_path, torrent, top):
    run(tmp_path, NoPeers(torrent), top.url)
    top.asked.clear()
    with (tmp_path / "top/ckpt-0/d").open("r+b") as file:
        file.seek(3 * PIECE + 5000)
        file.write(b"spoiled")
    again = run(tmp_path, NoPeers(torrent), top.url)[-1]
    assert again.fetched == 1
    assert len(top.asked) <= 2
    assert whole(tmp_path)


# --- bad mirrors, and a good one ------------------------------------------------------------------


def misbehave(server, how):
    paths = set(server.files)
    if how == "spoil":
        server.spoil = paths
    elif how == "halt":
        server.halt = paths
    elif how == "cut":
        server.cut_after = 0
    elif how == "no range":
        server.no_range = True
    elif how == "404":
        server.files = {}
    elif how == "gzip":
        server.headers = {"Content-Encoding": "gzip"}
    elif how == "other size":
        server.files = {path: data + b"x" for path, data in server.files.items()}
    else:
        server.status = int(how)


SAID = {
    "spoil": "sent wrong bytes for piece",
    "halt": "silent for 2 s",
    "cut": "in the middle of an answer",
    "no range": "ignores Range",
    "404": "answers 404",
    "gzip": "sends gzip",
    "other size": "bytes there, not",
    "403": "answers 403",
    "500": "answers 500",
    "429": "answers 429",
}


@pytest.mark.parametrize("how", SAID)
def test_a_bad_mirror_is_named_and_a_good_one_brings_the_rest(tmp_path, torrent_v1, top, how):
    with WebServer(dict(TOP)) as bad:
        misbehave(bad, how)
        # The good one waits until the bad one has been tried.
        tried = threading.Event()
        bad.before = lambda _path: tried.set()
        top.before = lambda _path: tried.wait(10)
        settings = dataclasses.replace(IMPATIENT if how == "halt" else SETTINGS, attempts=1)
        events = run(tmp_path, NoPeers(torrent_v1), bad.url, top.url, settings=settings)
    assert whole(tmp_path)
    assert any(bad.url in text and SAID[how] in text for text in notices(events))
    assert not any(top.url in text for text in notices(events))
    assert not [event for event in events if isinstance(event, Finding)]


def test_a_mirror_that_lacks_one_file_serves_the_others(tmp_path, torrent, top):
    with WebServer({path: data for path, data in TOP.items() if path != "top/ckpt-0/d"}) as partial:
        asked = threading.Event()
        partial.before = lambda path: asked.set() if path == "top/ckpt-0/d" else None
        top.before = lambda _path: asked.wait(10)
        events = run(tmp_path, NoPeers(torrent), partial.url, top.url)
    assert whole(tmp_path)
    lacks = [text for text in notices(events) if partial.url in text]
    assert len(lacks) == 1
    assert "top/ckpt-0/d" in lacks[0]


def test_after_a_short_outage_the_only_mirror_goes_on(tmp_path, torrent, top):
    top.status, top.failures, top.headers = 503, 2, {"Retry-After": "0"}
    events = run(tmp_path, NoPeers(torrent), top.url)
    assert whole(tmp_path)
    assert not notices(events)


def test_if_all_mirrors_lie_nothing_of_it_is_believed(tmp_path, torrent, top):
    top.spoil = set(TOP)
    with pytest.raises(Stalled, match="no data"):
        run(tmp_path, NoPeers(torrent), top.url, limits=Limits(stall_s=0.3))
    assert Store(tmp_path).record().pieces == frozenset()


def test_an_address_that_cannot_be_used_is_said_and_does_no_harm(tmp_path, torrent_v1, top):
    strange = ("ftp://host/", "http://127.0.0.1/{path}?delete=all", "udp://x")
    events = run(tmp_path, NoPeers(torrent_v1), top.url, strange=strange)
    assert whole(tmp_path)
    said = notices(events)
    assert len(said) == 3
    assert "stranger" in said[1]


# --- together with a swarm ------------------------------------------------------------------------


def test_swarm_and_mirror_share_the_pieces_and_none_comes_twice(tmp_path, torrent, top):
    swarm = FakeSwarm(torrent, dict(FILES))
    events = run(tmp_path, swarm, top.url)
    assert whole(tmp_path)
    count = Store(tmp_path).layout().piece_count
    assert events[-1] == Outcome(SIZE, count, 0)
    assert 0 < len(swarm.orders[0].want) < count
    assert max(swarm.orders[0].want) < count - 1
    assert top.asked
    assert {origin.kind for origin in events[-2].sent} == {"peer", "mirror"}
    assert events[-2].received == SIZE


def test_while_both_run_they_are_given_disjoint_pieces(tmp_path, torrent, top):
    swarm = FakeSwarm(torrent, dict(FILES))
    store = Store(tmp_path)
    source = Together(swarm, (top.url,), settings=SETTINGS)
    arrived = []
    real = source.download

    def watching(order):
        for event in real(order):
            if isinstance(event, Arrived):
                arrived.extend(event.pieces)
            yield event

    source.download = watching
    list(fetch(store, source, limits=LIMITS))
    assert sorted(arrived) == list(range(store.layout().piece_count))


def test_what_the_mirror_lacks_comes_from_the_swarm(tmp_path, torrent):
    swarm = FakeSwarm(torrent, dict(FILES))
    files = {path: data for path, data in TOP.items() if path != "top/ckpt-0/d"}
    with WebServer(files) as partial:
        events = run(tmp_path, swarm, partial.url)
    assert whole(tmp_path)
    assert any("top/ckpt-0/d" in text for text in notices(events))


@pytest.mark.parametrize("how", ["spoil", "halt", "500"])
def test_a_bad_mirror_leaves_all_to_the_swarm(tmp_path, torrent_v1, top, how):
    misbehave(top, how)
    swarm = FakeSwarm(torrent_v1, dict(FILES))
    settings = dataclasses.replace(SETTINGS, patience_s=0.5)
    events = run(tmp_path, swarm, top.url, settings=settings)
    assert whole(tmp_path)
    assert any("is dropped" in text for text in notices(events))
    assert len(swarm.fetched) == len(set(swarm.fetched))


def test_a_swarm_that_falls_silent_is_replaced_by_the_mirror(tmp_path, torrent, top, monkeypatch):
    monkeypatch.setattr(division, "QUIET_S", 0.2)
    swarm = FakeSwarm(torrent, dict(FILES), stall_after=3)
    run(tmp_path, swarm, top.url)
    assert whole(tmp_path)
    assert swarm.closed == len(swarm.orders) == 1


def test_a_mirror_that_is_far_slower_gives_its_rest_to_the_swarm(tmp_path, torrent, monkeypatch):
    monkeypatch.setattr(division, "LONG_S", 0.1)
    monkeypatch.setattr(division, "FAIR_S", 0.1)
    swarm = FakeSwarm(torrent, dict(FILES))
    settings = MirrorSettings(connections=1, patience_s=20, rest_s=0.01)
    with WebServer(dict(TOP)) as slow:
        slow.halt = set(TOP)
        run(tmp_path, swarm, slow.url, settings=settings)
    assert whole(tmp_path)
    assert len(swarm.orders) > 1


def test_without_libtorrent_mirrors_go_on_alone(tmp_path, torrent_v1, top, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "libtorrent", None)
    swarm = Swarm(torrent_v1, SwarmSettings.loopback())
    events = run(tmp_path, swarm, top.url)
    assert whole(tmp_path)
    assert any("alone" in text for text in notices(events))
    top.spoil = set(TOP)
    with pytest.raises(OutOfReach):
        run(tmp_path / "again", Swarm(torrent_v1, SwarmSettings.loopback()), top.url)


@pytest.mark.parametrize("version", ["v1", "v2", "hybrid"])
def test_a_real_seed_and_a_real_mirror_work_at_the_same_time(tmp_path, version):
    published = tmp_path / "published"
    files = {f"part{index}": content(4 << 20, index) for index in range(4)}
    lay_down(published, files)
    data = torrent_of(published / "top", 1 << 16, version=version)
    uploaded = threading.Event()
    with (
        seed(data, published, SwarmSettings.loopback()) as seeder,
        WebServer({f"top/{name}": data for name, data in files.items()}) as server,
    ):
        # The mirror's first bytes come after the seed's, so that both surely take part.
        server.before = lambda _path: uploaded.wait(20)
        settings = SwarmSettings.loopback((f"127.0.0.1:{seeder.port}",))
        source = Together(Swarm(parse_torrent(data), settings), (server.url,))
        events = []
        with contextlib.closing(fetch(Store(tmp_path / "out"), source, limits=LIMITS)) as stream:
            for event in stream:
                events.append(event)
                if seeder.uploaded():
                    uploaded.set()
        sent = seeder.uploaded()
    outcome = events[-1]
    assert isinstance(outcome, Outcome)
    assert outcome.fetched == Store(tmp_path / "out").layout().piece_count
    assert 0 < sent < outcome.total
    assert server.asked
    for name, expected in files.items():
        assert (tmp_path / "out/top" / name).read_bytes() == expected


# --- ending, and the disk -------------------------------------------------------------------------


def test_ending_early_is_prompt_and_nothing_is_written_afterwards(tmp_path, torrent, top):
    top.halt = {"top/ckpt-0/a"}
    settings = MirrorSettings(connections=3, patience_s=60)
    source = Together(NoPeers(torrent), (top.url,), settings=settings)
    before = threading.active_count()
    with contextlib.closing(fetch(Store(tmp_path), source, limits=LIMITS)) as events:
        next(e for e in events if isinstance(e, Status) and e.pieces_done > 2)
    names = [thread.name for thread in threading.enumerate()]
    assert not [name for name in names if name.startswith("mirrors")], (before, names)
    assert len(Store(tmp_path).record().pieces) > 2
    top.halt = set()
    proven = Store(tmp_path).record().pieces
    count = Store(tmp_path).layout().piece_count
    assert run(tmp_path, NoPeers(torrent), top.url)[-1].fetched <= count - len(proven)
    assert whole(tmp_path)


def test_a_limit_holds_for_mirrors_and_a_proxy_is_gone_through(tmp_path, torrent_v1, top):
    settings = dataclasses.replace(SETTINGS, down=2 * SIZE)
    start = time.monotonic()
    run(tmp_path / "slowly", NoPeers(torrent_v1), top.url, settings=settings)
    assert 0.3 < time.monotonic() - start < 5
    assert whole(tmp_path / "slowly")
    top.asked.clear()
    with SocksProxy() as proxy:
        settings = dataclasses.replace(
            SETTINGS, proxy=("socks5", "127.0.0.1", proxy.port, "me", "secret")
        )
        address = top.url.replace("127.0.0.1", "mirror.invalid")
        run(tmp_path / "proxy", NoPeers(torrent_v1), address, settings=settings)
    assert whole(tmp_path / "proxy")
    assert set(proxy.asked) == {(b"mirror.invalid", b"me", b"secret")}


def test_a_link_put_in_the_way_is_not_written_through(tmp_path, torrent_v1, top):
    secret = tmp_path / "secret"
    secret.write_bytes(b"mine")
    root = tmp_path / "out"

    def plant(_path):
        place = root / "top/ckpt-0/d"
        place.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            place.symlink_to(secret)

    top.before = plant
    with pytest.raises(StorageFailed):
        run(root, NoPeers(torrent_v1), top.url)
    assert secret.read_bytes() == b"mine"


# --- the command ----------------------------------------------------------------------------------


WORDS = content(5000, 7)
HERE = ("--listen", "127.0.0.1:0", "--no-discovery", "--timeout", "20")


def test_the_command_fetches_from_the_manifests_mirror_and_the_tokenizer_too(tmp_path, torrent_v1):
    with WebServer({f"main/{name}": data for name, data in BARE.items()} | {"t": WORDS}) as server:
        source = TokenizerSource(
            PurePosixPath("tokenizer.model"),
            len(WORDS),
            hashlib.sha256(WORDS).hexdigest(),
            f"{server.url}/t",
        )
        manifest = dataclasses.replace(
            manifest_of(FILES, torrent_v1.info_hash),
            mirrors=(f"{server.url}/main/{{path}}",),
            tokenizer=source,
        )
        tmp_path.joinpath("m.json").write_bytes(encode(manifest))
        tmp_path.joinpath("t.torrent").write_bytes(encode_torrent(torrent_v1))
        out = tmp_path / "out"
        arguments = ("fetch", tmp_path / "t.torrent", "--manifest", tmp_path / "m.json")
        text = invoke(*arguments, "--to", out, *HERE).output
        assert "tokenizer fetched" in text
        assert "proven in" in text
        assert whole(out)
        (out / "top/ckpt-0/d").unlink()
        grokfetch("fetch", out, *HERE)
        assert whole(out)
    assert (out / "tokenizer.model").read_bytes() == WORDS


def test_a_web_seed_can_be_named_by_hand_and_mirrors_can_be_left_alone(tmp_path, torrent_v1, top):
    # libtorrent must not use web seeds behind our back either.
    named = dataclasses.replace(torrent_v1, web_seeds=(f"{top.url}/",))
    tmp_path.joinpath("t.torrent").write_bytes(encode_torrent(named))
    arguments = ("fetch", tmp_path / "t.torrent", "--to", tmp_path / "out", "--web-seed")
    assert "http" in grokfetch(*arguments, "ftp://host/", code=2)
    short = ("--no-mirrors", *HERE[:-1], "0.5")
    grokfetch(*arguments, top.url, *short, code=Stalled.exit_code)
    assert top.asked == []
    grokfetch(*arguments, top.url, *HERE)
    assert whole(tmp_path / "out")
