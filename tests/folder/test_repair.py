"""Repair: everything is read back first, and only what is bad comes over the wire."""

import os
from pathlib import Path, PurePosixPath

import pytest
from support.fake_swarm import FakeSwarm, write_at
from support.fetched import FILES, PIECE, SIZE, V1, V2, A, C, content_of, outcome, run
from support.program import grokfetch, invoke
from support.release import publish_files
from support.torrents import content, manifest_of

from grokfetch.errors import NotProven, Stalled
from grokfetch.events import Finding, Summary
from grokfetch.fetch import fetch
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.torrent import read_back as hashing

LOOPBACK = ("--listen", "127.0.0.1:0", "--no-discovery")


@pytest.fixture(params=[V1, V2], ids=["v1", "v2"])
def swarm(request):
    return FakeSwarm(request.param, dict(FILES))


def rot(path, offset):
    """Change a byte as a failing disk does: size and time of the file stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_rot_that_no_time_stamp_betrays_is_found_by_repair_alone_and_costs_one_piece(
    tmp_path, swarm
):
    run(tmp_path, swarm)
    rot(tmp_path / C, 2 * PIECE + 5)
    again = FakeSwarm(swarm.torrent, dict(FILES))
    assert outcome(run(tmp_path, again)).fetched == 0
    events = run(tmp_path, again, repair=True)
    findings = [event for event in events if isinstance(event, Finding)]
    assert {(found.kind, found.path) for found in findings} == {("corrupt", C)}
    assert outcome(events).fetched == len(again.fetched) == 1
    assert again.fetched[0] == findings[0].piece
    assert content_of(tmp_path) == FILES


def test_a_sound_checkpoint_is_read_once_and_nobody_is_asked(tmp_path, swarm):
    run(tmp_path, swarm)
    again = FakeSwarm(swarm.torrent, {})
    assert outcome(run(tmp_path, again, repair=True)).fetched == 0
    assert not again.orders
    assert not again.metadata_asked


def test_a_repair_that_is_interrupted_keeps_proofs_and_what_it_has_found(
    tmp_path, swarm, monkeypatch
):
    run(tmp_path, swarm)
    everything = Store(tmp_path).record().pieces
    rot(tmp_path / A, 5)
    monkeypatch.setattr(hashing, "BATCH", PIECE)
    again = FakeSwarm(swarm.torrent, dict(FILES))
    events = fetch(Store(tmp_path), again, repair=True)
    next(event for event in events if isinstance(event, Finding))
    events.close()
    assert Store(tmp_path).record().pieces == everything - {0}
    assert not again.orders


def test_a_wrong_file_that_its_digest_had_proven_is_not_believed_again(tmp_path, swarm):
    manifest = manifest_of(FILES, None, digests=True)
    run(tmp_path, swarm, manifest=manifest)
    assert all(proof.sha256 for proof in Store(tmp_path).record().files.values())
    rot(tmp_path / A, 5)
    result = outcome(run(tmp_path, FakeSwarm(swarm.torrent, dict(FILES)), repair=True))
    assert result.fetched == 1
    *_, summary = verify(Store(tmp_path))
    assert isinstance(summary, Summary)
    assert summary.complete
    assert summary.total == SIZE


def test_a_digest_does_not_vouch_for_a_file_that_an_interrupted_repair_found_bad(tmp_path, swarm):
    run(tmp_path, swarm, manifest=manifest_of(FILES, None, digests=True))
    rot(tmp_path / A, 5)
    Store(tmp_path).require(A)
    events = fetch(Store(tmp_path), FakeSwarm(swarm.torrent, {}), repair=True)
    next(event for event in events if isinstance(event, Finding))
    events.close()
    with pytest.raises(NotProven):
        Store(tmp_path).require(A)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(folder, torrent) of one larger file."""
    folder = tmp_path_factory.mktemp("published")
    return folder, publish_files(folder, {"weights": content(8 << 20)}, 1 << 18)


@pytest.mark.parametrize("command", ["fetch", "verify"])
def test_a_corrupted_byte_costs_one_piece_on_the_wire(tmp_path, published, command):
    folder, torrent = published
    target = tmp_path / "out"
    with seed(torrent, folder, SwarmSettings.loopback()) as seeder:
        peer = ("--peer", f"127.0.0.1:{seeder.port}", *LOOPBACK)
        grokfetch("fetch", folder / "top.torrent", "--to", target, *peer)
        before = seeder.uploaded()
        rot(target / "top/weights", 1_000_000)
        result = invoke(command, target, "--repair", *peer)
        assert "corrupt piece 3 top/weights" in result.output
        assert 0 < seeder.uploaded() - before <= 1 << 18
    assert grokfetch("verify", target).startswith("8,388,608 of 8,388,608 bytes proven")
    source = folder / "top/weights"
    assert Path(target, PurePosixPath("top/weights")).read_bytes() == source.read_bytes()


def test_a_repair_gives_up_after_the_time_it_is_given(tmp_path):
    run(tmp_path, FakeSwarm(V1, dict(FILES)))
    write_at(tmp_path / C, 5, b"spoiled")
    arguments = ("verify", tmp_path, "--repair", "--timeout", "0.2", *LOOPBACK)
    result = invoke(*arguments, code=Stalled.exit_code)
    assert "no way to find any" in result.stderr
