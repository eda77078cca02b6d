"""One pass over the file, and every block has all of its bytes once."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loader.devices.chunks import chunks


@st.composite
def splits(draw):
    """A shape, and some of the blocks of a grid over it."""
    axes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), max_size=3))
    shape = tuple(parts * width for parts, width in axes)
    cuts = [
        [slice(n * width, (n + 1) * width) for n in range(parts)] for parts, width in axes
    ]  # fmt: skip
    grid = list(itertools.product(*cuts))
    return shape, draw(st.lists(st.sampled_from(grid), unique_by=repr, max_size=len(grid)))


@given(splits(), st.sampled_from([1, 2, 4]), st.integers(1, 200))
def test_chunks_fill_every_block_once_in_file_order(split, itemsize, most):
    shape, blocks = split
    source = np.arange(math.prod(shape)).reshape(shape)
    filled = [np.full(source[block].shape, -1) for block in blocks]
    used = end = 0
    for chunk in chunks(shape, itemsize, blocks, most):
        assert chunk.start >= end
        assert chunk.nbytes <= max(most, itemsize)
        end = chunk.start + chunk.nbytes
        used += chunk.used
        for part in chunk.parts:
            taken = source[part.source]
            assert part.start == taken.min() * itemsize
            assert part.start + part.nbytes == (taken.max() + 1) * itemsize <= end
            assert part.solid == (part.nbytes == taken.size * itemsize)
            assert (filled[part.block][part.target] == -1).all()
            filled[part.block][part.target] = taken
    for block, array in zip(blocks, filled, strict=True):
        assert (array == source[block]).all()
    assert used == sum(array.size for array in filled) * itemsize


def test_column_blocks_of_all_devices_come_from_one_run_of_the_file():
    columns = [(slice(0, 64), slice(16 * n, 16 * n + 16)) for n in range(8)]
    found = list(chunks((64, 128), 1, columns, 1024))
    assert [(chunk.start, chunk.nbytes) for chunk in found] == [(n * 1024, 1024) for n in range(8)]
    assert all(len(chunk.parts) == 8 for chunk in found)


def test_what_another_host_holds_is_not_read():
    experts = [(slice(n, n + 1), slice(0, 64), slice(0, 128)) for n in range(8)]
    found = list(chunks((8, 64, 128), 1, experts[2:4], 4096))
    assert [chunk.start for chunk in found] == [n * 4096 for n in range(4, 8)]
