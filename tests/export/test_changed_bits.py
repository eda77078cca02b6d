"""`grokfetch export` on a disk that changes a bit of what it is given."""

import json
import os
from pathlib import Path

import pytest
from support.program import grokfetch, invoke, killed

from grokfetch import errors
from grokfetch.torrent import read_back as hashing
from loader.export import gguf

NAME = "small-model-Q8_0.gguf"


@pytest.fixture
def flipping(monkeypatch):
    """Flip one bit in the writes of this process for which `wanted(path, offset)` is true."""

    def begin(wanted, times=1):
        real, struck = os.pwrite, []

        def flip(handle, data, offset):
            path = Path(f"/proc/self/fd/{handle}").readlink()
            if len(struck) < times and wanted(path, offset):
                struck.append((path, offset))
                middle = len(data) // 2
                data = bytearray(data)
                data[middle] ^= 1
            return real(handle, data, offset)

        monkeypatch.setattr(os, "pwrite", flip)
        return struck

    return begin


def tensor_at(file, offset):
    """The name of the tensor of a GGUF that contains a byte."""
    tensors = gguf.read(file).tensors.items()
    [name] = [name for name, it in tensors if it.offset <= offset < it.offset + it.nbytes]
    return name


def test_a_bit_of_a_weight_that_changes_on_its_way_is_reported_and_written_again(
    model, exported, tmp_path, flipping, writes
):
    struck = flipping(lambda _, offset: offset > 0)
    said = invoke("export", model, tmp_path / "out").stderr
    [(_, offset)] = struck
    name = tensor_at(exported, offset)
    assert f"corrupt {NAME}: bytes {offset:,} to " in said
    assert said.count(f"do not read back as they were written [{name}]") == 1
    assert said.count("corrupt") == 1
    assert "is written again" in said
    assert (tmp_path / "out" / NAME).read_bytes() == exported.read_bytes()
    grokfetch("verify", tmp_path / "out")
    again = {at for at in writes if writes.count(at) > 1} - {0}
    assert offset in again
    assert {tensor_at(exported, at) for at in again} == {name}


def test_what_was_written_at_once_is_compared_however_it_is_read(
    model, exported, tmp_path, flipping, monkeypatch
):
    monkeypatch.setattr(hashing, "CHUNK", 1000)
    struck = flipping(lambda _, offset: offset > 0)
    said = invoke("export", model, tmp_path / "out").stderr
    assert said.count("corrupt") == 1
    assert f"corrupt {NAME}: bytes {struck[0][1]:,} to " in said
    assert (tmp_path / "out" / NAME).read_bytes() == exported.read_bytes()


def test_a_bit_of_the_fields_that_changes_on_its_way_is_written_again(
    model, exported, tmp_path, flipping, writes
):
    flipping(lambda _, offset: offset == 0)
    said = invoke("export", model, tmp_path / "out").stderr
    assert f"corrupt {NAME}: bytes 0 to " in said
    assert (tmp_path / "out" / NAME).read_bytes() == exported.read_bytes()
    assert [at for at in writes if writes.count(at) > 1] == [0, 0]


def test_a_file_beside_the_weights_that_changes_on_its_way_is_written_again(
    model, tmp_path, flipping
):
    def config(path, _):
        return path.name == "config.json.part"

    struck = flipping(config)
    said = invoke("export", model, tmp_path / "out", "--format", "safetensors").stderr
    assert len(struck) == 1
    assert "corrupt config.json: bytes 0 to " in said
    assert json.loads((tmp_path / "out/config.json").read_text())
    grokfetch("verify", tmp_path / "out")


def test_a_disk_that_changes_a_bit_each_time_ends_the_export_and_proves_nothing(
    model, exported, tmp_path, flipping
):
    out = tmp_path / "out"
    place = next(it.offset for it in gguf.read(exported).tensors.values())
    assert place > 0
    struck = flipping(lambda _, offset: offset == place, times=2)
    said = grokfetch("export", model, out, code=errors.Damaged.exit_code)
    assert len(struck) == 2
    assert str(out) in said
    assert "nor when it is written again" in said
    assert "the same command writes again what is wrong" in said
    grokfetch("verify", out, code=errors.StateMissing.exit_code)
    # The disk has been repaired.
    assert "corrupt" in invoke("export", model, out).stderr
    assert (out / NAME).read_bytes() == exported.read_bytes()


def test_a_bit_that_has_changed_before_an_export_was_interrupted_is_found_after_it(
    model, exported, tmp_path
):
    out = tmp_path / "out"
    killed("grokfetch.folder.advisory", "write", 1, "export", model, out)
    name = next(iter(json.loads((out / ".grokfetch/export.json").read_text())["done"]))
    with (out / f"{NAME}.part").open("r+b") as file:
        file.seek(gguf.read(exported).tensors[name].offset)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    said = invoke("export", model, out).stderr
    assert f"do not read back as they were written [{name}]" in said
    assert (out / NAME).read_bytes() == exported.read_bytes()


def test_what_an_earlier_version_has_written_without_checksums_is_written_again(
    model, exported, tmp_path
):
    out = tmp_path / "out"
    grokfetch("export", model, out)
    state = out / ".grokfetch/export.json"
    fields = json.loads(state.read_text())
    fields["schema"] = 1
    fields["done"] = {name: kept[:2] for name, kept in fields["done"].items()}
    state.write_text(json.dumps(fields))
    said = grokfetch("export", model, out)
    assert "written before" not in said
    assert "already complete" not in said
    assert (out / NAME).read_bytes() == exported.read_bytes()
    assert "already complete" in grokfetch("export", model, out)
