import errno
import os
import time
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.damage import make_read_only
from support.program import invoke
from support.torrents import content, lay_down, manifest_of, v1_torrent

from grokfetch.errors import NotProven, StateMissing, StorageFailed
from grokfetch.folder import record as records
from grokfetch.folder.atomic import replacing
from grokfetch.folder.record import FileProof, Record, Stamp
from grokfetch.folder.store import Store

PIECE = 32768
FILES = {"a": content(3 * PIECE), "b": content(1000), "empty": b""}
TORRENT = v1_torrent(FILES, PIECE)
A, B = PurePosixPath("top/a"), PurePosixPath("top/b")


@pytest.fixture
def store(tmp_path):
    """A folder in which every byte is proven by pieces."""
    lay_down(tmp_path, FILES)
    store = Store(tmp_path)
    with store.lock():
        store.save_manifest(manifest_of(FILES, TORRENT.v1))
        store.save_torrent(TORRENT)
        store.save_record(full_record(store))
    return store


def full_record(store, **changes):
    paths = [file.path for file in store.layout().payload]
    files = {path: FileProof(store.stamp(path), **changes) for path in paths}
    return Record(TORRENT.info_hash, frozenset(range(store.layout().piece_count)), files)


def again(store):
    return Store(store.root)


paths = st.builds(PurePosixPath, st.sampled_from(["a", "b/c", "d"]))
proofs = st.builds(
    FileProof,
    st.builds(Stamp, st.integers(0, 2**60), st.integers(0, 2**63)),
    st.none() | st.just("ab" * 32),
    writing=st.booleans(),
)


@given(
    st.builds(
        Record,
        st.none() | st.just("a" * 40),
        st.frozensets(st.integers(0, 300)),
        st.dictionaries(paths, proofs),
    )
)
def test_a_record_reads_back_as_it_was_written(record):
    assert records.decode(records.encode(record)) == record


@given(st.data())
def test_a_damaged_record_is_never_believed(data):
    text = records.encode(Record("a" * 40, frozenset({1, 2}), {A: FileProof(Stamp(1, 2))}))
    place = data.draw(st.integers(0, len(text) - 2))
    byte = data.draw(st.integers(32, 126).filter(lambda byte: byte != text[place]))
    with pytest.raises(records.RecordDamaged):
        records.decode(text[:place] + bytes([byte]) + text[place + 1 :])
    with pytest.raises(records.RecordDamaged):
        records.decode(text[:place])


def test_proven_bytes_may_be_read(store):
    for path in (A, B, PurePosixPath("top/empty")):
        again(store).require(path)
    again(store).require(A, 5, 10)


def test_a_folder_without_a_manifest_says_what_to_do(tmp_path):
    with pytest.raises(StateMissing, match="grokfetch fetch SOURCE") as caught:
        Store(tmp_path / "new").require(A)
    assert caught.value.path == str(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_missing_piece_is_refused_only_where_it_lies(store):
    with store.lock():
        record = full_record(store)
        store.save_record(Record(record.info_hash, record.pieces - {1}, record.files))
    store.require(A, 0, PIECE)
    store.require(A, 2 * PIECE, PIECE)
    for start, length in ((0, PIECE + 1), (PIECE, 1), (2 * PIECE - 1, 1), (0, None)):
        with pytest.raises(NotProven, match="piece 1 is not verified") as caught:
            store.require(A, start, length)
        assert f"grokfetch verify {store.root}" in caught.value.hint
        assert caught.value.path == str(store.root / A)


@pytest.mark.parametrize("spoil", ["content", "longer", "shorter", "gone", "time"])
def test_a_file_that_changed_since_is_not_proven(store, spoil):
    path = store.root / A
    if spoil == "content":
        path.write_bytes(content(3 * PIECE, seed=1))
        os.utime(path, ns=(1, 1))
    elif spoil == "gone":
        path.unlink()
    elif spoil == "time":
        os.utime(path, ns=(5, 5))
    else:
        os.truncate(path, 3 * PIECE + (1 if spoil == "longer" else -1))
    with pytest.raises(NotProven):
        store.require(A, 0, 1)
    store.require(B, 0, 1)


def test_bytes_beyond_the_end_are_not_proven(store):
    for start, length in ((3 * PIECE, 1), (0, 3 * PIECE + 1), (-1, 1)):
        with pytest.raises(NotProven):
            store.require(A, start, length)
    with pytest.raises(NotProven, match="does not name"):
        store.require(PurePosixPath("top/other"))


def test_what_we_were_writing_when_killed_stays_proven_unless_it_shrank(store):
    with store.lock():
        store.save_record(full_record(store, writing=True))
    os.utime(store.root / A, ns=(5, 5))
    again(store).require(A)
    os.truncate(store.root / A, 2 * PIECE)
    with pytest.raises(NotProven):
        again(store).require(A, 0, 1)


def test_pieces_of_another_torrent_prove_nothing(store):
    with store.lock():
        record = full_record(store)
        store.save_record(Record("0" * 40, record.pieces, record.files))
    with pytest.raises(NotProven):
        again(store).require(A)


def test_only_the_sha256_speaks_for_a_manifest_that_names_no_torrent(store):
    manifest = manifest_of(FILES, None, digests=True)
    with store.lock():
        store.save_manifest(manifest)
    assert not store.pieces_speak_for(A)
    with pytest.raises(NotProven, match="sha256"):
        store.require(A)
    with store.lock():
        stamp = store.stamp(A)
        store.save_record(Record(None, files={A: FileProof(stamp, manifest.file(A).sha256)}))
    again(store).require(A)
    with store.lock():
        store.save_record(Record(None, files={A: FileProof(stamp, "0" * 64)}))
    with pytest.raises(NotProven, match="sha256"):
        again(store).require(A)


@pytest.mark.parametrize("name", ["manifest.json", "metadata.torrent", "record.json"])
@pytest.mark.parametrize("spoil", [b"", b"\xff{", b"{}", b'{"schema": 999}', "half", "folder"])
def test_a_damaged_state_file_is_set_aside_with_a_warning(store, name, spoil):
    path = store.state / name
    if spoil == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(path.read_bytes()[:-40] if spoil == "half" else spoil)
    reader = again(store)
    with pytest.raises((NotProven, StateMissing)):
        reader.require(A)
    assert name in " ".join(reader.warnings)
    assert path.exists(), "a reader without the lock moves nothing"
    with reader.lock():
        reader.manifest_or_none(), reader.torrent(), reader.record()
    if spoil != "folder":
        assert not path.exists()
        assert (store.state / f"{name}.damaged-1").exists()


def test_a_second_damaged_file_does_not_replace_the_first(store):
    for number in (1, 2):
        (store.state / "record.json").write_text(f"damage {number}")
        with store.lock():
            store.record()
    assert (store.state / "record.json.damaged-1").read_text() == "damage 1"
    assert (store.state / "record.json.damaged-2").read_text() == "damage 2"


def test_an_interrupted_write_leaves_the_old_file_and_no_trace(tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


def test_a_state_file_is_on_the_disk_before_it_takes_its_place(store, monkeypatch):
    events = []
    real_sync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: events.append("sync") or real_sync(fd))
    monkeypatch.setattr(
        Path, "replace", lambda *args: events.append("rename") or real_replace(*args)
    )
    with store.lock():
        store.save_record(Record())
    assert events == ["sync", "rename", "sync"]


def test_a_full_disk_is_told_with_a_hint_and_keeps_the_old_record(store, monkeypatch):
    def full(_fd):
        raise OSError(28, "No space left on device")

    before = (store.state / "record.json").read_bytes()
    with store.lock():
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageFailed, match="make room"):
            store.save_record(Record())
    assert (store.state / "record.json").read_bytes() == before
    assert not list(store.state.glob(".*"))


def test_a_folder_that_cannot_be_written_is_read_without_a_lock(store, monkeypatch):
    make_read_only(monkeypatch)
    (store.state / "lock").unlink()
    reader = again(store)
    with reader.lock(exclusive=False):
        reader.require(A)
    with pytest.raises(StorageFailed, match="--state DIR"), reader.lock():
        pass


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("verify",), 14),
        (("verify", "--repair"), 10),
        (("fetch",), 10),
        (("seed",), 14),
        (("status",), 14),
        (("report",), 14),
        (("run", "--tokens", "1"), 14),
        (("serve",), 14),
        (("inspect",), 23),
        (("manifest",), 23),
    ],
    ids=lambda part: " ".join(part) if isinstance(part, tuple) else str(part),
)
def test_nothing_is_written_where_nothing_was_asked_for(tmp_path, arguments, code):
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    (wrong / "mine").write_text("x")
    command, *options = arguments
    invoke(command, wrong, *options, code=code)
    assert [path.name for path in wrong.iterdir()] == ["mine"]


@pytest.mark.parametrize("command", ["verify", "fetch", "seed", "status", "run"])
def test_one_level_too_deep_the_folder_that_was_begun_is_named(store, command):
    options = ("--tokens", "1") if command == "run" else ()
    deep = store.root / "top"
    told = invoke(command, deep, *options, code=10 if command == "fetch" else 14).output
    assert f"name {store.root} instead" in told
    assert not (deep / ".grokfetch").exists()


def test_state_that_would_lie_in_a_snapshot_of_hugging_faces_cache_is_told_once(tmp_path):
    root = tmp_path / "models--xai-org--grok-1/snapshots/0123abcd"
    for known, warned in ((Store(root, tmp_path / "state"), False), (Store(root), True)):
        with known.lock():
            assert ("--state DIR" in " ".join(known.warnings)) == warned
    with again(known).lock():
        assert not known.warnings[1:]
    later = Store(root)
    with later.lock():
        assert not later.warnings


def test_the_state_may_lie_elsewhere(tmp_path):
    store = Store(tmp_path / "data", tmp_path / "state")
    with store.lock():
        store.save_manifest(manifest_of(FILES, None))
    assert not (tmp_path / "data").exists()
    assert Store(tmp_path / "data", tmp_path / "state").manifest().name == "top"


def test_a_checkpoint_of_318_gb_answers_in_under_a_second(tmp_path):
    count, size, piece_length = 770, 413_000_000, 4 << 20
    from grokfetch.manifest.schema import Manifest, ManifestFile
    from grokfetch.torrent.bencode import encode
    from grokfetch.torrent.metainfo import parse_torrent

    names = [f"ckpt-0/tensor{index:05}_000" for index in range(count)]
    pieces = -(-count * size // piece_length)
    info = {
        b"name": b"top",
        b"piece length": piece_length,
        b"pieces": os.urandom(20 * pieces),
        b"files": [
            {b"length": size, b"path": [part.encode() for part in name.split("/")]}
            for name in names
        ],
    }
    torrent = parse_torrent(encode({b"info": info}))
    paths = [PurePosixPath("top") / name for name in names]
    (tmp_path / "top/ckpt-0").mkdir(parents=True)
    for path in paths:
        with (tmp_path / path).open("wb") as file:
            file.truncate(size)
    writer = Store(tmp_path)
    with writer.lock():
        writer.save_manifest(
            Manifest("top", tuple(ManifestFile(path, size) for path in paths), info_hash=torrent.v1)
        )
        writer.save_torrent(torrent)
        files = {path: FileProof(writer.stamp(path)) for path in paths}
        writer.save_record(Record(torrent.v1, frozenset(range(pieces)), files))
    start = time.perf_counter()
    reader = Store(tmp_path)
    for path in paths:
        reader.require(path)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["manifest.json", "metadata.torrent", "record.json"])
def test_a_state_file_that_the_disk_does_not_give_is_named(store, name, monkeypatch):
    real = Path.read_bytes

    def failing(path):
        if path.name == name:
            raise OSError(errno.EIO, "Input/output error")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(StorageFailed, match="Input/output error") as refused:
        again(store).require(A)
    assert refused.value.path == str(store.state / name)


def test_a_torrent_of_which_a_bit_has_changed_is_set_aside(store):
    path = store.state / "metadata.torrent"
    data = bytearray(path.read_bytes())
    data[data.index(b"6:pieces") + 20] ^= 1
    path.write_bytes(data)
    changed = again(store)
    with changed.lock():
        assert changed.torrent() is None
    assert "it has changed since it was written" in " ".join(changed.warnings)
    assert not path.exists()
