"""All parts of the program agree on what is proven, and never believe changed bytes."""

import dataclasses
import os
import tempfile
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.damage import spoil
from support.torrents import content, lay_down, manifest_of, v1_torrent, v2_torrent

from grokfetch.errors import NotProven
from grokfetch.folder.ledger import Proofs
from grokfetch.folder.proven import Proven, of_torrent
from grokfetch.folder.record import FileProof, Record, Stamp
from grokfetch.folder.store import Store
from grokfetch.folder.survey import survey
from grokfetch.folder.verify import verify
from grokfetch.manifest.schema import ManifestFile
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import parse_torrent

PIECE = 16384
CHANGES = ("none", "touched", "spoilt", "cut", "longer", "gone")


def torrent_of(version, files):
    return v1_torrent(files, PIECE) if version == 1 else parse_torrent(v2_torrent(files, PIECE))


@dataclasses.dataclass(frozen=True)
class Case:
    """A checkpoint that was proven, and what has happened to it since."""

    version: int
    files: dict[str, bytes]
    digests: bool
    named: bool
    missing: frozenset[int]
    marked: frozenset[str]
    changes: dict[str, str]

    def touched(self, name):
        """Whether the file must count as changed; our own writing may touch and extend it."""
        harmless = ("none", "touched", "longer") if name in self.marked else ("none",)
        return self.changes[name] not in harmless


@st.composite
def cases(draw):
    sizes = draw(st.lists(st.integers(0, 3 * PIECE), min_size=1, max_size=5))
    files = {f"f{number}": content(size, number) for number, size in enumerate(sizes)}
    names = st.frozensets(st.sampled_from(sorted(files)))
    marked = draw(names)
    return Case(
        draw(st.sampled_from([1, 2])),
        files,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.frozensets(st.integers(0, 12), max_size=3)),
        marked,
        {
            # The mark says that we had the file open, so nobody else has written it.
            name: draw(
                st.sampled_from([it for it in CHANGES if not (name in marked and it == "spoilt")])
            )
            for name in files
        },
    )


def proven_once(root, case):
    """A folder with the record of a time when all but some pieces were proven."""
    lay_down(root, case.files)
    torrent, store = torrent_of(case.version, case.files), Store(root)
    info_hash = torrent.info_hash if case.named else None
    manifest = manifest_of(case.files, info_hash, digests=case.digests)
    with store.lock():
        store.save_manifest(manifest)
        store.save_torrent(torrent)
        pieces = frozenset(range(store.layout().piece_count)) - case.missing
        files = {
            file.path: FileProof(
                store.stamp(file.path), file.sha256, writing=file.path.name in case.marked
            )
            for file in manifest.files
        }
        store.save_record(Record(torrent.info_hash, pieces, files))
    return store


def change(path, how, number):
    size = path.stat().st_size
    if how == "gone":
        path.unlink()
        return
    if how == "spoilt" and size:
        spoil(path, size // 2)
    elif how == "cut" and size:
        os.truncate(path, size - 1)
    elif how == "longer":
        path.write_bytes(path.read_bytes() + b"x")
    if how != "none":
        # Late enough to be noticed, however this file system rounds times.
        os.utime(path, (number + 1, number + 1))


def required(root, path, start=0, length=None):
    try:
        Store(root).require(path, start, length)
    except NotProven:
        return False
    return True


def check_agreement(root, case):
    """Check that all answers agree with each other and are true."""
    store = Store(root)
    seen, layout, proven = survey(store), store.layout(), store.proven()
    pieces = {piece for piece, right in enumerate(seen.pieces) if right}
    with store.lock():
        assert Proofs(store, layout, store.torrent().info_hash).pieces == pieces == proven.pieces
    total = 0
    for entry in store.manifest().files:
        name, size = entry.path.name, entry.size
        whole = required(root, entry.path)
        assert whole == proven.whole(entry) == (seen.files[entry.path] == "proven")
        total += sum(proven.count(entry, 0, size))
        if whole:
            assert (root / entry.path).read_bytes() == case.files[name]
        for start in range(0, size, PIECE // 2 - 1):
            length = min(PIECE // 2 - 1, size - start)
            if required(root, entry.path, start, length):
                data = (root / entry.path).read_bytes()[start : start + length]
                assert data == case.files[name][start : start + length]
                assert sum(proven.count(entry, start, start + length)) == length
            else:
                assert sum(proven.count(entry, start, start + length)) < length
    assert seen.proven == total
    for part in (part for piece in pieces for part in layout.segments(piece)):
        if not part.file.pad:
            data = (root / part.file.path).read_bytes()[part.offset : part.offset + part.length]
            assert data == case.files[part.file.path.name][part.offset : part.offset + part.length]
    return pieces


def untouched(layout, case):
    """The proven pieces without a changed file, computed in another way."""
    starts = {file.path.name: (file.start, file.end) for file in layout.payload if file.size}
    return {
        piece
        for piece in range(layout.piece_count)
        if piece not in case.missing
        and not any(
            case.touched(name) and start < (piece + 1) * PIECE and piece * PIECE < stop
            for name, (start, stop) in starts.items()
        )
    }


@settings(max_examples=60, deadline=None)
@given(cases())
def test_all_who_are_asked_agree_after_any_change_and_after_a_verification(case):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = proven_once(root, case)
        for number, (name, how) in enumerate(case.changes.items()):
            change(root / "top" / name, how, number)
        assert check_agreement(root, case) == untouched(store.layout(), case)
        *_, summary = verify(Store(root))
        check_agreement(root, case)
        seen = survey(Store(root))
        if "longer" not in case.changes.values():
            # Pieces of a file that is too long are right, but no span of it may be read.
            assert summary.proven == seen.proven
        assert summary.complete == (set(seen.files.values()) == {"proven"})


@settings(max_examples=60, deadline=None)
@given(cases(), st.data())
def test_what_is_not_read_again_keeps_its_proof_only_if_all_its_files_are_unchanged(case, data):
    """Verify only one file, while the others have changed."""
    case = dataclasses.replace(case, named=True, digests=False, missing=frozenset())
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store = proven_once(root, case)
        layout = store.layout()
        for number, (name, how) in enumerate(case.changes.items()):
            change(root / "top" / name, how, number)
        name = data.draw(st.sampled_from(sorted(case.files)))
        manifest = store.manifest()
        entries = tuple(file for file in manifest.files if file.path.name == name)
        with store.lock():
            store.save_manifest(dataclasses.replace(manifest, files=entries, tensors=()))
        list(verify(Store(root)))
        read = set(layout.pieces_over(layout.file(PurePosixPath("top", name))))
        kept = Store(root).record().pieces - read
        assert kept == untouched(layout, case) - read


# --- the rules one by one ------------------------------------------------------------------------

FILES = {"a": content(PIECE + 100), "b": content(PIECE, 1)}
A, B = (ManifestFile(PurePosixPath("top", name), len(data)) for name, data in FILES.items())
TORRENT = v1_torrent(FILES, PIECE)
LAYOUT = parse_info(TORRENT.info)
STAMPS = {entry.path: Stamp(entry.size, 7) for entry in (A, B)}
WHOLE = Record(
    TORRENT.info_hash,
    frozenset({0, 1, 2}),
    {path: FileProof(stamp) for path, stamp in STAMPS.items()},
)


def test_a_shared_piece_is_proven_only_while_none_of_its_files_is_changed():
    assert Proven(WHOLE, STAMPS, LAYOUT).pieces == {0, 1, 2}
    changed = Proven(WHOLE, {**STAMPS, B.path: Stamp(B.size, 8)}, LAYOUT)
    assert changed.pieces == {0}
    assert changed.doubt(A, 0, PIECE) is None
    assert changed.doubt(A, 0, PIECE + 1) == "piece 1 is shared with top/b, which has changed since"
    assert changed.count(A, 0, A.size) == (PIECE, 0)
    assert changed.doubt(B, PIECE - 1, PIECE) == "it has changed since it was verified"


def test_asking_about_each_of_many_files_in_one_piece_looks_at_each_a_few_times():
    count = 200
    files = {f"f{number:03}": content(PIECE // count, number) for number in range(count)}
    torrent = v1_torrent(files, PIECE)
    entries = [ManifestFile(PurePosixPath("top", name), len(data)) for name, data in files.items()]
    looked = []

    class Watched(dict):
        def __getitem__(self, path):
            looked.append(path)
            return super().__getitem__(path)

    stamps = {entry.path: Stamp(entry.size, 7) for entry in entries}
    record = Record(
        torrent.info_hash,
        frozenset({0}),
        {path: FileProof(stamp) for path, stamp in stamps.items()},
    )
    proven = Proven(record, Watched(stamps), parse_info(torrent.info))
    assert all(proven.whole(entry) for entry in entries)
    assert len(looked) < 10 * count
    changed = entries[7].path
    proven = Proven(record, {**stamps, changed: Stamp(1, 8)}, parse_info(torrent.info))
    told = {proven.doubt(entry, 0, entry.size) for entry in entries if entry.path != changed}
    assert told == {f"piece 0 is shared with {changed}, which has changed since"}


def test_a_marked_file_keeps_its_pieces_unless_it_shrank_and_its_sha256_counts_for_nothing():
    digest = "ab" * 32
    files = {**WHOLE.files, B.path: FileProof(STAMPS[B.path], digest, writing=True)}
    record = dataclasses.replace(WHOLE, files=files)
    assert Proven(record, {**STAMPS, B.path: Stamp(B.size, 99)}, LAYOUT).pieces == {0, 1, 2}
    assert Proven(record, {**STAMPS, B.path: Stamp(B.size - 1, 7)}, LAYOUT).pieces == {0}
    entry = dataclasses.replace(B, sha256=digest)
    assert Proven(record, STAMPS, LAYOUT, named=False).doubt(entry, 0, 1) == (
        "its sha256 is not verified"
    )


def test_a_piece_reaches_no_farther_than_its_files():
    files = {**WHOLE.files, B.path: FileProof(Stamp(10, 7), writing=True)}
    record = dataclasses.replace(WHOLE, files=files)
    short = Proven(record, {**STAMPS, B.path: Stamp(PIECE - 50, 7)}, LAYOUT)
    assert short.pieces == {0, 1}
    assert short.doubt(B, 0, PIECE - 100) is None
    assert short.doubt(B, 0, PIECE - 60) == "piece 2 is not all there"


def test_a_right_sha256_proves_a_file_of_which_no_piece_is_proven():
    entry = dataclasses.replace(A, sha256="ab" * 32)
    record = Record(
        None,
        files={A.path: FileProof(STAMPS[A.path], "ab" * 32), B.path: FileProof(STAMPS[B.path])},
    )
    for named in (True, False):
        proven = Proven(record, STAMPS, LAYOUT, named=named)
        assert proven.whole(entry)
        assert proven.count(entry, 5, 15) == (0, 10)
        assert not proven.whole(dataclasses.replace(entry, sha256="cd" * 32))


def test_without_the_torrents_name_only_the_sha256_decides():
    entry = dataclasses.replace(A, sha256="ab" * 32)
    assert Proven(WHOLE, STAMPS, LAYOUT, named=True).whole(entry)
    assert not Proven(WHOLE, STAMPS, LAYOUT, named=False).whole(entry)
    assert Proven(WHOLE, STAMPS, LAYOUT, named=False).whole(A)


@pytest.mark.parametrize(
    ("record", "pieces"),
    [
        (WHOLE, {0, 1, 2}),
        (dataclasses.replace(WHOLE, info_hash="0" * 40), set()),
        (dataclasses.replace(WHOLE, pieces=frozenset({0, 3})), set()),
    ],
    ids=["this torrent", "another one", "more pieces than there are"],
)
def test_pieces_of_another_torrent_prove_nothing(record, pieces):
    assert Proven(of_torrent(record, TORRENT.info_hash, LAYOUT), STAMPS, LAYOUT).pieces == pieces
