"""A GGUF is proven to be the official shards, and converted back into them."""

import dataclasses
import shutil

import pytest
from support import loadable
from support.damage import spoil
from support.program import grokfetch, killed
from support.torrents import torrent_of

from grokfetch.folder.store import Store
from grokfetch.manifest.schema import encode, parse
from loader.export import by_pieces, gguf, restoring

PIECE = 16384
SHARDS = 2 + 12 * loadable.CONFIG.num_layers


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of the GGUF that the test may damage."""
    return shutil.copyfile(exported, tmp_path / "copy.gguf")


def shards(root):
    return {path.name: path.read_bytes() for path in (root / "ckpt-0").iterdir()}


def test_a_gguf_is_proven_to_be_the_checkpoint(model, exported):
    said = grokfetch("verify", exported, "--against", model)
    assert "proven, by the manifest's sha256" in said
    assert said.endswith(": it holds exactly these bytes\n")


def test_a_manifest_alone_says_enough(model, exported, tmp_path):
    path = tmp_path / "manifest.json"
    path.write_bytes(encode(Store(model).manifest()))
    assert "it holds exactly these bytes" in grokfetch("verify", exported, "--against", path)


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


@pytest.fixture(params=["v1", "v2", "hybrid"])
def torrent(request, model, tmp_path):
    """The torrent of a release of the shards, and the file that has it."""
    release = tmp_path / "release"
    shutil.copytree(model / "ckpt-0", release / "ckpt-0")
    path = tmp_path / "release.torrent"
    path.write_bytes(torrent_of(release, PIECE, request.param))
    return path


def test_a_gguf_is_proven_by_the_piece_hashes_of_a_torrent(torrent, exported, monkeypatch):
    monkeypatch.setattr(by_pieces, "RUN", 3 * PIECE)
    monkeypatch.setattr(restoring, "SLAB", 256 * 70)
    said = grokfetch("verify", exported, "--against", torrent)
    assert "proven, by the piece hashes of torrent" in said
    assert said.endswith(": it holds exactly these bytes\n")


def test_a_changed_byte_is_found_in_its_piece(torrent, copy):
    spoil(copy, gguf.read(copy).tensors["blk.1.ffn_up_exps.weight"].offset + 34 * 3000 + 20)
    said = grokfetch("verify", copy, "--against", torrent, code=20)
    findings = [line for line in said.splitlines() if line.startswith("corrupt")]
    assert len(findings) == 1
    assert findings[0].endswith("[transformer/decoder_layer_1/moe/linear_v/w]")


def test_what_was_not_made_of_a_shard_spoils_only_its_own_pieces(torrent, copy):
    # This changes a scale. The blocks of its group then differ, and no shard could have had them.
    spoil(copy, gguf.read(copy).tensors["blk.0.attn_k.weight"].offset + 34 * 9)
    said = grokfetch("verify", copy, "--against", torrent, code=20)
    findings = [line for line in said.splitlines() if line.startswith("corrupt")]
    assert findings
    assert all("blk.0.attn_k.weight was not made" in line for line in findings)


def test_a_folder_and_a_manifest_bring_their_torrent(model, exported, tmp_path):
    torrent, described = loadable.publish(model, tmp_path)
    manifest = parse(described.read_bytes(), "")
    files = tuple(dataclasses.replace(file, sha256=None) for file in manifest.files)
    described.write_bytes(encode(dataclasses.replace(manifest, files=files)))
    command = ("verify", exported, "--against")
    by_hashes = f"proven, by the piece hashes of torrent {torrent.info_hash}"
    assert by_hashes in grokfetch(*command, described)
    fetched = tmp_path / "fetched"
    shutil.copytree(tmp_path / "release", fetched / "release")
    source = (tmp_path / "release.torrent").rename(tmp_path / "other.torrent")
    loopback = ("--listen", "127.0.0.1:0", "--no-discovery", "--no-mirrors")
    grokfetch("fetch", source, "--manifest", described, "--to", fetched, *loopback)
    assert by_hashes in grokfetch(*command, fetched)
    assert "unproven" in grokfetch(*command, described, code=20)


def test_a_piece_that_also_holds_bytes_of_other_files_stays_unproven(model, exported, tmp_path):
    release = tmp_path / "release"
    shutil.copytree(model, release, ignore=shutil.ignore_patterns(".grokfetch"))
    path = tmp_path / "release.torrent"
    path.write_bytes(torrent_of(release, PIECE, "v1"))
    said = grokfetch("verify", exported, "--against", path, code=20)
    findings = [line for line in said.splitlines() if line.startswith(("unproven", "corrupt"))]
    assert len(findings) == 1
    assert "bytes of release/tokenizer.model, which a GGUF does not have" in findings[0]


def test_a_torrent_of_another_model_is_refused(exported, tmp_path):
    from grokfetch.manifest.shipped import demo_folder

    torrent = demo_folder() / "grok-demo.torrent"
    grokfetch("verify", exported, "--against", torrent, code=13)


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
    assert "it holds exactly these bytes" in grokfetch("verify", first, "--against", model)
    grokfetch("export", first, back, "--format", "shards")
    assert shards(back) == shards(model)
    next(out.glob("*-00002-of-*")).unlink()
    grokfetch("verify", first, "--against", model, code=16)


def test_an_export_that_cannot_say_that_it_has_begun_makes_no_folder(exported, tmp_path):
    (tmp_path / ".grokfetch/export.json").mkdir(parents=True)
    said = grokfetch("export", exported, tmp_path, "--format", "shards", code=16)
    assert "export.json" in said
    assert [path.name for path in tmp_path.iterdir()] == [".grokfetch"]


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
