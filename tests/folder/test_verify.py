import dataclasses
import os
import shutil
from pathlib import PurePosixPath

import pytest
from support.damage import make_read_only, spoil
from support.torrents import content, lay_down, manifest_of, v1_torrent, v2_torrent, watch_fsync

from grokfetch.errors import NotProven, StateMissing
from grokfetch.events import Finding, Progress, Summary
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.manifest.schema import ManifestFile
from grokfetch.torrent import read_back as hashing
from grokfetch.torrent.metainfo import parse_torrent

PIECE = 32768
FILES = {"a": content(3 * PIECE - 100), "b": content(1000), "c": content(2 * PIECE), "e": b""}
TORRENTS = {"v1": v1_torrent(FILES, PIECE), "v2": parse_torrent(v2_torrent(FILES, PIECE))}
SIZE = sum(map(len, FILES.values()))
A, B, C = (PurePosixPath("top", name) for name in "abc")


def begun(root, *, torrent=None, manifest=None):
    store = Store(root)
    with store.lock():
        store.save_manifest(manifest or manifest_of(FILES, torrent.info_hash))
        if torrent is not None:
            store.save_torrent(torrent)
    return store


@pytest.fixture(params=["v1", "v2", "sha256"])
def store(request, tmp_path):
    """A complete checkpoint that can be proven in one of the three ways."""
    lay_down(tmp_path, FILES)
    if request.param == "sha256":
        return begun(tmp_path, manifest=manifest_of(FILES, None, digests=True))
    return begun(tmp_path, torrent=TORRENTS[request.param])


def check(store):
    """Findings and summary of a new verification."""
    events = list(verify(Store(store.root)))
    assert isinstance(events[-1], Summary)
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done == sorted(done)
    return [event for event in events if isinstance(event, Finding)], events[-1]


def proven(store, path):
    try:
        Store(store.root).require(path)
    except NotProven:
        return False
    return True


def test_a_whole_checkpoint_is_proven_and_by_what_is_told(store):
    findings, summary = check(store)
    assert findings == []
    assert summary.complete
    assert summary.recorded
    ways = (summary.by_pieces, summary.by_sha256)
    assert ways == ((SIZE, 0) if store.torrent() else (0, SIZE))
    assert all(proven(store, path) for path in (A, B, C))


def test_every_byte_is_read_once(store, monkeypatch):
    read = []
    real = os.preadv

    def counting(*args):
        count = real(*args)
        read.append(count)
        return count

    monkeypatch.setattr(os, "preadv", counting)
    check(store)
    assert sum(read) == SIZE


def test_a_corrupt_byte_is_found_and_named_with_its_tensor(store):
    spoil(store.root / C, 5)
    findings, summary = check(store)
    hit = [finding for finding in findings if finding.path == C]
    assert {finding.kind for finding in findings} == {"corrupt"}
    assert [finding.tensor for finding in hit] == ["tensor of c"]
    assert summary.failures == len(findings)
    assert not summary.complete
    assert not proven(store, C)
    assert proven(store, A)


def test_a_corrupt_piece_of_v1_names_all_files_it_spans(tmp_path):
    lay_down(tmp_path, FILES)
    store = begun(tmp_path, torrent=TORRENTS["v1"])
    spoil(tmp_path / B, 50)
    findings, _ = check(store)
    assert [(found.path, found.piece, found.tensor) for found in findings] == [
        (A, 2, "tensor of a"),
        (B, 2, "tensor of b"),
    ]
    assert "SHA-1 of piece" in findings[0].detail


def test_one_bad_piece_does_not_hide_another(store):
    spoil(store.root / A, 5)
    spoil(store.root / C, PIECE)
    findings, _ = check(store)
    assert {finding.path for finding in findings} >= {A, C}


def test_a_missing_file_is_one_finding_and_the_rest_is_proven(store):
    (store.root / A).unlink()
    findings, summary = check(store)
    assert [(found.kind, found.path, found.tensor) for found in findings] == [
        ("missing", A, "tensor of a")
    ]
    assert not summary.complete
    assert summary.proven >= 2 * PIECE - 2000


def test_a_truncated_file_is_short_and_names_the_tensor_that_is_cut(store):
    os.truncate(store.root / C, PIECE + 7)
    findings, summary = check(store)
    assert [(found.kind, found.path, found.tensor) for found in findings] == [
        ("short", C, "tensor of c")
    ]
    assert f"{PIECE + 7:,} bytes" in findings[0].detail
    assert not summary.complete


def test_a_file_with_a_tail_is_long_and_not_proven(store):
    with (store.root / C).open("ab") as file:
        file.write(b"x")
    findings, summary = check(store)
    assert [(found.kind, found.path) for found in findings] == [("long", C)]
    assert not summary.complete
    assert not proven(store, C)


def test_extra_files_are_told_and_do_no_harm(store):
    (store.root / "notes").mkdir()
    (store.root / "notes/mine.txt").write_text("x")
    (store.root / f".{'a' * 40}.parts").write_text("x")
    findings, summary = check(store)
    assert [(found.kind, str(found.path)) for found in findings] == [("extra", "notes/mine.txt")]
    assert summary.complete


def test_a_file_that_cannot_be_read_is_not_called_corrupt(store, monkeypatch):
    real = hashing.os.open

    def failing(path, *args):
        if str(path).endswith("top/c"):
            raise OSError(5, "Input/output error")
        return real(path, *args)

    monkeypatch.setattr(hashing.os, "open", failing)
    findings, summary = check(store)
    assert {finding.kind for finding in findings} == {"unreadable"}
    assert "Input/output error" in findings[0].detail
    assert C in {finding.path for finding in findings}
    assert not summary.complete


def test_a_pipe_in_place_of_a_file_is_unreadable_and_does_not_block(store):
    (store.root / C).unlink()
    os.mkfifo(store.root / C)
    findings, summary = check(store)
    assert "short" in {finding.kind for finding in findings}
    assert not summary.complete


def test_a_linked_file_is_read_through(store, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("cache") / "blob"
    shutil.move(store.root / C, elsewhere)
    (store.root / C).symlink_to(elsewhere)
    findings, summary = check(store)
    assert findings == []
    assert summary.complete


def test_a_file_without_any_hash_is_unproven(tmp_path):
    lay_down(tmp_path, FILES)
    store = begun(tmp_path, manifest=manifest_of(FILES, None))
    findings, summary = check(store)
    assert {finding.kind for finding in findings} == {"unproven"}
    assert len(findings) == len(FILES)
    assert summary.proven == 0


def test_a_manifest_that_names_no_torrent_is_proven_by_its_digests_alone(tmp_path):
    lay_down(tmp_path, FILES)
    manifest = manifest_of(FILES, None, digests=True)
    wrong = ManifestFile(A, len(FILES["a"]), "0" * 64)
    manifest = dataclasses.replace(manifest, files=(wrong, *manifest.files[1:]))
    store = begun(tmp_path, torrent=TORRENTS["v1"], manifest=manifest)
    findings, summary = check(store)
    assert [(found.kind, found.path) for found in findings] == [("corrupt", A)]
    assert summary.by_pieces == 0
    assert summary.by_sha256 == SIZE - len(FILES["a"])
    assert not proven(store, A)
    assert proven(store, C)


def test_a_file_that_changes_while_it_is_read_is_not_proven(store, monkeypatch):
    real = hashing.os.preadv

    def touching(handle, *args):
        os.utime(store.root / C, ns=(1, 1))
        return real(handle, *args)

    monkeypatch.setattr(hashing.os, "preadv", touching)
    findings, summary = check(store)
    assert ("unproven", C) in {(finding.kind, finding.path) for finding in findings}
    assert not summary.complete
    assert summary.proven <= SIZE - len(FILES["c"])
    monkeypatch.undo()
    assert not proven(store, C)


@pytest.mark.parametrize("left", [PIECE + 7, PIECE, 0, None])
def test_a_file_that_is_truncated_or_vanishes_while_it_is_read_is_a_finding(
    store, monkeypatch, left
):
    real, whole = hashing.os.preadv, (store.root / C).stat()

    def cutting(handle, *args):
        now = os.fstat(handle)
        if (now.st_ino, now.st_size) == (whole.st_ino, whole.st_size):
            if left is None:
                (store.root / C).unlink(missing_ok=True)
            else:
                os.truncate(store.root / C, left)
        return real(handle, *args)

    monkeypatch.setattr(hashing.os, "preadv", cutting)
    findings, summary = check(store)
    assert ("unproven", C) in {(finding.kind, finding.path) for finding in findings}
    assert not summary.complete
    assert summary.proven <= SIZE - len(FILES["c"])
    monkeypatch.undo()
    assert not proven(store, C)
    assert proven(store, A)


def test_a_repaired_file_is_proven_by_the_next_look(store):
    spoil(store.root / C, 5)
    check(store)
    (store.root / C).write_bytes(FILES["c"])
    assert check(store)[1].complete
    assert proven(store, C)


def test_nothing_is_recorded_before_the_data_is_flushed(store, monkeypatch):
    synced = watch_fsync(monkeypatch)
    check(store)
    record = next(i for i, path in enumerate(synced) if "record.json" in path)
    for path in (A, B, C):
        assert str(store.root / path) in synced[:record]


def test_a_folder_that_cannot_be_written_is_verified_but_not_recorded(store, monkeypatch):
    make_read_only(monkeypatch)
    findings, summary = check(store)
    assert findings == []
    assert summary.complete
    assert not summary.recorded


def test_without_a_manifest_there_is_nothing_to_verify(tmp_path):
    with pytest.raises(StateMissing):
        list(verify(Store(tmp_path)))
