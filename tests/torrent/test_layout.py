import hashlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.torrents import content, v1_info, v2_torrent

from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import BLOCK, Layout
from grokfetch.torrent.metainfo import parse_torrent

PIECE = 32768
EDGES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE, 3 * PIECE + 1]
size = st.sampled_from(EDGES) | st.integers(0, 5 * PIECE)
sizes = st.lists(size, min_size=1, max_size=8)


def files_of(lengths: list[int]) -> dict[str, bytes]:
    return {f"f{index:02}": content(size, index) for index, size in enumerate(lengths)}


def layout_of(files: dict[str, bytes], version: str) -> Layout:
    if version == "v1":
        return parse_info(v1_info(files, PIECE))
    torrent = parse_torrent(v2_torrent(files, PIECE))
    return parse_info(torrent.info, torrent.piece_layers)


def read(files: dict[str, bytes], layout: Layout, piece: int) -> list[bytes]:
    return [
        files[part.file.path.name][part.offset : part.offset + part.length]
        for part in layout.segments(piece)
    ]


@pytest.mark.parametrize("version", ["v1", "v2"])
@given(sizes)
def test_every_piece_of_the_right_bytes_has_the_hash_of_the_torrent(version, lengths):
    files = files_of(lengths)
    layout = layout_of(files, version)
    for piece in range(layout.piece_count):
        hasher = layout.hasher(piece)
        for data in read(files, layout, piece):
            hasher.update(data)
        assert hasher.digest() == layout.expected(piece)


@pytest.mark.parametrize("version", ["v1", "v2"])
@given(sizes)
def test_the_segments_of_all_pieces_cover_each_file_once_and_in_order(version, lengths):
    files = files_of(lengths)
    layout = layout_of(files, version)
    seen = dict.fromkeys(files, 0)
    for piece in range(layout.piece_count):
        for part in layout.segments(piece):
            assert part.offset == seen[part.file.path.name]
            assert part.length > 0
            seen[part.file.path.name] += part.length
    assert seen == {name: len(data) for name, data in files.items()}


@pytest.mark.parametrize("version", ["v1", "v2"])
@given(sizes, st.data())
def test_the_pieces_over_a_span_are_those_with_a_segment_in_it(version, lengths, data):
    layout = layout_of(files_of(lengths), version)
    file = data.draw(st.sampled_from(layout.files))
    start = data.draw(st.integers(0, file.size))
    length = data.draw(st.integers(0, file.size - start))
    touching = [
        piece
        for piece in range(layout.piece_count)
        for part in layout.segments(piece)
        if part.file is file and part.offset < start + length and start < part.offset + part.length
    ]
    assert list(layout.pieces_over(file, start, length)) == (touching if length else [])


@given(size, st.integers(1, 3 * BLOCK))
def test_the_hash_does_not_depend_on_how_the_bytes_are_cut(length, step):
    files = files_of([length])
    layout = layout_of(files, "v2")
    for piece in range(layout.piece_count):
        data = b"".join(read(files, layout, piece))
        hasher = layout.hasher(piece)
        for start in range(0, len(data), step):
            hasher.update(data[start : start + step])
        assert hasher.digest() == layout.expected(piece)


def test_the_layout_of_the_whole_checkpoint_answers_at_once():
    count, size, piece = 770, 413_000_000, 4 << 20
    from grokfetch.torrent.bencode import encode

    pieces = -(-count * size // piece)
    info = encode(
        {
            b"name": b"top",
            b"piece length": piece,
            b"pieces": hashlib.sha1(b"").digest() * pieces,
            b"files": [
                {b"length": size, b"path": [b"ckpt-0", b"tensor%05d_000" % index]}
                for index in range(count)
            ],
        }
    )
    start = time.perf_counter()
    layout = parse_info(info)
    total = sum(layout.piece_size(piece) for piece in range(layout.piece_count))
    assert total == count * size
    assert layout.piece_count > 75_000
    assert time.perf_counter() - start < 2
