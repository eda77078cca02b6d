"""`status`: what is proven and missing, beside a running fetch and after one; takes no lock."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import socket
from collections import Counter
from itertools import pairwise
from pathlib import PurePosixPath

import pytest
from support.damage import forget, spoil
from support.fake_swarm import FakeSwarm, Killed
from support.program import HEAVY, imported_by, invoke
from support.torrents import content, lay_down, manifest_of, v1_torrent

from grokfetch import errors
from grokfetch.commands import status
from grokfetch.events import Finding, Origin, Status
from grokfetch.fetch import Limits, fetch
from grokfetch.folder import history
from grokfetch.folder.history import Sample, rates, thinned
from grokfetch.folder.journal import checked
from grokfetch.folder.lock import seeding
from grokfetch.folder.overview import overview
from grokfetch.folder.record import FileProof, Record
from grokfetch.folder.store import Store
from grokfetch.folder.survey import Group, survey
from grokfetch.folder.verify import verify
from grokfetch.manifest.schema import Manifest, ManifestTensor
from grokfetch.output.terminal import ASCII_SHADES, SHADES, Screen, screen

PIECE = 32768
FILES = {"a": content(3 * PIECE - 100), "b": content(1000), "c": content(5 * PIECE)}
TORRENT = v1_torrent(FILES, PIECE)
SIZE = sum(map(len, FILES.values()))
PIECES = -(-SIZE // PIECE)
PATIENT = Limits(metadata_s=1e9, stall_s=1e9)


@pytest.fixture
def fetched(tmp_path):
    list(fetch(Store(tmp_path), FakeSwarm(TORRENT, dict(FILES))))
    return tmp_path


def shown(root, *arguments, code=0):
    return invoke("status", root, *arguments, code=code).output


def machine(root):
    return json.loads(shown(root, "--json"))


def test_all_is_proven_after_a_fetch_and_said_so_by_what(fetched):
    text = shown(fetched)
    assert f"proven   100.0 %, {SIZE:,} of {SIZE:,} bytes, by piece hashes\n" in text
    assert "missing" not in text
    assert "files    3 proven" in text
    assert "at work  nobody" in text
    assert f"{SHADES[-1] * PIECES}\n" in text


def test_what_is_missing_is_said_in_bytes_and_pieces_and_seen_in_the_map(fetched):
    forget(fetched, 2, 3, 7)
    found = machine(fetched)
    assert found["schema"] == 1
    assert found["pieces"] == {
        "total": PIECES,
        "proven": PIECES - 3,
        "missing": [[2, 3], [7, 7]],
    }
    assert found["bytes"]["proven"] == SIZE - 3 * PIECE
    assert found["not_proven"] == {"top/a": "begun", "top/b": "begun", "top/c": "begun"}
    none, all_ = SHADES[0], SHADES[-1]
    row = "".join(none if piece in {2, 3, 7} else all_ for piece in range(PIECES))
    assert f"\n{row}\n" in shown(fetched)
    assert f"missing  {3 * PIECE / 1000:.1f} kB, 3 of {PIECES} pieces" in shown(fetched)


@pytest.mark.parametrize("change", ["touched", "cut", "gone"])
def test_a_file_that_has_changed_counts_as_not_proven(fetched, change):
    path = fetched / "top/c"
    {
        "touched": lambda: os.utime(path, (1, 1)),
        "cut": lambda: os.truncate(path, 10),
        "gone": path.unlink,
    }[change]()
    found = machine(fetched)
    assert found["not_proven"]["top/c"] == ("absent" if change == "gone" else "changed")
    assert found["bytes"]["proven"] <= SIZE - len(FILES["c"])
    if change != "gone":
        assert "1 changed since they were verified: top/c" in shown(fetched)


def test_status_hashes_nothing_writes_nothing_and_takes_no_lock(fetched, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in fetched.rglob("*")}
    monkeypatch.setattr("fcntl.flock", None)
    monkeypatch.setattr("os.preadv", None)
    machine(fetched)
    assert {path: path.stat().st_mtime_ns for path in fetched.rglob("*")} == before


def test_beside_a_running_fetch_status_tells_who_is_at_work_and_how_fast(tmp_path):
    store, seen = Store(tmp_path), 0
    events = fetch(store, FakeSwarm(TORRENT, dict(FILES)), limits=PATIENT, clock=Turns())
    for event in events:
        if isinstance(event, Status) and event.phase == "downloading" and event.peers:
            found = machine(tmp_path)
            assert found["owner"] == {"pid": os.getpid(), "host": socket.gethostname()}
            last = found["history"][-1]
            assert (last["phase"], last["peers"], last["rate"]) == ("downloading", 1, 1.0)
            assert f"process {os.getpid()} on " in shown(tmp_path)
            assert "from 1 peer" in shown(tmp_path)
            seen += 1
    assert seen
    assert machine(tmp_path)["owner"] is None
    assert machine(tmp_path)["history"][-1]["phase"] == "done"
    assert machine(tmp_path)["history"][-1]["proven"] == SIZE


class Turns:
    """A clock that advances by an hour each time it is read."""

    now = 0.0

    def __call__(self):
        self.now += 3600
        return self.now


def test_a_fetch_that_has_no_metadata_yet_is_told_from_a_folder_of_nobody(tmp_path):
    text = shown(tmp_path, code=errors.StateMissing.exit_code)
    assert "nothing here says" in text
    with Store(tmp_path).lock():
        text = shown(tmp_path, code=errors.StateMissing.exit_code)
        assert "has not received the torrent's metadata yet" in text


def test_layers_stand_in_numeric_order_and_the_rest_after_them(tmp_path):
    files = {f"t{index}": content(PIECE, index) for index in range(12)}
    torrent = v1_torrent(files, PIECE)
    plain = manifest_of(files, torrent.info_hash)
    names = [f"transformer/decoder_layer_{layer}/moe/w" for layer in (0, 1, 10, 2)]
    names += ["language_model/rms_norm/scale", "something/else"]
    tensors = tuple(
        ManifestTensor(name, PurePosixPath(f"top/t{index}"), "int8", (PIECE,), 0)
        for index, name in enumerate(names)
    )
    manifest = Manifest(plain.name, plain.files, info_hash=plain.info_hash, tensors=tensors)
    list(fetch(Store(tmp_path), FakeSwarm(torrent, files), manifest=manifest))
    forget(tmp_path, 2)
    assert survey(Store(tmp_path)).groups == (
        Group("layer 0", PIECE, PIECE),
        Group("layer 1", PIECE, PIECE),
        Group("layer 2", PIECE, PIECE),
        Group("layer 10", 0, PIECE),
        Group("embedding and final norm", PIECE, PIECE),
        Group("other tensors", PIECE, PIECE),
    )
    assert f"layer 10 {SHADES[0] * 8}   0.0 %" in shown(tmp_path)
    assert "layer 10: 0.0 % proven, 0 of 32,768 bytes" in shown(tmp_path, "--plain")


def test_what_a_manifests_sha256_proves_is_told_apart(tmp_path):
    lay_down(tmp_path, FILES)
    manifest = manifest_of(FILES, None, digests=True)
    store = Store(tmp_path)
    with store.lock():
        store.save_manifest(manifest)
        proofs = {f.path: FileProof(store.stamp(f.path), f.sha256) for f in manifest.files[:2]}
        store.save_record(Record(None, frozenset(), proofs))
    found = machine(tmp_path)
    assert found["bytes"]["by_pieces"] == 0
    assert found["bytes"]["by_sha256"] == len(FILES["a"]) + len(FILES["b"])
    assert "bytes, by sha256" in shown(tmp_path)
    os.utime(tmp_path / "top/a", (1, 1))
    assert machine(tmp_path)["bytes"]["by_sha256"] == len(FILES["b"])


def large(seen):
    """The same folder as one of 20,000 pieces and 64 layers, with a history and runs."""
    groups = tuple(Group(f"layer {n}", n * 1000, 63_000) for n in range(64))
    samples = tuple(Sample(60.0 * n, 60.0 * n, n, n * n, 3, n, "downloading") for n in range(100))
    sent = {Origin("peer", "192.0.2.1"): 5000, Origin("mirror", "https://host.example/x"): 4801}
    return dataclasses.replace(
        seen,
        survey=dataclasses.replace(
            seen.survey, pieces=tuple(i % 3 > 0 for i in range(20_000)), groups=groups
        ),
        history=history.History(samples, sent),
    )


@pytest.mark.parametrize("width", [20, 40, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_the_map_fills_it(fetched, width):
    seen = large(overview(Store(fetched)))
    rows = list(status.lines(seen, Screen(width), now=1e6))[1:]
    assert max(map(len, rows)) == width
    pictures = [row for row in rows if len(row) == width and set(row) <= set(SHADES)]
    assert len(pictures) == status.MAP_ROWS
    assert "\x1b" not in "".join(rows)
    layers = [number for row in rows for number in re.findall(r"layer (\d+)", row)]
    assert sorted(layers, key=int) == [str(number) for number in range(64)]


def test_plain_text_has_no_picture_and_says_one_thing_a_line(fetched):
    forget(fetched, 2, 3, 7)
    text = shown(fetched, "--plain")
    assert text.isascii()
    assert "pieces missing: 2 to 3, 7\n" in text
    assert all(": " in line for line in text.splitlines())
    asked = invoke("status", fetched, env={"GROKFETCH_PLAIN": "1", "COLUMNS": "30"})
    assert re.sub(r"[\d.]+ s ago", "", asked.output) == re.sub(r"[\d.]+ s ago", "", text)


def test_a_terminal_that_knows_ascii_only_gets_ascii(fetched):
    view = screen(io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert view.shades == ASCII_SHADES
    text = "\n".join(status.lines(overview(Store(fetched)), view, now=0.0))
    assert text.isascii()


# --- history -------------------------------------------------------------------------------------


def test_a_history_of_days_stays_small_even_and_keeps_its_ends():
    samples = ()
    for second in range(10_000):
        sample = Sample(0.0, float(second), second, second * second, 1, 1.0, "downloading")
        samples = thinned((*samples, sample))
    assert len(samples) <= history.LIMIT
    assert samples[0].worked == 0
    assert samples[-1].worked == 9999
    gaps = [b.worked - a.worked for a, b in pairwise(samples)]
    assert max(gaps) <= 4 * 10_000 / history.LIMIT
    # Bytes per second follow from the bytes, which thinning does not change.
    found = rates(samples, 10)
    assert sum(found) / 10 == pytest.approx(9999)
    assert found == pytest.approx([(2 * n + 1) * 999.9 for n in range(10)], rel=0.02)


def test_what_somebody_waits_for_is_shown_while_the_fetch_is_at_work(fetched):
    store = Store(fetched)

    def at_work():
        yield Status("downloading", demanded=(4, 3, 6))
        with store.lock():
            assert "readers are waiting for pieces 3 to 4, 6" in " ".join(shown(fetched).split())
            assert machine(fetched)["demanded"] == [4, 3, 6]

    list(history.recorded(store, at_work()))
    assert history.read(store).demanded == ()
    assert "waiting for pieces" not in shown(fetched)
    assert machine(fetched)["demanded"] == []


def test_a_second_fetch_goes_on_with_the_history_of_the_first(tmp_path):
    swarm, store = FakeSwarm(TORRENT, dict(FILES), die_after=4), Store(tmp_path)
    with pytest.raises(Killed):
        list(fetch(store, swarm, limits=PATIENT, clock=Turns()))
    first = history.read(store)
    assert first.samples[-1].received == first.sent[Origin("peer", "192.0.2.1")] == 4 * PIECE
    store = Store(tmp_path)
    list(fetch(store, FakeSwarm(TORRENT, dict(FILES)), limits=PATIENT, clock=Turns()))
    told = machine(tmp_path)
    assert told["history"][: len(first.samples)] == [
        dataclasses.asdict(sample) for sample in first.samples
    ]
    assert [it["worked"] for it in told["history"]] == sorted(
        it["worked"] for it in told["history"]
    )
    (sender,) = told["sent"]
    assert sender == {"kind": "peer", "name": "192.0.2.1", "bytes": told["history"][-1]["received"]}
    # Pieces that the first had not recorded when it died were sent twice, or were read back.
    assert SIZE <= sender["bytes"] <= SIZE + 4 * PIECE


def test_peers_beyond_the_first_hundred_are_counted_together(tmp_path):
    sent = Counter({Origin("peer", f"192.0.2.{n}"): n for n in range(1, 151)})
    (tmp_path / ".grokfetch").mkdir()
    list(history.recorded(Store(tmp_path), (one for one in [Status("done", sent=sent)])))
    kept = Counter(history.read(Store(tmp_path)).sent)
    assert len(kept) == history.SENDERS + 1
    assert kept.total() == sent.total()
    assert kept[Origin("peer", "")] == sum(range(1, 51))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff",
        b"[]",
        b'{"schema": 9, "samples": [], "sent": []}',
        b'{"schema": 1, "samples": [[1, 2, 3, 4, "done"]]}',
        b'{"schema": 2, "sam',
        b'{"schema": 2, "samples": [[1]], "sent": []}',
        b'{"schema": 2, "samples": [["x", 1, 2, 3, 4, 5, "done"]], "sent": []}',
        b'{"schema": 2, "samples": [[1, 1e400, 2, 3, 4, 5, "done"]], "sent": []}',
        b'{"schema": 2, "samples": [[1, 1, -2, 3, 4, 5, "done"]], "sent": []}',
        b'{"schema": 2, "samples": [], "sent": [["peer", "x"]]}',
    ],
)
def test_a_damaged_history_is_ignored(fetched, text):
    (fetched / ".grokfetch/progress.json").write_bytes(text)
    assert machine(fetched)["history"] == []


def test_status_imports_nothing_heavy(fetched):
    call = f"from grokfetch.cli import main\ntry: main(['status', {str(fetched)!r}])"
    assert not imported_by(f"{call}\nexcept SystemExit: pass") & HEAVY


# --- the present ---------------------------------------------------------------------------------


def found_by(root):
    return {command: check["count"] for command, check in machine(root)["checks"].items()}


def test_what_a_repair_has_mended_is_no_finding_any_more(fetched):
    spoil(fetched / "top/c", 2 * PIECE)
    list(checked(Store(fetched), "verify", verify(Store(fetched))))
    assert found_by(fetched) == {"fetch": 0, "verify": 1}
    assert "by verify" in shown(fetched)
    list(fetch(Store(fetched), FakeSwarm(TORRENT, dict(FILES)), repair=True))
    assert found_by(fetched) == {"fetch": 0, "verify": 0}
    spoil(fetched / "top/c", 2 * PIECE)
    list(fetch(Store(fetched), FakeSwarm(TORRENT, dict(FILES)), repair=True))
    assert found_by(fetched)["fetch"] == 0


def test_an_extra_file_is_a_finding_until_it_is_gone(fetched):
    (fetched / "mine").touch()
    list(checked(Store(fetched), "verify", verify(Store(fetched))))
    assert found_by(fetched)["verify"] == 1
    (fetched / "mine").unlink()
    assert found_by(fetched)["verify"] == 0


def test_a_finding_stands_where_only_an_older_record_says_otherwise(fetched):
    finding = Finding("corrupt", PurePosixPath("top/a"), 0)
    list(checked(Store(fetched), "verify", (event for event in [finding])))
    assert found_by(fetched)["verify"] == 1


def test_a_fetch_that_has_ended_says_how_and_why(tmp_path):
    def how():
        text = shown(tmp_path)
        return re.search(r"fetch +(.*)", text)[1]

    half = FakeSwarm(TORRENT, dict(FILES), full_after=2)
    with pytest.raises(errors.StorageFailed):
        list(fetch(Store(tmp_path), half))
    assert re.fullmatch(r"failed .* ago: the disk is full", how())
    with pytest.raises(Killed):
        list(fetch(Store(tmp_path), FakeSwarm(TORRENT, dict(FILES), die_after=2)))
    assert how().endswith("then the process was killed")
    events = fetch(Store(tmp_path), FakeSwarm(TORRENT, dict(FILES)))
    next(event for event in events if isinstance(event, Status) and event.phase == "downloading")
    events.close()
    assert how().startswith("interrupted ")
    list(fetch(Store(tmp_path), FakeSwarm(TORRENT, dict(FILES))))
    assert how().startswith("complete ")
    assert machine(tmp_path)["ended"]["how"] == "complete"


def test_the_curve_of_what_is_proven_does_not_fall_at_a_new_start(fetched, monkeypatch):
    monkeypatch.setattr(history, "INTERVAL_S", 0.0)
    list(fetch(Store(fetched), FakeSwarm(TORRENT, dict(FILES)), repair=True))
    assert {sample["proven"] for sample in machine(fetched)["history"][1:]} == {SIZE}


def test_who_seeds_is_at_work_and_verify_runs_beside_it(fetched):
    state = Store(fetched).state
    with Store(fetched).lock(exclusive=False), seeding(state):
        assert machine(fetched)["seeder"]["pid"] == os.getpid()
        assert f"process {os.getpid()} on {socket.gethostname()}, which seeds" in shown(fetched)
        *_, summary = verify(Store(fetched))
        assert summary.complete
        assert not summary.recorded
    assert "at work  nobody" in shown(fetched)
    with Store(fetched).lock(), pytest.raises(errors.StateLocked):
        list(verify(Store(fetched)))
