"""Shards are read without unpickling, whatever their bytes are."""

from __future__ import annotations

import math
import os
import pickle
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.official import QuantizedWeight8bit

from grokfetch.errors import ShardInvalid, StorageFailed
from loader.weights.shard_reader import ArraySpan, Shard, read_shard, read_slices
from loader.weights.shard_writer import frame_layout

DATA = Path(__file__).parents[1] / "data"
NUMPY_1 = DATA / "numpy-1.26"
QUANTIZED = b"\x8c\x08__main__\x8c\x13QuantizedWeight8bit\x93"
GOLDEN = sorted((DATA / "tiny" / "ckpt-0").iterdir())


class Forged:
    """Pickles as a call, with a state, of the test's choosing."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def forged_array(*state):
    rebuild = np.zeros(1).__reduce__()
    return Forged(rebuild[0], (np.ndarray, (0,), b"b"), state)


def forged_dtype(*state):
    return Forged(np.dtype, ("f4", False, True), state)


def quantised(shape=(16, 4), scale_shape=(2, 4)):
    weight = (np.arange(math.prod(shape)) % 251 - 125).astype(np.int8)
    scales = (np.arange(math.prod(scale_shape)) % 127 + 1).astype(ml_dtypes.bfloat16)
    return QuantizedWeight8bit(weight.reshape(shape), scales.reshape(scale_shape))


def dumps(value):
    return pickle.dumps(value, protocol=4)


def view(data, span):
    dtype = np.dtype(ml_dtypes.bfloat16 if span.dtype == "bfloat16" else span.dtype)
    return np.ndarray(span.shape, dtype, data, span.offset, order=span.order)


def refusal(data):
    with pytest.raises(ShardInvalid) as caught:
        read_slices(data, "the/file")
    assert caught.value.path == "the/file"
    assert 0 <= caught.value.offset <= len(data)
    return caught.value


def shard_or_refusal(data):
    """Read any bytes; accepted spans must lie inside them."""
    try:
        shard = read_slices(data, "the/file")
    except ShardInvalid:
        return
    for span in (shard.array, shard.scales):
        if span is not None:
            assert 0 <= span.offset <= span.offset + span.nbytes <= len(data)
            assert view(data, span).nbytes == span.nbytes


# --- what is read ------------------------------------------------------------------------------


def test_official_norm_as_numpy_1_wrote_it():
    path = NUMPY_1 / "norm"
    assert read_shard(path) == Shard(ArraySpan("float32", (6144,), 146, 24_576, "C"))
    expected = (np.arange(6144) % 1021).astype(np.float32) / 1024
    assert np.array_equal(view(path.read_bytes(), read_shard(path).array), expected)


def test_official_router_as_numpy_1_wrote_it():
    shard = read_shard(NUMPY_1 / "router")
    assert shard == Shard(ArraySpan("float32", (6144, 8), 148, 196_608, "C"))


@pytest.mark.parametrize(
    ("name", "shape", "scale_shape"),
    [("key", (64, 16), (1, 16)), ("linear_1", (2, 256, 144), (2, 8, 144))],
)
def test_quantised_weights_as_numpy_1_wrote_them(name, shape, scale_shape):
    data = (NUMPY_1 / name).read_bytes()
    shard = read_slices(data, name)
    original = quantised(shape, scale_shape)
    assert np.array_equal(view(data, shard.array), original.weight)
    assert np.array_equal(view(data, shard.scales), original.scales)


def test_fortran_order_is_reported():
    path = NUMPY_1 / "fortran"
    expected = ((np.arange(35) % 1021).astype(np.float32) / 1024).reshape(5, 7)
    assert read_shard(path).array.order == "F"
    assert np.array_equal(view(path.read_bytes(), read_shard(path).array), expected)


def test_numpy_2_spelling_is_read():
    original = quantised((8, 70_000), (1, 70_000))
    data = dumps(original)
    assert b"numpy._core" in data
    shard = read_slices(data, "x")
    assert np.array_equal(view(data, shard.array), original.weight)
    assert np.array_equal(view(data, shard.scales), original.scales)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u4", "u8"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3), (1, 2, 3, 4), (0, 300, 70_000)])
def test_plain_numbers_of_any_shape_are_read(dtype, shape):
    original = np.arange(math.prod(shape)).astype(dtype).reshape(shape)
    data = dumps(original)
    assert np.array_equal(view(data, read_slices(data, "x").array), original)


def test_payload_that_is_a_reference_to_an_earlier_one_is_read():
    # CPython keeps one object for each bytes value of length one; such a payload is a reference.
    data = dumps(np.frombuffer(b"b", np.int8))
    assert view(data, read_slices(data, "x").array).tobytes() == b"b"


@pytest.mark.parametrize(
    ("dtype", "shape", "scale_shape"),
    [
        ("float32", (131_072, 6144), None),
        ("int8", (8, 32_768, 6144), (8, 8, 6144)),
        ("int8", (8, 6144, 32_768), (8, 1, 32_768)),
        ("float32", (2**31, 3), None),
    ],
)
def test_gigabytes_are_neither_copied_nor_walked(tmp_path, dtype, shape, scale_shape):
    layout = frame_layout(dtype, shape, scale_shape)
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        for piece, span in zip(layout.around, layout.spans, strict=False):
            file.write(piece)
            file.seek(span.nbytes, os.SEEK_CUR)
        file.write(layout.around[-1])
    tracemalloc.start()
    assert read_shard(path) == layout.shard
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


# --- what is refused ---------------------------------------------------------------------------


def test_nothing_is_executed_and_nothing_imported(tmp_path):
    marker = tmp_path / "executed"
    evil = Forged(os.system, (f"touch {marker}",))
    hostile = [pickle.dumps(evil, protocol) for protocol in range(6)]
    hostile.append(dumps(Forged(eval, ("__import__('this')",))))
    hostile.append(dumps(QuantizedWeight8bit(evil, evil)))
    hostile.append(b"\x80\x04cthis\ns\n.")
    hostile.append(b"\x80\x04\x8c\x04this\x8c\x01s\x93.")
    modules = set(sys.modules)
    for data in hostile:
        refusal(data)
    assert set(sys.modules) == modules
    assert not marker.exists()
    pickle.loads(hostile[4])
    assert marker.exists(), "the pickle was not as hostile as this test believes"


def test_system_call_is_refused_at_the_name_of_the_function():
    data = dumps(Forged(os.system, ("true",)))
    error = refusal(data)
    assert (error.offset, error.opcode) == (data.index(b"\x93"), "STACK_GLOBAL")
    assert f"'{os.system.__module__}'.'system'" in str(error)


def test_global_opcode_is_refused_even_for_names_on_the_list():
    error = refusal(b"\x80\x04cnumpy\nndarray\n.")
    assert (error.offset, error.opcode) == (2, "GLOBAL")


def test_byte_that_is_no_opcode_is_named_in_hexadecimal():
    error = refusal(b"\x80\x04\xff.")
    assert (error.offset, error.opcode) == (2, "0xff")


@pytest.mark.parametrize(
    "name", ["dtype ", "save", "_core.multiarray", "ndarray.__reduce__", "\N{DIAERESIS}dtype"]
)
def test_other_names_in_allowed_modules_are_refused(name):
    text = name.encode()
    data = b"\x80\x04\x8c\x05numpy\x8c" + bytes([len(text)]) + text + b"\x93."
    assert refusal(data).opcode == "STACK_GLOBAL"


@pytest.mark.parametrize(
    ("value", "opcode"),
    [
        (Forged(np.dtype, ("O", False, True)), "REDUCE"),
        (Forged(np.dtype, ("f4", True, True)), "REDUCE"),
        (Forged(np.dtype, ("f4", 0, 1)), "REDUCE"),
        (Forged(np.ndarray, ((2**40,),)), "REDUCE"),
        (Forged(np.zeros(1).__reduce__()[0], (np.ndarray, (2**40,), b"b")), "REDUCE"),
        (Forged(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"O")), "REDUCE"),
        (Forged(np.zeros(1).__reduce__()[0], (np.dtype, (0,), b"b")), "REDUCE"),
        (np.zeros(3, ">f4"), "BUILD"),
        (np.zeros(3, "datetime64[s]"), "REDUCE"),
        (np.zeros(3, [("a", "f4")]), "REDUCE"),
        (np.array([None]), "REDUCE"),
        (np.dtype("f4"), "STOP"),
        (np.ndarray, "STOP"),
        (QuantizedWeight8bit, "STOP"),
        ((np.zeros(2, np.float32),), "STOP"),
        ({"weight": 1, "scales": 2}, "STOP"),
        (b"payload", "STOP"),
        (7, "STOP"),
        ([1], "EMPTY_LIST"),
        (1.5, "BINFLOAT"),
        (forged_array(1, (2, 2), np.dtype("f4"), False, bytes(15)), "BUILD"),
        (forged_array(1, (2, 2), np.dtype("f4"), False, bytes(17)), "BUILD"),
        (forged_array(1, (-1, -4), np.dtype("f4"), False, bytes(16)), "BUILD"),
        (forged_array(1, (2**62, 4), np.dtype("i1"), False, b""), "BUILD"),
        (forged_array(1, (2**64 + 1,), np.dtype("i1"), False, b"1"), "BUILD"),
        (forged_array(1, (0, 2**63), np.dtype("i1"), False, b""), "BUILD"),
        (forged_array(1, (1,) * 65, np.dtype("i1"), False, b"1"), "BUILD"),
        (forged_array(1, ("4",), np.dtype("f4"), False, bytes(16)), "BUILD"),
        (forged_array(1, (True,), np.dtype("i1"), False, b"1"), "BUILD"),
        (forged_array(1, 4, np.dtype("f4"), False, bytes(16)), "BUILD"),
        (forged_array(2, (4,), np.dtype("f4"), False, bytes(16)), "BUILD"),
        (forged_array(True, (4,), np.dtype("f4"), False, bytes(16)), "BUILD"),
        (forged_array(1, (4,), "f4", False, bytes(16)), "BUILD"),
        (forged_array(1, (4,), np.dtype("f4"), 0, bytes(16)), "BUILD"),
        (forged_array(1, (4,), np.dtype("f4"), False, "sixteen letters!"), "BUILD"),
        (forged_array((4,), np.dtype("f4"), False, bytes(16)), "BUILD"),
        (forged_array(1, (4,), np.dtype("f4"), False, bytes(16), None), "BUILD"),
        (forged_array(1, (4,), Forged(np.dtype, ("f4", False, True)), False, bytes(16)), "BUILD"),
        (forged_dtype(4, "<", None, None, None, -1, -1, 0), "BUILD"),
        (forged_dtype(3, "|", None, None, None, -1, -1, 0), "BUILD"),
        (forged_dtype(3, "<", (), None, None, -1, -1, 0), "BUILD"),
        (forged_dtype(3, "<", None, None, None, 8, -1, 0), "BUILD"),
        (forged_dtype(3, "<", None, None, None, -1, -1), "BUILD"),
        (Forged(np.dtype, ("f4", False, True), None, None, iter([(1, 2)])), "SETITEM"),
    ],
)
def test_pickle_of_anything_but_an_official_array_is_refused(value, opcode):
    assert refusal(dumps(value)).opcode == opcode


INT8 = np.zeros((4, 6), np.int8)


def bf16(*shape):
    return np.zeros(shape, ml_dtypes.bfloat16)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight": INT8, "else": 1},
        {"weight": INT8, "scale": bf16(1, 6)},
        {"weight": INT8, "scales": bf16(1, 6), "more": bf16(1, 6)},
        {"weight": INT8, "scales": None},
        {"weight": INT8, "scales": np.dtype("f4")},
        {"weight": INT8, "scales": bf16(3, 6)},
        {"weight": INT8, "scales": bf16(0, 6)},
        {"weight": INT8, "scales": bf16(1, 5)},
        {"weight": INT8, "scales": bf16(1, 1, 6)},
        {"weight": INT8, "scales": bf16(6)},
        {"weight": INT8[0], "scales": bf16(6)},
        {"weight": INT8, "scales": np.zeros((1, 6), np.float16)},
        {"weight": INT8.astype(np.uint8), "scales": bf16(1, 6)},
        {"weight": bf16(1, 6), "scales": INT8},
    ],
)
def test_quantised_weight_with_other_fields_is_refused(fields):
    weight = QuantizedWeight8bit(None, None)
    vars(weight).clear()
    vars(weight).update(fields)
    assert refusal(dumps(weight)).opcode == "BUILD"


def with_frame_length(data):
    """The same pickle, with its single frame ending at the end of the file."""
    return data[:3] + (len(data) - 11).to_bytes(8, "little") + data[11:]


def test_weights_and_scales_must_not_share_bytes():
    data = dumps(quantised((4, 2), (2, 2)))
    scales = quantised((4, 2), (2, 2)).scales.tobytes()
    assert data.count(b"C\x08" + scales) == 1
    shared = with_frame_length(data.replace(b"C\x08" + scales, b"h\x18"))
    error = refusal(shared)
    assert "overlap" in str(error)


def test_bytes_after_the_end_are_refused():
    data = dumps(quantised())
    for tail in (b"\0", b".", data):
        assert refusal(data + tail).opcode == "STOP"


@pytest.mark.parametrize("value", [quantised(), np.ones((3, 5), np.float32)])
def test_pickle_cut_anywhere_is_refused(value):
    data = dumps(value)
    for length in range(len(data)):
        refusal(data[:length])


def test_pickle_cut_between_frames_is_refused():
    data = dumps(quantised((8, 70_000), (1, 70_000)))
    for length in (*range(300), *range(559_900, 560_500), *range(len(data) - 200, len(data))):
        refusal(data[:length])


@pytest.mark.parametrize(
    ("data", "opcode"),
    [
        (b"", "none"),
        (b"\x80", "PROTO"),
        (b"\x80\x04", "none"),
        (b"\x80\x05.", "PROTO"),
        (b"\x80\x04\x80\x04.", "PROTO"),
        (b"N.", "NONE"),
        (b"\x80\x04.", "STOP"),
        (b"\x80\x04NN.", "STOP"),
        (b"\x80\x04\x8e" + b"\xff" * 8 + b".", "BINBYTES8"),
        (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b".", "BINBYTES8"),
        (b"\x80\x04B\xff\xff\xff\x7f.", "BINBYTES"),
        (b"\x80\x04C\x09.", "SHORT_BINBYTES"),
        (b"\x80\x04\x95" + b"\xff" * 8 + b"N.", "FRAME"),
        (b"\x80\x04\x95" + (1).to_bytes(8, "little") + b"\x4b\x01.", "BININT1"),
        (b"\x80\x04\x95" + (12).to_bytes(8, "little") + b"N\x95" + bytes(8) + b"N.", "FRAME"),
        (b"\x80\x04h\x00.", "BINGET"),
        (b"\x80\x04\x94.", "MEMOIZE"),
        (b"\x80\x04(\x94.", "MEMOIZE"),
        (b"\x80\x04R.", "REDUCE"),
        (b"\x80\x04(R.", "REDUCE"),
        (b"\x80\x04b.", "BUILD"),
        (b"\x80\x04Nb.", "BUILD"),
        (b"\x80\x04t.", "TUPLE"),
        (b"\x80\x04\x85.", "TUPLE1"),
        (b"\x80\x04N\x87.", "TUPLE3"),
        (b"\x80\x04(NNu.", "SETITEMS"),
        (b"\x80\x04}(Nu.", "SETITEMS"),
        (b"\x80\x04}(NNu.", "SETITEMS"),
        (b"\x80\x04}(\x8c\x01aN\x8c\x01aNu.", "SETITEMS"),
        (b"\x80\x04NN\x93.", "STACK_GLOBAL"),
        (b"\x80\x04\x8c\x02\xff\xff.", "SHORT_BINUNICODE"),
        (b"\x80\x04))\x81.", "NEWOBJ"),
        (b"\x80\x04" + QUANTIZED + b"N\x85\x81.", "NEWOBJ"),
        (b"\x80\x04}(\x8c\x01aNu(\x8c\x01bNu.", "SETITEMS"),
    ],
)
def test_malformed_pickle_is_refused_at_the_opcode_that_is_wrong(data, opcode):
    assert refusal(data).opcode == opcode


@pytest.mark.parametrize(
    "data",
    [
        b"(" * 1_000_000,
        b")" + b"\x85" * 1_000_000,
        b"N" * 1_000_000,
        b"})" + b"\x94" * 1_000_000,
        b"\x8a\xff" + b"\x7f" * 255 + b"\x94" * 1_000_000,
        b")\x94" + b"".join(bytes([104, i, 104, i, 0x86, 0x94]) for i in range(200)) * 1000,
        b"})(\x8c\x01a" + b"h\0" * 1_000_000,
    ],
    ids=["marks", "tuples", "values", "memos", "long integers", "doubling tuples", "recalls"],
)
def test_nesting_and_memo_bombs_are_refused_after_few_opcodes(data):
    error = refusal(b"\x80\x04" + data + b".")
    assert error.offset < 4000


def test_damage_of_any_one_byte_never_gives_more_than_the_file_holds():
    data = bytearray(dumps(quantised((4, 3), (1, 3))))
    for position in range(len(data)):
        original = data[position]
        for value in {0, 1, original ^ 1, original ^ 0x80, 0x7F, 0xFF, 0x94, 0x2E, 0x28}:
            data[position] = value
            shard_or_refusal(data)
        data[position] = original


@given(st.data())
@settings(deadline=None, max_examples=300)
def test_damaged_header_is_read_or_refused(data):
    frame = bytearray(GOLDEN[3].read_bytes()[:57_650])
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, 198) | st.integers(57_540, 57_649))
        frame[position] = data.draw(st.integers(0, 255))
    shard_or_refusal(frame + GOLDEN[3].read_bytes()[57_650:])


@given(data=st.binary(max_size=200), begins_well=st.booleans())
@settings(deadline=None, max_examples=300)
def test_random_bytes_are_read_or_refused(*, data, begins_well):
    shard_or_refusal(b"\x80\x04" + data if begins_well else data)


FRAGMENTS = [
    *(bytes([code]) for code in b".\x94N\x88\x89(})\x85\x86\x87tu\x93\x81Rb"),
    *(
        b"\x8c" + bytes([len(text)]) + text
        for text in (b"numpy", b"dtype", b"ndarray", b"f4", b"<")
    ),
    *(b"h" + bytes([index]) for index in range(8)),
    *(b"K" + bytes([number]) for number in (0, 1, 3, 4)),
    b"\x8c\x15numpy.core.multiarray\x8c\x0c_reconstruct\x93",
    b"\x8c\x05numpy\x8c\x05dtype\x93\x8c\x02f4\x89\x88\x87R",
    QUANTIZED + b")\x81",
    b"(K\x03\x8c\x01<NNNK\x04K\x04K\x00tb",
    b"C\x01b",
    b"C\x04abcd",
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=60))
@settings(deadline=None, max_examples=500)
def test_allowed_opcodes_in_any_order_are_read_or_refused(fragments):
    shard_or_refusal(b"\x80\x04" + b"".join(fragments) + b".")


def test_files_that_cannot_be_read_are_typed_errors(tmp_path):
    (tmp_path / "empty").touch()
    with pytest.raises(ShardInvalid, match="byte 0, opcode none"):
        read_shard(tmp_path / "empty")
    with pytest.raises(StorageFailed, match="No such file"):
        read_shard(tmp_path / "missing")
    with pytest.raises(StorageFailed, match="not a regular file"):
        read_shard(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_named_pipe_is_refused_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(StorageFailed, match="not a regular file"):
        read_shard(tmp_path / "pipe")
