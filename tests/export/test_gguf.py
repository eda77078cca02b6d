"""The container GGUF."""

import pytest

from grokfetch.errors import CheckpointInvalid, StorageFailed
from loader.export.gguf import Entry, Field, read, written

FIELDS = {
    "a": Field("u32", 7),
    "b": Field("str", "grok"),
    "c": Field("f32", (0.5, -2.0)),
    "d": Field("str", ("x", "ä")),
    "e": Field("bool", value=True),
}
ENTRIES = [Entry("one", (2, 3), "F32", 0), Entry("two", (1, 64), "Q8_0", 32)]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(written(FIELDS, ENTRIES) + bytes(32 + 68))
    return path


def test_the_bytes_are_those_of_the_specification():
    head = written({"k": Field("u32", 7)}, [Entry("t", (2, 3), "Q8_0", 0)])
    assert head == (
        b"GGUF" + b"\3\0\0\0" + b"\1\0\0\0\0\0\0\0" + b"\1\0\0\0\0\0\0\0"
        b"\1\0\0\0\0\0\0\0k" + b"\4\0\0\0" + b"\7\0\0\0"
        b"\1\0\0\0\0\0\0\0t" + b"\2\0\0\0" + b"\3\0\0\0\0\0\0\0" + b"\2\0\0\0\0\0\0\0"
        b"\x08\0\0\0" + b"\0\0\0\0\0\0\0\0" + bytes(14)
    )


def test_what_is_written_is_read(file):
    read_back = read(file)
    assert read_back.fields == {
        "a": 7,
        "b": "grok",
        "c": [0.5, -2.0],
        "d": ["x", "ä"],
        "e": True,
    }
    start = len(written(FIELDS, ENTRIES))
    assert list(read_back.tensors.values()) == [
        Entry("one", (2, 3), "F32", start),
        Entry("two", (1, 64), "Q8_0", start + 32),
    ]


def test_a_file_that_is_cut_anywhere_is_refused(file):
    data = file.read_bytes()
    for length in range(1, len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointInvalid, match="not a GGUF that can be read"):
            read(file)


def test_lengths_that_nobody_can_mean_are_refused(file):
    data = bytearray(file.read_bytes())
    data[8:16] = b"\xff" * 8
    file.write_bytes(data)
    with pytest.raises(CheckpointInvalid, match="claims"):
        read(file)


def test_a_file_that_is_not_there_is_an_error_of_storage(tmp_path):
    with pytest.raises(StorageFailed):
        read(tmp_path / "gone.gguf")
