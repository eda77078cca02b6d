"""Real libtorrent on 127.0.0.1: our own seeds in this process, and a peer that lies."""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import PurePosixPath

import pytest
from support.damage import spoil
from support.fake_swarm import TickingClock
from support.patience import wait_for
from support.peer import Peer
from support.torrents import content, lay_down, manifest_of, torrent_of

from grokfetch.errors import OutOfReach, SourceInvalid, Stalled, StorageFailed, TorrentInvalid
from grokfetch.events import Finding, Notice, Origin, Outcome, Status, Summary
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.source import Order
from grokfetch.fetch.swarm import Swarm, SwarmSettings, download, inquiry, seed
from grokfetch.fetch.swarm.tally import Tally
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.manifest.selection import Request
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.magnet import parse_magnet
from grokfetch.torrent.metainfo import encode_torrent, parse_torrent, torrent_file

PIECE = 32768
FILES = {
    "ckpt-0/a": content(40 * PIECE - 1),
    "ckpt-0/b": content(PIECE),
    "ckpt-0/c": content(25 * PIECE + 1),
    "empty": b"",
    "readme": content(100),
}
SIZE = sum(map(len, FILES.values()))
LIMITS = Limits(metadata_s=20, stall_s=20)
HERE = SwarmSettings.loopback()
ONE_VERSION = pytest.mark.parametrize(
    "torrent",
    ["hybrid", *(pytest.param(version, marks=pytest.mark.slow) for version in ("v1", "v2"))],
    indirect=True,
)
"""For tests that wait; the other versions are tested by the gate."""


@pytest.fixture(scope="session", params=["v1", "v2", "hybrid"])
def torrent(request, tmp_path_factory):
    """(folder, torrent file) of a checkpoint, for each version of BitTorrent."""
    folder = tmp_path_factory.mktemp(request.param)
    lay_down(folder, FILES)
    return folder, torrent_of(folder / "top", PIECE, version=request.param)


@pytest.fixture
def seeded(torrent):
    """A magnet link that names a running seed."""
    folder, data = torrent
    with seed(data, folder, HERE) as seeder:
        yield link(data, seeder.port)


def link(data, *ports):
    torrent = parse_torrent(data)
    topic = f"btih:{torrent.v1}" if torrent.v1 else f"btmh:1220{torrent.v2}"
    return f"magnet:?xt=urn:{topic}" + "".join(f"&x.pe=127.0.0.1:{port}" for port in ports)


def run(root, magnet, **kwargs):
    swarm = Swarm(parse_magnet(magnet), HERE)
    return list(fetch(Store(root), swarm, limits=LIMITS, **kwargs))


def check(root):
    *findings, summary = (e for e in verify(Store(root)) if isinstance(e, Finding | Summary))
    return findings, summary


def whole(root):
    findings, summary = check(root)
    there = {name: (root / "top" / name).read_bytes() for name in FILES}
    return summary.complete and not findings and there == FILES


def test_a_magnet_link_alone_becomes_proven_files(tmp_path, seeded):
    events = run(tmp_path, seeded)
    pieces = Store(tmp_path).layout().piece_count
    assert events[-1] == Outcome(SIZE, pieces, 0)
    assert not [event for event in events if isinstance(event, Finding)]
    (last,) = (event for event in events if isinstance(event, Status) and event.phase == "done")
    assert {origin.name for origin in last.sent} <= {"127.0.0.1", ""}
    assert last.sent[Origin("peer", "127.0.0.1")] >= SIZE
    assert whole(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"top", ".grokfetch"}


def test_a_second_run_needs_no_seed(tmp_path, torrent):
    folder, data = torrent
    with seed(data, folder, HERE) as seeder:
        magnet = link(data, seeder.port)
        run(tmp_path, magnet)
    assert run(tmp_path, magnet)[-1] == Outcome(SIZE, 0, 0)


def test_a_hybrid_torrent_is_fetched_by_its_v2_hash_too(tmp_path, torrent):
    folder, data = torrent
    known = parse_torrent(data)
    if known.v2 is None:
        data = torrent_of(folder / "top", PIECE, version="hybrid")
        known = parse_torrent(data)
    with seed(data, folder, HERE) as seeder:
        run(tmp_path, f"magnet:?xt=urn:btmh:1220{known.v2}&x.pe=127.0.0.1:{seeder.port}")
    assert whole(tmp_path)


def test_a_torrent_file_is_fetched_without_asking_for_metadata(tmp_path, torrent):
    folder, data = torrent
    with seed(data, folder, HERE) as seeder:
        settings = SwarmSettings.loopback((f"localhost:{seeder.port}",))
        events = list(fetch(Store(tmp_path), Swarm(parse_torrent(data), settings), limits=LIMITS))
    assert "metadata" not in {event.phase for event in events if isinstance(event, Status)}
    assert whole(tmp_path)


def test_an_abandoned_fetch_goes_on_where_it_was(tmp_path, seeded):
    swarm = Swarm(parse_magnet(seeded), HERE)
    with contextlib.closing(fetch(Store(tmp_path), swarm, limits=LIMITS)) as events:
        next(e for e in events if isinstance(e, Status) and e.pieces_done > 3)
    before = len(Store(tmp_path).record().pieces)
    assert before > 3
    pieces = Store(tmp_path).layout().piece_count
    result = run(tmp_path, seeded)[-1]
    # What had arrived but was not proven when it ended is read back, not fetched.
    assert result.fetched <= pieces - before
    assert result.rehashed <= pieces - before
    assert whole(tmp_path)


CHILD = """
import sys
from pathlib import Path
from grokfetch.events import Status
from grokfetch.fetch import Limits, fetch
from grokfetch.torrent.magnet import parse_magnet
from grokfetch.folder.store import Store
from grokfetch.fetch.swarm import Swarm, SwarmSettings
swarm = Swarm(parse_magnet(sys.argv[2]), SwarmSettings.loopback())
for event in fetch(Store(Path(sys.argv[1])), swarm, limits=Limits(20, 20, save_s=0.01)):
    if isinstance(event, Status):
        print(event.pieces_done, flush=True)
"""


@pytest.mark.parametrize(
    # SIGKILL at any moment: `test_kill`.
    "number",
    [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)],
)
def test_after_a_signal_no_proven_piece_is_fetched_again(tmp_path, torrent, number):
    folder, data = torrent
    known = parse_torrent(data)
    pieces = parse_info(known.info, known.piece_layers).piece_count
    # It cannot be over before it is interrupted: this seed lacks some of the pieces.
    with seed(data, folder, HERE, range(pieces - 10)) as seeder:
        interrupt(tmp_path, link(data, seeder.port), number, pieces // 2)
    proven = Store(tmp_path).record().pieces
    assert len(proven) >= pieces // 2 or number == signal.SIGKILL
    with seed(data, folder, HERE) as seeder:
        result = run(tmp_path, link(data, seeder.port))[-1]
        assert result.fetched + result.rehashed <= 2 * (pieces - len(proven))
        assert result.fetched <= pieces - len(proven)
        assert seeder.uploaded() <= (pieces - len(proven)) * PIECE
    assert whole(tmp_path)


def interrupt(root, magnet, number, pieces):
    """Start a fetch in another process and send a signal when some pieces are proven."""
    command = [sys.executable, "-c", CHILD, str(root), magnet]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert any(int(line) >= pieces for line in child.stdout)
        # Proven pieces are reported before the record has reached a slow disk.
        wait_for(lambda: Store(root).record().pieces)
        child.send_signal(number)
        child.stdout.read()
    assert child.returncode == -number or number == signal.SIGINT


def test_a_corrupt_byte_is_named_with_its_tensor_and_costs_one_piece(tmp_path, seeded):
    run(tmp_path, seeded)
    store = Store(tmp_path)
    with store.lock():
        store.save_manifest(manifest_of(FILES, store.torrent().info_hash))
    spoil(tmp_path / "top/ckpt-0/c", 20 * PIECE + 9000)
    findings, summary = check(tmp_path)
    assert {(found.kind, found.path, found.tensor) for found in findings} == {
        ("corrupt", PurePosixPath("top/ckpt-0/c"), "tensor of ckpt-0/c")
    }
    assert not summary.complete
    assert run(tmp_path, seeded)[-1] == Outcome(SIZE, 1, 1)
    assert whole(tmp_path)


def test_missing_and_truncated_files_are_fetched_again_and_nothing_else(tmp_path, seeded):
    run(tmp_path, seeded)
    (tmp_path / "top/ckpt-0/b").unlink()
    os.truncate(tmp_path / "top/ckpt-0/c", 20 * PIECE)
    with (tmp_path / "top/readme").open("ab") as file:
        file.write(b"tail")
    (tmp_path / "top/mine").write_text("extra")
    kinds = {(found.kind, found.path.name) for found in check(tmp_path)[0]}
    assert kinds == {("missing", "b"), ("short", "c"), ("long", "readme"), ("extra", "mine")}
    result = run(tmp_path, seeded)[-1]
    assert result.fetched <= 10
    (tmp_path / "top/mine").unlink()
    assert whole(tmp_path)


def test_a_tampered_file_without_a_record_is_adopted_but_for_the_bad_piece(tmp_path, seeded):
    lay_down(tmp_path, FILES)
    spoil(tmp_path / "top/ckpt-0/a", 5 * PIECE + 1)
    assert run(tmp_path, seeded)[-1].fetched == 1
    assert whole(tmp_path)


def test_a_file_that_cannot_be_written_ends_the_fetch(tmp_path, seeded):
    (tmp_path / "top/ckpt-0/c").mkdir(parents=True)
    with pytest.raises(StorageFailed) as caught:
        run(tmp_path, seeded)
    assert "ckpt-0/c" in str(caught.value)


@pytest.fixture
def partial_seed(tmp_path):
    """A v2 torrent, and a seed with two of its files that knows no pieces of the others."""
    lay_down(tmp_path / "whole", FILES)
    torrent = parse_torrent(torrent_of(tmp_path / "whole/top", PIECE, version="v2"))
    layout = parse_info(torrent.info, torrent.piece_layers)
    held = {name: FILES[name] for name in ("ckpt-0/a", "ckpt-0/b")}
    lay_down(tmp_path / "held", held)
    files = [layout.file(PurePosixPath("top", name)) for name in held]
    pieces = {piece for file in files for piece in layout.pieces_over(file)}
    known = {root: it for root, it in torrent.piece_layers.items() if len(it) == 40 * 32}
    partial = dataclasses.replace(torrent, piece_layers=known)
    with seed(encode_torrent(partial), tmp_path / "held", HERE, pieces) as seeder:
        yield encode_torrent(torrent), seeder.port


def test_of_a_v2_torrent_the_files_that_a_partial_seed_holds_are_fetched_and_the_rest_later(
    tmp_path, partial_seed
):
    data, port = partial_seed
    root = tmp_path / "out"
    only = Request(only=("*/a", "*/b"))
    assert run(root, link(data, port), request=only)[-1].fetched == 41
    assert check(root)[1].complete
    assert [file.path.name for file in Store(root).layout().unprovable] == ["c.part"]
    with seed(data, tmp_path / "whole", HERE) as seeder:
        assert run(root, link(data, seeder.port), request=Request())[-1].fetched == 27
    assert whole(root)
    assert Store(root).layout().unprovable == ()


def test_a_file_whose_hashes_no_peer_gives_is_named_and_asked_for_ever_more_seldom(
    tmp_path, partial_seed, monkeypatch
):
    data, port = partial_seed
    clock = TickingClock()
    answers = []

    def heeded(info, layers, **rest):
        answers.append(layers)
        # The hashes of the large file that the seed holds have come: the patience is over when they
        # have been the only ones in so many answers.
        if sum(len(layers) == 1 for layers in answers) == 8:
            clock.now += LIMITS.metadata_s + 1
        return torrent_file(info, layers, **rest)

    monkeypatch.setattr(inquiry, "torrent_file", heeded)
    swarm = Swarm(parse_magnet(link(data, port)), HERE)
    begun = time.monotonic()
    with pytest.raises(Stalled, match=r"no peer has given the hashes of top/ckpt-0/c"):
        list(fetch(Store(tmp_path / "out"), swarm, limits=LIMITS, clock=clock))
    # 10 ms, and each time twice as long.
    assert time.monotonic() - begun > 0.01 * (2**6 - 1)


def test_a_swarm_without_peers_is_silence(tmp_path, torrent):
    _, data = torrent
    swarm = Swarm(parse_magnet(link(data)), HERE)
    with pytest.raises(Stalled, match="metadata"):
        list(fetch(Store(tmp_path), swarm, limits=Limits(metadata_s=0.5)))
    with pytest.raises(Stalled, match="no data"):
        list(fetch(Store(tmp_path), Swarm(parse_torrent(data), HERE), limits=Limits(stall_s=0.5)))


def test_a_layout_that_libtorrent_understands_otherwise_is_refused(tmp_path, torrent):
    _, data = torrent
    known = parse_torrent(data)
    # One file is longer by a byte, and padding after it is shorter by a byte.
    info = known.info.replace(b"lengthi100e", b"lengthi101e")
    other = parse_info(info.replace(b"lengthi32668e", b"lengthi32667e"), known.piece_layers)
    order = Order(known, other, tmp_path, frozenset(), frozenset({0}))
    with pytest.raises(TorrentInvalid, match="otherwise"):
        next(Swarm(known, HERE).download(order))


@pytest.mark.parametrize(
    "peer", ["", "host", "host:", ":1", "host:x", "1.2.3.4:0", "1.2.3.4:70000"]
)
def test_a_peer_that_is_no_host_and_port_is_refused(torrent, peer):
    with pytest.raises(SourceInvalid, match="HOST:PORT"):
        Swarm(parse_torrent(torrent[1]), SwarmSettings.loopback((peer,)))


def test_without_libtorrent_the_platforms_are_named_and_a_finished_folder_works(
    tmp_path, seeded, monkeypatch
):
    run(tmp_path, seeded)
    monkeypatch.setitem(sys.modules, "libtorrent", None)
    assert run(tmp_path, seeded)[-1] == Outcome(SIZE, 0, 0)
    with pytest.raises(OutOfReach, match="Linux x86-64"):
        run(tmp_path / "new", seeded)


def test_importing_fetch_and_swarm_needs_neither_jax_nor_numpy_nor_libtorrent():
    code = (
        "import sys, grokfetch.fetch.swarm, grokfetch.fetch\n"
        "sys.exit(bool({'jax', 'numpy', 'libtorrent'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- peers that lie, or fall silent --------------------------------------------------------------


def test_a_peer_that_sends_wrong_data_is_banned_and_a_good_one_completes(tmp_path, torrent):
    folder, data = torrent
    known = parse_torrent(data)
    pieces = parse_info(known.info, known.piece_layers).piece_count
    short = known.v1 or known.v2[:40]
    # A liar with many pieces would make libtorrent suspect the good peer, too: of blocks from both
    # it cannot tell at once whose was wrong.
    with Peer(short, pieces, lambda _piece, _begin, length: bytes(length), has=range(2)) as liar:
        settings = SwarmSettings.loopback((f"127.0.0.1:{liar.port}",))
        events = fetch(Store(tmp_path), Swarm(known, settings), limits=LIMITS)
        with contextlib.closing(events):
            notice = next(e for e in events if isinstance(e, Notice) and "banned" in e.text)
        assert "127.0.0.1" in notice.text
        assert liar.sent
        assert Store(tmp_path).record().pieces == frozenset()
        with seed(data, folder, HERE) as seeder:
            settings = SwarmSettings.loopback(
                (f"127.0.0.1:{liar.port}", f"127.0.0.1:{seeder.port}")
            )
            list(fetch(Store(tmp_path), Swarm(known, settings), limits=LIMITS))
    assert whole(tmp_path)


@ONE_VERSION
def test_peers_that_were_all_banned_are_tried_once_more(tmp_path, torrent, monkeypatch):
    monkeypatch.setattr(download, "GIVE_UP_S", 0.5)
    _, data = torrent
    known = parse_torrent(data)
    layout = parse_info(known.info, known.piece_layers)
    honest = threading.Event()

    def block(piece, begin, length):
        if not honest.is_set():
            return bytes(length)
        return b"".join(bytes_of(part) for part in layout.segments(piece))[begin : begin + length]

    with Peer(known.v1 or known.v2[:40], layout.piece_count, block) as peer:
        settings = SwarmSettings.loopback((f"127.0.0.1:{peer.port}",))
        texts = []
        for event in fetch(Store(tmp_path), Swarm(known, settings), limits=LIMITS):
            if isinstance(event, Notice):
                texts.append(event.text)
            if texts and "banned for bad data" in texts[-1]:
                honest.set()
    assert [text for text in texts if "another chance" in text]
    assert whole(tmp_path)


@ONE_VERSION
def test_a_peer_that_falls_silent_ends_the_fetch_and_another_one_goes_on(
    tmp_path, torrent, monkeypatch
):
    monkeypatch.setattr(download, "TRAFFIC_INTERVAL_S", 0.05)
    clock = TickingClock()
    folder, data = torrent
    known = parse_torrent(data)
    layout = parse_info(known.info, known.piece_layers)

    def block(piece, begin, length):
        if peer.sent > 40:
            return None
        whole = b"".join(bytes_of(part) for part in layout.segments(piece))
        return whole[begin : begin + length]

    def look(event):
        # Whenever the fetch says how it is going a second has passed, once the peer is silent.
        if isinstance(event, Status) and event.pieces_done and peer.sent > 40:
            clock.tick()

    with Peer(known.v1 or known.v2[:40], layout.piece_count, block) as peer:
        settings = SwarmSettings.loopback((f"127.0.0.1:{peer.port}",))
        events = fetch(
            Store(tmp_path), Swarm(known, settings), limits=Limits(20, stall_s=2), clock=clock
        )
        with pytest.raises(Stalled, match="no data"):
            list(map(look, events))
    proven = Store(tmp_path).record().pieces
    assert proven
    with seed(data, folder, HERE) as seeder:
        settings = SwarmSettings.loopback((f"127.0.0.1:{seeder.port}",))
        result = list(fetch(Store(tmp_path), Swarm(known, settings), limits=LIMITS))[-1]
    assert result.fetched <= layout.piece_count - len(proven)
    assert whole(tmp_path)


def bytes_of(part):
    if part.file.pad:
        return bytes(part.length)
    data = FILES[str(part.file.path.relative_to("top"))]
    return data[part.offset : part.offset + part.length]


def test_what_peers_have_sent_is_added_up_over_connections_and_sessions():
    tally, ours, other = Tally(), ("192.0.2.1", 5000), ("192.0.2.1", 5001)
    one, two = Origin("peer", "192.0.2.1"), Origin("peer", "192.0.2.2")
    tally.look([(ours, 10), (("192.0.2.2", 1), 5), (("192.0.2.3", 1), 0)])
    assert tally.sent(15) == {one: 10, two: 5}
    # The same peer, connected anew: what the first connection has brought is not forgotten.
    tally.look([(ours, 4), (other, 1)])
    assert tally.sent(25) == {one: 15, two: 5, Origin("peer", ""): 5}
    tally.begin()
    tally.look([(ours, 2)])
    assert tally.sent(2) == {one: 17, two: 5}
