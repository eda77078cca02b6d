"""Shards are written byte for byte as CPython and NumPy 1.x wrote the official ones."""

from __future__ import annotations

import io
import json
import math
import pickle
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.official import QuantizedWeight8bit

from loader.weights.schema import GrokConfig, parameters
from loader.weights.shard_reader import read_shard, read_slices
from loader.weights.shard_writer import frame_layout, write_blocks, write_shard

DATA = Path(__file__).parents[1] / "data"
GOLDEN = sorted((DATA / "tiny" / "ckpt-0").iterdir())


def pickled(array, scales=None):
    """What CPython's own pickler writes, with NumPy under its old name."""
    value = array if scales is None else QuantizedWeight8bit(array, scales)
    rebuild = np.zeros(1).__reduce__()[0]
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        patch.setattr(rebuild, "__module__", "numpy.core.multiarray")
        return pickle.dumps(value, protocol=4)


def written(array, scales=None):
    scale_shape = None if scales is None else scales.shape
    file = io.BytesIO()
    layout = frame_layout(array.dtype.name, array.shape, scale_shape)
    write_blocks(file, layout, [array], [] if scales is None else [scales])
    assert read_slices(file.getvalue(), "x") == layout.shard
    assert len(file.getvalue()) == layout.size
    return file.getvalue()


def int8(*shape):
    return (np.arange(math.prod(shape)) % 251 - 125).astype(np.int8).reshape(shape)


def bf16(*shape):
    return (np.arange(math.prod(shape)) % 127 + 1).astype(ml_dtypes.bfloat16).reshape(shape)


def floats(*shape):
    return np.arange(math.prod(shape), dtype=np.float32).reshape(shape)


# Sizes and offsets of the official files, as published by people who have them.
@pytest.mark.parametrize(
    ("dtype", "shape", "scale_shape", "offsets", "size"),
    [
        ("float32", (131_072, 6144), None, (151,), 3_221_225_637),
        ("float32", (6144,), None, (146,), 24_727),
        ("float32", (6144, 8), None, (148,), 196_770),
        ("int8", (8, 6144, 32_768), (8, 1, 32_768), (201, 1_610_613_043), 1_611_137_347),
        ("int8", (8, 32_768, 6144), (8, 8, 6144), (201, 1_610_613_043), 1_611_399_491),
        ("int8", (6144, 1024), (1, 1024), (199, None), 6_293_814),
        ("int8", (6144, 6144), (1, 6144), (199, None), 37_761_334),
        ("int8", (6144, 6144), (8, 6144), (199, 37_749_039), 37_847_359),
    ],
)
def test_official_shapes_have_the_official_sizes_and_offsets(
    dtype, shape, scale_shape, offsets, size
):
    layout = frame_layout(dtype, shape, scale_shape)
    assert layout.size == size
    for span, offset in zip(layout.spans, offsets, strict=True):
        assert offset in (span.offset, None)


def test_every_official_file_has_its_official_size():
    lines = (DATA / "grok-1-parameters.jsonl").read_text().splitlines()
    official = [json.loads(line)["file_bytes"] for line in lines]
    specs = parameters(GrokConfig())
    sizes = [frame_layout(spec.dtype, spec.shape, spec.scale_shape).size for spec in specs]
    assert sizes == official
    assert sum(sizes) == 318_239_886_140


def test_official_norm_is_framed_byte_for_byte():
    before, after = frame_layout("float32", (6144,)).around
    assert before.hex() == (
        "8004958c600000000000008c156e756d70792e636f72652e6d756c74696172726179948c0c5f7265636f6e7374"
        "727563749493948c056e756d7079948c076e6461727261799493944b0085944301629487945294284b014d0018"
        "859468038c0564747970659493948c02663494898887945294284b038c013c944e4e4e4affffffff4affffffff"
        "4b00749462894200600000"
    )
    assert after.hex() == "947494622e"


def test_official_attention_output_is_framed_byte_for_byte():
    before, between, after = frame_layout("int8", (6144, 6144), (8, 6144)).around
    assert before.hex().startswith(
        "800495b7000000000000008c085f5f6d61696e5f5f948c135175616e74697a6564576569676874386269749493"
        "942981947d94288c0677656967687494"
    )
    assert before.hex().endswith(
        "4d00184d0018869468098c0564747970659493948c02693194898887945294284b038c017c944e4e4e4affffff"
        "ff4affffffff4b00749462894200004002"
    )
    assert between.hex() == (
        "955a00000000000000947494628c067363616c6573946808680b4b008594680d87945294284b014b084d001886"
        "9468128c096d6c5f647479706573948c0862666c6f61743136949394898887945294284b038c013c944e4e4e4b"
        "024b024b40749462894200800100"
    )
    assert after.hex() == "9507000000000000009474946275622e"


@pytest.mark.parametrize("path", GOLDEN[:26], ids=lambda path: path.name)
def test_reference_files_are_rewritten_byte_for_byte(path, tmp_path):
    data = path.read_bytes()
    shard = read_shard(path)
    arrays = [
        np.ndarray(
            span.shape,
            ml_dtypes.bfloat16 if span.dtype == "bfloat16" else span.dtype,
            data,
            span.offset,
        )
        for span in (shard.array, shard.scales)
        if span is not None
    ]
    layout = write_shard(tmp_path / "copy", *arrays)
    assert layout.shard == shard
    assert (tmp_path / "copy").read_bytes() == data


@pytest.mark.parametrize("name", ["norm", "router", "key", "linear_1"])
def test_numpy_1_pickles_are_rewritten_byte_for_byte(name):
    # The flags of bfloat16 depend on the NumPy that ml_dtypes meets: 0x50 under 1.26, 0x40 under 2
    # and in the reference files. No reader looks at them.
    theirs = (DATA / "numpy-1.26" / name).read_bytes()
    data = theirs.replace(b"K\2K\2K\x50", b"K\2K\2K\x40")
    shard = read_slices(data, name)
    scale_shape = None if shard.scales is None else shard.scales.shape
    layout = frame_layout(shard.array.dtype, shard.array.shape, scale_shape)
    assert layout.shard == shard
    position = 0
    for piece, span in zip(layout.around, layout.spans, strict=False):
        assert data[position : position + len(piece)] == piece
        position += len(piece) + span.nbytes
    assert data[position:] == layout.around[-1]


@given(st.integers(2, 400) | st.integers(65_300, 65_700))
@settings(deadline=None, max_examples=200)
@example(255)
@example(256)
@example(65_535)
@example(65_536)
def test_plain_arrays_equal_the_real_pickle(size):
    assert written(int8(size)) == pickled(int8(size))


@given(st.lists(st.integers(1, 6), max_size=7) | st.lists(st.integers(1, 300), max_size=2))
@settings(deadline=None, max_examples=100)
@example([1, 1, 70_000])
def test_any_rank_equals_the_real_pickle(shape):
    assert written(floats(*shape)) == pickled(floats(*shape))


@given(st.integers(1, 300) | st.integers(65_000, 65_600), st.sampled_from([(1, 1), (2, 2), (2, 1)]))
@settings(deadline=None, max_examples=200)
@example(65_129, (1, 1))
@example(32_700, (2, 1))
def test_quantised_weights_equal_the_real_pickle(columns, rows_and_groups):
    rows, groups = rows_and_groups
    array, scales = int8(rows, columns + 1), bf16(groups, columns + 1)
    assert written(array, scales) == pickled(array, scales)


@pytest.mark.parametrize("size", [2**31 - 1, 2**31, 2**32, 2**39, 2**40, 2**55])
def test_sizes_beyond_32_bits_are_spelt_as_the_real_pickle_spells_them(size):
    spelt = pickle.dumps(size, protocol=4)[len(b"\x80\4\x95") + 8 : -1]
    before, _ = frame_layout("int8", (size,)).around
    assert before.count(b"(K\1" + spelt + b"\x85\x94") == 1


def test_every_place_where_a_frame_may_end_is_where_cpython_ends_it():
    # A frame that becomes full just before, within or after the header of the scales ends at a
    # different place in each case, and the rest may be so short that it gets no header.
    for columns in range(65_536 - 460, 65_536 + 4):
        array, scales = int8(1, columns), bf16(1, columns)
        assert written(array, scales) == pickled(array, scales), columns


def test_numpy_reads_what_is_written(tmp_path):
    write_shard(tmp_path / "x", int8(3, 8, 70), bf16(3, 4, 70))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loaded = pickle.loads((tmp_path / "x").read_bytes())
    assert np.array_equal(loaded.weight, int8(3, 8, 70))
    assert np.array_equal(loaded.scales, bf16(3, 4, 70))


def test_array_in_another_order_is_written_in_c_order(tmp_path):
    transposed = floats(2100, 2100).T
    write_shard(tmp_path / "x", transposed)
    assert (tmp_path / "x").read_bytes() == pickled(np.ascontiguousarray(transposed))


def test_blocks_may_be_cut_anywhere():
    array = floats(5, 7)
    file = io.BytesIO()
    blocks = (array.reshape(-1)[start : start + 4] for start in range(0, 35, 4))
    write_blocks(file, frame_layout("float32", (5, 7)), blocks)
    assert file.getvalue() == pickled(array)


@pytest.mark.parametrize(
    "blocks",
    [[floats(34)], [floats(35), floats(1)], [], [int8(140)], [floats(35).astype(">f4")]],
)
def test_blocks_that_are_not_the_array_are_refused(blocks):
    with pytest.raises(ValueError, match=r"block"):
        write_blocks(io.BytesIO(), frame_layout("float32", (5, 7)), blocks)


@pytest.mark.parametrize(
    ("dtype", "shape"), [("complex64", (4,)), ("int8", (1, 1)), ("float32", (0, 4))]
)
def test_arrays_whose_pickle_is_not_a_matter_of_shape_are_refused(dtype, shape):
    with pytest.raises(ValueError, match=r"no complex64|fewer than two bytes"):
        frame_layout(dtype, shape)
