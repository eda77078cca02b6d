"""Hashes of several streams at once are those of hashlib, or are not used."""

import hashlib
import os
import random
import shutil
import tempfile
import threading
from pathlib import PurePosixPath

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grokfetch.c_program import COMPILERS, CProgram
from grokfetch.torrent import lanes
from grokfetch.torrent.layout import BLOCK, Layout, LayoutFile, piece_hasher
from grokfetch.torrent.read_back import check_pieces, in_batches

DEADLINE_S = 60
PIECE = 1 << 16
A = PurePosixPath("folder/a")
B = PurePosixPath("folder/b")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="this machine has no C compiler"
)


@pytest.fixture(scope="module", params=["-march=native", "-march=x86-64-v3"])
def program(request, tmp_path_factory):
    """The program, built without a warning for this processor and for an older one."""
    options = (*lanes.OPTIONS, "-Wall", "-Wextra", "-Werror")
    source = CProgram("lanes", (lanes.SOURCE,), options, (request.param,))
    loaded = lanes.load(source.compiled(tmp_path_factory.mktemp("lanes")))
    if loaded is None:
        pytest.skip("this processor has no wide vectors")
    return loaded


@needs_compiler
@settings(max_examples=60)
@given(
    st.one_of(st.integers(0, 300), st.integers(0, 70_000)),
    st.integers(1, 16),
    st.integers(64, 5000),
    st.integers(0, 2**32 - 1),
)
def test_sha1_of_spans_of_any_length_is_that_of_hashlib(program, length, count, room, seed):
    chance = random.Random(seed)
    data = chance.randbytes(length + 1000)
    offsets = [chance.randrange(1001) for _ in range(min(count, program.count))]
    with tempfile.TemporaryFile(buffering=0) as file:
        file.write(data)
        spans = [(file.fileno(), offset) for offset in offsets]
        found = program.sha1(spans, length, memoryview(bytearray(room * program.count)))
    assert found == [hashlib.sha1(data[at : at + length]).digest() for at in offsets]


@needs_compiler
@settings(max_examples=60)
@given(st.integers(0, 3000), st.integers(0, 2**32 - 1))
def test_sha256_of_parts_of_any_length_is_that_of_hashlib(program, length, seed):
    data = random.Random(seed).randbytes(length * program.count)
    parts = [data[lane * length : (lane + 1) * length] for lane in range(program.count)]
    found = program.sha256(memoryview(bytearray(data)))
    assert found == [hashlib.sha256(part).digest() for part in parts]


@needs_compiler
def test_span_that_cannot_be_read_in_full_takes_no_other_with_it(program, tmp_path):
    data = random.Random(0).randbytes(3 * PIECE)
    (tmp_path / "file").write_bytes(data)
    with (tmp_path / "file").open("rb") as file, tempfile.TemporaryFile("ab") as write_only:
        handle = file.fileno()
        spans = [(handle, 0), (handle, 2 * PIECE + 1), (write_only.fileno(), 0), (handle, PIECE)]
        found = program.sha1(spans, PIECE, memoryview(bytearray(1 << 20)))
    assert found == [
        hashlib.sha1(data[:PIECE]).digest(),
        None,
        None,
        hashlib.sha1(data[PIECE : 2 * PIECE]).digest(),
    ]


@needs_compiler
def test_too_many_spans_and_too_small_a_buffer_are_refused(program):
    with pytest.raises(ValueError, match="lanes"):
        program.sha1([(0, 0)] * (program.count + 1), 1, memoryview(bytearray(1 << 20)))
    with pytest.raises(ValueError, match="lanes"):
        program.sha1([(0, 0)], 1, memoryview(bytearray(63 * program.count)))


@needs_compiler
@pytest.mark.slow
def test_program_that_hashes_otherwise_than_hashlib_is_not_used(tmp_path, monkeypatch):
    text = lanes.SOURCE.read_text()
    source = tmp_path / "lanes.c"
    monkeypatch.setattr(lanes, "SOURCE", source)
    source.write_text(text)
    if lanes.build(tmp_path / "right", compiling=True) is None:
        pytest.skip("this processor has no wide vectors")
    # The first change breaks only SHA-1, the second only SHA-256.
    for right, wrong in (("LEFT(x, 1)", "LEFT(x, 2)"), ("(y >> 10)", "(y >> 11)")):
        assert right in text
        source.write_text(text.replace(right, wrong))
        assert lanes.build(tmp_path / "wrong", compiling=True) is None


@needs_compiler
def test_processor_without_wide_vectors_hashes_as_before(tmp_path):
    source = CProgram("lanes", (lanes.SOURCE,), processors=("-march=x86-64",))
    assert lanes.load(source.compiled(tmp_path)) is None


def test_without_a_compiler_there_are_no_lanes(tmp_path, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert lanes.build(tmp_path / "folder", compiling=True) is None
    monkeypatch.setenv("CC", "false")
    assert lanes.build(tmp_path / "folder", compiling=True) is None


def test_it_is_compiled_once_and_only_when_enough_was_hashed(monkeypatch):
    asked = []
    monkeypatch.setattr(lanes, "build", lambda _folder, *, compiling: asked.append(compiling))
    shared = lanes.Shared()
    for _ in range(6):
        assert shared.get(lanes.WORTH_BUILDING // 4) is None
    assert asked == [False, True]


def test_while_one_thread_compiles_the_others_do_without(monkeypatch):
    begun, released, built = threading.Event(), threading.Event(), object()

    def build(_folder, *, compiling):
        begun.set()
        return built if released.wait(DEADLINE_S) else None

    monkeypatch.setattr(lanes, "build", build)
    shared = lanes.Shared()
    compiling = threading.Thread(target=shared.get, args=(lanes.WORTH_BUILDING,))
    compiling.start()
    assert begun.wait(DEADLINE_S)
    assert shared.get(1) is None
    released.set()
    compiling.join(DEADLINE_S)
    assert shared.get(1) is built


@pytest.fixture
def used(program, monkeypatch):
    """Hash pieces with the program, and record which it found right and wrong."""
    noted = []

    def sha1(spans, length, buffer, real=program.sha1):
        noted.extend(real(spans, length, buffer))
        return noted[-len(spans) :]

    monkeypatch.setattr(program, "sha1", sha1)
    monkeypatch.setattr(lanes, "lanes", lambda _worth=0: program)
    return noted


def laid_down(root, sizes):
    """Files of random bytes, and the layout of a torrent of them."""
    data = random.Random(1).randbytes(sum(sizes))
    files = (LayoutFile(A, sizes[0], 0), LayoutFile(B, sizes[1], sizes[0]))
    (root / "folder").mkdir()
    for file in files:
        (root / file.path).write_bytes(data[file.start : file.end])
    pieces = [data[at : at + PIECE] for at in range(0, len(data), PIECE)]
    hashes = b"".join(hashlib.sha1(piece).digest() for piece in pieces)
    return Layout("folder", 1, PIECE, files, hashes)


@needs_compiler
def test_pieces_hashed_together_get_the_verdicts_of_pieces_hashed_alone(
    tmp_path, monkeypatch, used
):
    layout = laid_down(tmp_path, (20 * PIECE + 100, 20 * PIECE + 7))
    with (tmp_path / A).open("r+b") as file:
        file.seek(3 * PIECE + 5)
        file.write(b"?")
    with (tmp_path / B).open("r+b") as file:
        file.truncate(15 * PIECE)
    order = [*range(layout.piece_count)]
    random.Random(2).shuffle(order)
    buffer = memoryview(bytearray(1 << 20))
    together = check_pieces(tmp_path, layout, order, buffer)
    assert len(used) >= 30
    assert None in used
    monkeypatch.setattr(lanes, "lanes", lambda _worth=0: None)
    assert together == check_pieces(tmp_path, layout, order, buffer)
    assert [result.piece for result in together] == order
    verdicts = {result.piece: result.verdict for result in together}
    assert verdicts.pop(3) == "bad"
    absent = range(35, 41)  # Piece 35 ends beyond the 15 pieces that the second file still has.
    assert {verdicts.pop(piece) for piece in absent} == {"absent"}
    assert set(verdicts.values()) == {"good"}


@needs_compiler
def test_pieces_of_a_file_that_is_gone_do_not_spoil_those_of_another(tmp_path, used):
    layout = laid_down(tmp_path, (8 * PIECE, 8 * PIECE))
    (tmp_path / A).unlink()
    results = check_pieces(tmp_path, layout, range(16), memoryview(bytearray(1 << 20)))
    assert [result.verdict for result in results] == ["absent"] * 8 + ["good"] * 8


@needs_compiler
def test_pieces_that_the_disk_has_to_bring_are_read_one_after_another(tmp_path, monkeypatch, used):
    layout = laid_down(tmp_path, (8 * PIECE, 8 * PIECE))
    real = os.preadv

    def preadv(handle, buffers, offset, flags=0):
        # As for a file whose second half is not in memory.
        if flags & os.RWF_NOWAIT and offset >= 4 * PIECE:
            raise BlockingIOError
        return real(handle, buffers, offset, flags)

    monkeypatch.setattr(os, "RWF_NOWAIT", 8, raising=False)
    monkeypatch.setattr(os, "preadv", preadv)
    for pieces, together in ((range(16), 0), ([0, 1, 2, 3, 8, 9, 10, 11], 8)):
        used.clear()
        results = check_pieces(tmp_path, layout, pieces, memoryview(bytearray(1 << 20)))
        assert {result.verdict for result in results} == {"good"}
        assert len(used) == together


@needs_compiler
@pytest.mark.usefixtures("used")
@pytest.mark.parametrize(
    ("mib", "most"), [(1 / 16, 64), (1, None), (4, None), (32, 4), (256, 1)], ids=str
)
def test_batches_fill_the_lanes_with_bounded_bytes(program, mib, most):
    length = int(mib * (1 << 20))
    layout = Layout("folder", 1, length, (LayoutFile(A, 100 * length, 0),), bytes(20 * 100))
    first, *_ = in_batches(layout, range(100))
    assert len(first) == (most or program.count)


@needs_compiler
@pytest.mark.usefixtures("used")
@settings(max_examples=15)
@given(st.integers(1, 70 * BLOCK), st.lists(st.integers(1, 40 * BLOCK), max_size=4))
def test_root_of_a_v2_piece_does_not_depend_on_lanes(length, cuts):
    data = random.Random(length).randbytes(length)
    alone, together = piece_hasher(2, 128), piece_hasher(2, 128)
    alone.update(data)  # Read-only bytes are hashed block by block.
    writable = memoryview(bytearray(data))
    for cut in cuts:
        together.update(writable[:cut])
        writable = writable[cut:]
    together.update(writable)
    assert together.digest() == alone.digest()
