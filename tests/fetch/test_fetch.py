import contextlib
import dataclasses
import os
from pathlib import PurePosixPath

import pytest
from support.fake_swarm import FakeSwarm, Killed, TickingClock, write_at
from support.fetched import FILES, PIECE, SIZE, V1, V2, A, B, C, content_of, outcome, run, whole
from support.torrents import content, lay_down, manifest_of, v1_torrent, watch_fsync

from grokfetch.errors import Contradiction, Stalled, StorageFailed, TorrentInvalid
from grokfetch.events import Finding, Outcome, Status
from grokfetch.fetch import Limits, fetch, preflight
from grokfetch.folder import ledger as proofs
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.manifest.schema import ManifestFile
from grokfetch.torrent import read_back as hashing

EAGER = Limits(save_s=0)
"""Every result is saved at once, so that a killed fetch leaves a record."""


@pytest.fixture(params=["v1", "v2"])
def swarm(request):
    return FakeSwarm({"v1": V1, "v2": V2}[request.param], dict(FILES))


@pytest.fixture
def clock():
    return TickingClock()


def pieces_of(swarm):
    return swarm.orders[0].layout.piece_count


def test_a_torrent_becomes_proven_bytes(tmp_path, swarm):
    events = run(tmp_path, swarm)
    for path in (A, B, C, PurePosixPath("top/e")):
        Store(tmp_path).require(path)
    assert content_of(tmp_path) == FILES
    assert outcome(events) == Outcome(SIZE, pieces_of(swarm), 0)
    statuses = [event for event in events if isinstance(event, Status)]
    assert {status.phase for status in statuses} == {"metadata", "downloading", "done"}
    assert statuses[-1].done == statuses[-1].total == SIZE
    assert statuses[-1].pieces_done == statuses[-1].pieces_total == pieces_of(swarm)


def test_a_second_run_reads_nothing_asks_nothing_and_writes_nothing(tmp_path, swarm, monkeypatch):
    run(tmp_path, swarm)
    state = times(tmp_path)
    again = FakeSwarm(swarm.torrent, {})
    monkeypatch.setattr(hashing.os, "preadv", None)
    assert outcome(run(tmp_path, again)) == Outcome(SIZE, 0, 0)
    assert again.orders == []
    assert again.metadata_asked == 0
    assert times(tmp_path) == state


def times(root):
    """When the state of a folder was written, except what only `status` and `report` read."""
    shown = {"progress.json", "findings.json"}
    state = (root / ".grokfetch").glob("*.*")
    return {path.name: path.stat().st_mtime_ns for path in state if path.name not in shown}


@pytest.mark.parametrize("after", range(8))
def test_after_a_kill_no_proven_piece_is_fetched_or_hashed_again(
    tmp_path, swarm, after, monkeypatch
):
    swarm.die_after = after
    kill(tmp_path, swarm, monkeypatch)
    proven = len(Store(tmp_path).record().pieces)
    assert proven >= after - 1
    again = FakeSwarm(swarm.torrent, dict(FILES))
    result = outcome(run(tmp_path, again))
    assert result.rehashed <= pieces_of(swarm) - proven
    # At most one piece was on the disk but not in the record; the half one is fetched again.
    assert result.rehashed <= 2
    assert result.fetched == pieces_of(swarm) - after
    assert whole(tmp_path)


@pytest.mark.parametrize("unrecorded", [0, 1])
def test_after_a_kill_behind_the_last_piece_the_next_fetch_records_what_it_finds(
    tmp_path, swarm, unrecorded
):
    run(tmp_path, swarm)
    store = Store(tmp_path)
    record = store.record()
    marked = {p: dataclasses.replace(proof, writing=True) for p, proof in record.files.items()}
    pieces = record.pieces - set(range(unrecorded))
    store.save_record(dataclasses.replace(record, pieces=pieces, files=marked))
    assert outcome(run(tmp_path, FakeSwarm(swarm.torrent, {}))) == Outcome(SIZE, 0, unrecorded)
    assert Store(tmp_path).record() == record


def kill(root, swarm, monkeypatch):
    """Run until the source dies, and allow no writes after that, as with SIGKILL."""
    real = proofs.Proofs.end_writing
    monkeypatch.setattr(proofs.Proofs, "end_writing", lambda _self: None)
    with pytest.raises(Killed):
        run(root, swarm, limits=EAGER)
    monkeypatch.setattr(proofs.Proofs, "end_writing", real)


def test_after_a_kill_a_proven_file_that_was_truncated_is_looked_at_again(
    tmp_path, swarm, monkeypatch
):
    swarm.die_after = 7
    kill(tmp_path, swarm, monkeypatch)
    os.truncate(tmp_path / A, PIECE)
    again = FakeSwarm(swarm.torrent, dict(FILES))
    run(tmp_path, again)
    assert {1, 2} <= set(again.fetched)
    assert 0 not in again.fetched
    assert whole(tmp_path)


def test_files_stay_marked_until_the_source_has_stopped_writing(tmp_path, swarm):
    marked = []
    swarm.stall_after = 3
    swarm.on_close = lambda: marked.extend(
        proof.writing for proof in Store(tmp_path).record().files.values() if proof.writing
    )
    with contextlib.closing(fetch(Store(tmp_path), swarm)) as events:
        next(event for event in events if isinstance(event, Status) and event.pieces_done)
        # A reference is kept here, so the source lives until it is closed.
        assert swarm.closed == 0
    assert marked
    assert not any(proof.writing for proof in Store(tmp_path).record().files.values())


def test_ending_early_keeps_what_has_come(tmp_path, swarm):
    with contextlib.closing(fetch(Store(tmp_path), swarm, limits=EAGER)) as events:
        for event in events:
            if isinstance(event, Status) and event.pieces_done == 4:
                break
    assert swarm.closed == 1
    record = Store(tmp_path).record()
    assert len(record.pieces) >= 4
    assert not any(proof.writing for proof in record.files.values())
    again = FakeSwarm(swarm.torrent, dict(FILES))
    result = outcome(run(tmp_path, again))
    assert not set(again.fetched) & record.pieces
    assert result.rehashed <= 1
    assert whole(tmp_path)


def test_a_changed_file_is_rehashed_and_not_downloaded_again(tmp_path, swarm):
    run(tmp_path, swarm)
    os.utime(tmp_path / C, ns=(1, 1))
    again = FakeSwarm(swarm.torrent, {})
    result = outcome(run(tmp_path, again))
    assert result.fetched == 0
    assert result.rehashed in (5, 6)
    Store(tmp_path).require(C)


def test_a_corrupted_byte_costs_one_piece(tmp_path, swarm):
    run(tmp_path, swarm)
    spoil = 2 * PIECE + 5000
    write_at(tmp_path / C, spoil, b"spoiled")
    findings = [event for event in verify(Store(tmp_path)) if isinstance(event, Finding)]
    [piece] = {finding.piece for finding in findings}
    again = FakeSwarm(swarm.torrent, dict(FILES))
    result = outcome(run(tmp_path, again))
    assert again.fetched == [piece]
    assert result == Outcome(SIZE, 1, 1)
    assert whole(tmp_path)


def test_what_lies_there_already_is_adopted(tmp_path, swarm):
    lay_down(tmp_path, FILES)
    (tmp_path / A).unlink()
    run(tmp_path, swarm)
    assert len(swarm.fetched) in (3, 4)
    assert whole(tmp_path)


def test_a_complete_copy_needs_no_source(tmp_path, swarm):
    lay_down(tmp_path, FILES)
    result = outcome(run(tmp_path, FakeSwarm(swarm.torrent, {})))
    assert result.fetched == 0
    assert result.rehashed > 0
    assert whole(tmp_path)
    assert outcome(run(tmp_path, FakeSwarm(swarm.torrent, {}))).rehashed == 0


def test_a_hole_is_not_hashed(tmp_path, swarm):
    lay_down(tmp_path, {"a": b"", "b": b"", "c": b""})
    os.truncate(tmp_path / C, 5 * PIECE)
    result = outcome(run(tmp_path, swarm))
    assert result.rehashed == 0
    assert whole(tmp_path)


def test_a_hole_that_is_meant_to_be_zeros_is_adopted(tmp_path):
    files = {"a": bytes(4 * PIECE), "b": content(10)}
    torrent = v1_torrent(files, PIECE)
    lay_down(tmp_path, {"a": b"", "b": files["b"]})
    os.truncate(tmp_path / A, 4 * PIECE)
    assert outcome(run(tmp_path, FakeSwarm(torrent, files))).fetched == 0


def test_a_long_file_is_cut_and_told(tmp_path, swarm):
    run(tmp_path, swarm)
    with (tmp_path / C).open("ab") as file:
        file.write(b"tail")
    events = run(tmp_path, FakeSwarm(swarm.torrent, {}))
    assert [event.kind for event in events if isinstance(event, Finding)] == ["long"]
    assert whole(tmp_path)


def test_a_piece_that_reads_back_wrong_is_asked_for_again(tmp_path, swarm):
    swarm.corrupt = {3: 1}
    events = run(tmp_path, swarm)
    found = [event for event in events if isinstance(event, Finding)]
    assert {(event.kind, event.piece) for event in found} == {("corrupt", 3)}
    assert swarm.orders[1].want == {3}
    assert whole(tmp_path)


def test_a_piece_that_always_reads_back_wrong_ends_the_fetch_and_loses_nothing(tmp_path, swarm):
    swarm.corrupt = {3: 1000}
    with pytest.raises(StorageFailed, match="piece 3 did not read back right"):
        run(tmp_path, swarm)
    assert len(swarm.orders) == 1 + Limits().attempts
    assert len(Store(tmp_path).record().pieces) == pieces_of(swarm) - 1


def test_silence_ends_the_fetch_and_keeps_what_came(tmp_path, swarm, clock):
    swarm.stall_after, swarm.tick = 4, clock.tick
    with pytest.raises(Stalled, match="no data for 30 s") as caught:
        run(tmp_path, swarm, limits=Limits(stall_s=30), clock=clock)
    assert f"grokfetch fetch {tmp_path}" in caught.value.hint
    assert 30 < clock.now < 35
    assert len(Store(tmp_path).record().pieces) == 4


def test_no_metadata_ends_the_fetch(tmp_path, swarm, clock):
    swarm.no_metadata, swarm.tick = True, clock.tick
    with pytest.raises(Stalled, match="no metadata"):
        run(tmp_path, swarm, limits=Limits(metadata_s=30), clock=clock)
    assert 30 < clock.now < 35


def test_a_full_disk_ends_the_fetch_and_keeps_what_came(tmp_path, swarm):
    swarm.full_after = 4
    with pytest.raises(StorageFailed, match="full"):
        run(tmp_path, swarm)
    assert len(Store(tmp_path).record().pieces) == 4
    run(tmp_path, FakeSwarm(swarm.torrent, dict(FILES)))
    assert whole(tmp_path)


def test_too_little_room_is_told_before_the_first_byte(tmp_path, swarm, monkeypatch):
    free = SIZE - 1
    here = preflight.probe(tmp_path, 0)
    monkeypatch.setattr(preflight, "probe", lambda *_: dataclasses.replace(here, free=free))
    with pytest.raises(StorageFailed, match="still to come"):
        run(tmp_path, swarm)
    assert swarm.orders == []
    free = SIZE
    run(tmp_path, swarm)


def test_links_are_read_and_never_written_through(tmp_path, swarm):
    cache = tmp_path / "cache"
    lay_down(cache, FILES)
    root = tmp_path / "dir"
    (root / "top").mkdir(parents=True)
    for name in FILES:
        (root / "top" / name).symlink_to(cache / "top" / name)
    assert outcome(run(root, FakeSwarm(swarm.torrent, {}))).fetched == 0
    write_at(cache / C, 5, b"spoiled")
    spoiled = (cache / C).read_bytes()
    run(root, swarm)
    assert len(swarm.fetched) == 1
    assert whole(root)
    assert (root / A).is_symlink()
    assert (cache / C).read_bytes() == spoiled


def test_metadata_of_another_torrent_is_refused(tmp_path, swarm):
    swarm.asked = "0" * 40
    with pytest.raises(TorrentInvalid, match="metadata's info hash is"):
        run(tmp_path, swarm)
    assert not (tmp_path / ".grokfetch/metadata.torrent").exists()


def test_another_torrent_in_a_folder_begun_before_is_refused(tmp_path, swarm):
    run(tmp_path, swarm)
    other = FakeSwarm(v1_torrent({"x": b"x"}, PIECE), {"x": b"x"})
    with pytest.raises(Contradiction, match="was begun with torrent"):
        run(tmp_path, other)


def test_a_torrent_that_contradicts_the_manifest_is_refused_before_a_byte(tmp_path, swarm):
    manifest = manifest_of({**FILES, "b": b"other size"}, swarm.info_hash)
    with pytest.raises(Contradiction, match="top/b must have 10 bytes, but has 1,000 here"):
        run(tmp_path, swarm, manifest=manifest)
    assert swarm.orders == []
    state = {path.name for path in (tmp_path / ".grokfetch").iterdir()}
    assert state == {"lock", "progress.json", "findings.json"}


def test_a_manifest_of_another_torrent_without_digests_is_refused(tmp_path, swarm):
    with pytest.raises(Contradiction, match="is for torrent"):
        run(tmp_path, swarm, manifest=manifest_of(FILES, "0" * 40))


def test_a_manifest_with_digests_holds_whatever_torrent_brings_the_files(tmp_path, swarm):
    manifest = manifest_of(FILES, "0" * 40, digests=True)
    events = run(tmp_path, swarm, manifest=manifest)
    assert "hashing" in {event.phase for event in events if isinstance(event, Status)}
    Store(tmp_path).require(C)
    *_, summary = verify(Store(tmp_path))
    assert summary.by_sha256 == SIZE
    again = run(tmp_path, FakeSwarm(swarm.torrent, {}))
    assert "hashing" not in {event.phase for event in again if isinstance(event, Status)}


def test_a_torrent_with_other_content_than_the_digests_is_refused_and_not_proven(tmp_path, swarm):
    manifest = manifest_of(FILES, None, digests=True)
    wrong = ManifestFile(C, len(FILES["c"]), "0" * 64)
    files = (*manifest.files[:2], wrong, manifest.files[3])
    with pytest.raises(Contradiction, match="top/c is as the torrent has it"):
        run(tmp_path, swarm, manifest=dataclasses.replace(manifest, files=files))
    Store(tmp_path).require(A)


def test_a_manifest_keeps_its_model_and_learns_where_the_torrent_puts_files(tmp_path, swarm):
    manifest = manifest_of(FILES, None, name="elsewhere")
    manifest = dataclasses.replace(manifest, model={"emb_size": 8})
    swarm.magnet = "magnet:?xt=x"
    run(tmp_path, swarm, manifest=manifest)
    kept = Store(tmp_path).manifest()
    assert kept.model == {"emb_size": 8}
    assert kept.info_hash == swarm.info_hash
    assert kept.magnet == "magnet:?xt=x"
    assert [file.path for file in kept.files][:3] == [A, B, C]
    run(tmp_path, FakeSwarm(swarm.torrent, {}))
    assert Store(tmp_path).manifest() == kept


def test_a_damaged_record_costs_reading_and_no_download(tmp_path, swarm):
    run(tmp_path, swarm)
    (tmp_path / ".grokfetch/record.json").write_text("{")
    store = Store(tmp_path)
    result = outcome(list(fetch(store, FakeSwarm(swarm.torrent, {}))))
    assert result == Outcome(SIZE, 0, pieces_of(swarm))
    assert "set aside" in store.warnings[0]


def test_nothing_is_recorded_before_the_data_is_flushed(tmp_path, swarm, monkeypatch):
    synced = watch_fsync(monkeypatch)
    swarm.die_after = 3
    kill(tmp_path, swarm, monkeypatch)
    last = max(i for i, path in enumerate(synced) if "record.json" in path)
    assert str(tmp_path / A) in synced[:last]
    assert Store(tmp_path).record().pieces


def test_files_are_marked_before_they_are_written(tmp_path, swarm):
    marked = []
    real = swarm.download

    def looking(order):
        marked.append({p for p, proof in Store(tmp_path).record().files.items() if proof.writing})
        return real(order)

    swarm.download = looking
    run(tmp_path, swarm)
    assert marked[0] >= {A, B, C}
    assert not any(proof.writing for proof in Store(tmp_path).record().files.values())
