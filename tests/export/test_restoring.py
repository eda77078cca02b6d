"""The way back: a GGUF is proven to be the official shards, and becomes them again."""

import shutil

import pytest
from support import loadable
from support.damage import spoil
from support.program import grokfetch, killed

from grokfetch.folder.store import Store
from grokfetch.manifest.schema import encode, parse
from loader.export import gguf, restoring

SHARDS = 2 + 12 * loadable.CONFIG.num_layers


@pytest.fixture
def copy(exported, tmp_path):
    """A GGUF of one's own to spoil."""
    return shutil.copyfile(exported, tmp_path / "copy.gguf")


def shards(root):
    return {path.name: path.read_bytes() for path in (root / "ckpt-0").iterdir()}


def test_a_gguf_is_proven_to_be_the_checkpoint(model, exported):
    said = grokfetch("verify", exported, "--against", model)
    assert "proven, by the manifest's sha256" in said
    assert said.endswith(": these are its bytes\n")


def test_a_manifest_alone_says_enough(model, exported, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(encode(Store(model).manifest()))
    assert "these are its bytes" in grokfetch("verify", exported, "--against", path)


@pytest.mark.parametrize(
    ("tensor", "offset", "shard"),
    [
        ("blk.1.ffn_up_exps.weight", 34 * 3000 + 20, "transformer/decoder_layer_1/moe/linear_v/w"),
        ("blk.0.attn_q.weight", 34 * 7, "transformer/decoder_layer_0/multi_head_attention/query/w"),
        ("blk.0.ffn_gate_inp.weight", 2, "transformer/decoder_layer_0/router/w"),
        ("token_embd.weight", 70_000, "language_model/in_out_embed/embeddings"),
    ],
)
def test_a_changed_byte_is_found_with_its_tensor(model, copy, tensor, offset, shard):
    spoil(copy, gguf.read(copy).tensors[tensor].offset + offset)
    said = grokfetch("verify", copy, "--against", model, code=20)
    findings = [line for line in said.splitlines() if line.startswith("corrupt")]
    assert len(findings) == 1
    assert findings[0].endswith(f"[{shard}]")


def test_shards_whose_sha256_nobody_knows_are_not_called_wrong(model, exported, tmp_path):
    manifest = encode(Store(model).manifest()).decode()
    path = tmp_path / "manifest.json"
    digest = parse(manifest.encode(), "").files[3].sha256
    path.write_text(manifest.replace(f', "sha256": "{digest}"', ""))
    said = grokfetch("verify", exported, "--against", path, code=20)
    findings = [line for line in said.splitlines() if line.startswith(("unproven", "corrupt"))]
    assert len(findings) == 1
    assert findings[0].startswith("unproven ckpt-0/tensor00003_000")


def test_a_manifest_of_another_model_is_refused(exported, tmp_path):
    from grokfetch.manifest.shipped import grok_1

    path = tmp_path / "grok-1.json"
    path.write_bytes(encode(grok_1()))
    grokfetch("verify", exported, "--against", path, code=13)
    grokfetch("verify", exported, code=2)


def test_types_that_round_cannot_be_turned_back(model, tmp_path):
    grokfetch("export", model, tmp_path / "out", "--type", "bf16")
    said = grokfetch("verify", tmp_path / "out/small-model-BF16.gguf", "--against", model, code=28)
    assert "only an export of type q8_0 keeps int8 and scales" in said


def test_what_is_no_gguf_of_ours_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF")
    grokfetch("verify", path, code=23)
    path.write_bytes(gguf.written({"general.architecture": gguf.Field("str", "grok")}, []))
    assert "grokfetch did not write this GGUF" in grokfetch("verify", path, code=23)


def test_the_shards_come_back_byte_for_byte(model, exported, tmp_path):
    back = tmp_path / "back"
    grokfetch("export", exported, back, "--format", "shards")
    assert shards(back) == shards(model)
    assert "proven, by the manifest's sha256" in grokfetch("verify", back)


def test_shards_come_back_from_a_split_export(model, tmp_path, monkeypatch):
    out, back = tmp_path / "out", tmp_path / "back"
    grokfetch("export", model, out, "--split", "500k")
    monkeypatch.setattr(restoring, "SLAB", 256 * 70)
    first = next(out.glob("*-00001-of-*"))
    assert "these are its bytes" in grokfetch("verify", first, "--against", model)
    grokfetch("export", first, back, "--format", "shards")
    assert shards(back) == shards(model)
    next(out.glob("*-00002-of-*")).unlink()
    grokfetch("verify", first, "--against", model, code=16)


def test_after_a_kill_only_shards_that_are_missing_are_written(model, exported, tmp_path):
    back = tmp_path / "back"
    command = ("export", exported, back, "--format", "shards")
    killed("os", "fsync", 20, *command)
    whole = {path: path.stat().st_ino for path in back.glob("ckpt-0/tensor?????_000")}
    assert 0 < len(whole) < SHARDS
    grokfetch(*command)
    assert {path: path.stat().st_ino for path in whole} == whole
    assert shards(back) == shards(model)


def test_other_shards_are_left_alone(exported, tmp_path):
    back = tmp_path / "back"
    (back / "ckpt-0").mkdir(parents=True)
    grokfetch("export", exported, back, "--format", "shards", code=16)
    assert not list((back / "ckpt-0").iterdir())
    other = shutil.copyfile(exported, tmp_path / "other.gguf")
    grokfetch("export", other, tmp_path / "there", "--format", "shards")
    grokfetch("export", exported, tmp_path / "there", "--format", "shards", code=13)


def test_each_direction_wants_its_own_kind_of_source(model, exported, tmp_path):
    grokfetch("export", model, tmp_path / "out", "--format", "shards", code=2)
    grokfetch("export", exported, tmp_path / "out", code=2)
    grokfetch("verify", model, "--against", model, code=2)
    grokfetch("verify", exported, "--repair", code=2)
