"""`grokfetch export`: what it writes, and what happens if it is interrupted."""

import errno
import hashlib
import json
import mmap
import os
import shutil
import subprocess

import ml_dtypes
import numpy as np
import pytest
from support import loadable
from support.demo import fetch_demo
from support.program import grokfetch, invoke, killed
from support.small_disk import small_disk

from grokfetch.folder.store import Store
from grokfetch.manifest.schema import encode
from loader.export import gguf, jobs
from loader.weights.checkpoint import open_folder
from loader.weights.shard_writer import write_shard

CONFIG = loadable.CONFIG
DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
TENSORS = 2 + 12 * CONFIG.num_layers


@pytest.fixture
def whole(exported):
    """The bytes of an undisturbed export."""
    return exported.read_bytes()


@pytest.fixture
def copy(model, tmp_path):
    """A copy of the checkpoint that the test may damage."""
    return shutil.copytree(model, tmp_path / "copy")


def values_of(file, entry):
    """The tensor in float64, by the definition of its type."""
    data = file.read_bytes()[entry.offset : entry.offset + entry.nbytes]
    if entry.kind != "Q8_0":
        return np.frombuffer(data, DTYPES[entry.kind]).reshape(entry.shape).astype(np.float64)
    blocks = np.frombuffer(data, [("scale", "<f2"), ("values", "i1", 32)])
    return (blocks["values"] * blocks["scale"].astype(np.float64)[:, None]).reshape(entry.shape)


def expected(model):
    """Each tensor of the checkpoint as llama.cpp needs it, in float64, by its GGUF name."""
    names = {
        "moe/linear/w": "ffn_gate_exps",
        "moe/linear_v/w": "ffn_up_exps",
        "moe/linear_1/w": "ffn_down_exps",
        "multi_head_attention/query/w": "attn_q",
        "multi_head_attention/key/w": "attn_k",
        "multi_head_attention/value/w": "attn_v",
        "multi_head_attention/linear/w": "attn_output",
        "rms_norm/scale": "attn_norm",
        "rms_norm_1/scale": "attn_output_norm",
        "rms_norm_2/scale": "ffn_norm",
        "rms_norm_3/scale": "layer_output_norm",
        "router/w": "ffn_gate_inp",
    }
    for name, tensor in open_folder(model / "ckpt-0", CONFIG).items():
        values = tensor.dequantize(dtype=np.float64)
        place, _, within = name.partition("/decoder_layer_")
        if place == "language_model/in_out_embed/embeddings":
            yield "token_embd.weight", values
        elif place == "language_model/rms_norm/scale":
            yield "output_norm.weight", values
        else:
            layer, _, kind = within.partition("/")
            transposed = np.swapaxes(values, -1, -2) if values.ndim > 1 else values
            yield f"blk.{layer}.{names[kind]}.weight", transposed


def test_q8_0_holds_every_weight_as_it_is(model, exported):
    held = gguf.read(exported)
    wanted = dict(expected(model))
    assert held.tensors.keys() == wanted.keys()
    for name, values in wanted.items():
        assert np.array_equal(values_of(exported, held.tensors[name]), values), name
    kinds = {entry.kind for name, entry in held.tensors.items() if "norm" in name}
    assert kinds | {held.tensors["token_embd.weight"].kind} == {"F32"}
    assert held.tensors["blk.1.ffn_down_exps.weight"].kind == "Q8_0"


@pytest.mark.parametrize(("kind", "error"), [("f32", 0), ("bf16", 2**-8), ("f16", 2**-10)])
def test_other_types_hold_what_the_weights_stand_for(model, tmp_path, kind, error):
    grokfetch("export", model, tmp_path / "out", "--type", kind)
    file = tmp_path / f"out/small-model-{kind.upper()}.gguf"
    held = gguf.read(file)
    for name, values in expected(model):
        # For subnormal float16 numbers the error is absolute, not relative.
        bound = error * np.abs(values) + (2**-25 if kind == "f16" else 0)
        assert (np.abs(values_of(file, held.tensors[name]) - values) <= bound).all(), name
    assert held.tensors["blk.0.attn_q.weight"].kind == kind.upper()


def test_a_split_export_holds_each_tensor_once(model, tmp_path):
    grokfetch("export", model, tmp_path / "out", "--split", "400k")
    files = sorted((tmp_path / "out").glob("*.gguf"))
    assert [file.name for file in files] == [
        f"small-model-Q8_0-{number:05d}-of-{len(files):05d}.gguf"
        for number in range(1, len(files) + 1)
    ]
    wanted, names = dict(expected(model)), []
    for number, file in enumerate(files):
        held = gguf.read(file)
        assert held.fields["split.no"] == number
        assert held.fields["split.count"] == len(files) > 3
        assert held.fields["split.tensors.count"] == TENSORS
        assert ("grok.block_count" in held.fields) == (number == 0)
        for name, entry in held.tensors.items():
            assert np.array_equal(values_of(file, entry), wanted[name])
            names.append(name)
    assert sorted(names) == sorted(wanted)


def test_the_fields_are_those_that_llama_cpp_reads(exported):
    fields = gguf.read(exported).fields
    assert fields["general.architecture"] == "grok"
    sizes = {
        "embedding_length": 256,
        "feed_forward_length": 256,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "rope.dimension_count": 32,
        "expert_count": 3,
        "expert_used_count": 2,
        "embedding_scale": 8.0,
        "logit_scale": 0.5,
        "attn_logit_softcapping": 30.0,
    }
    assert {key: fields[f"grok.{key}"] for key in sizes} == sizes
    assert fields["grok.attention.output_scale"] == pytest.approx(0.2)
    assert len(fields["tokenizer.ggml.tokens"]) == CONFIG.vocab_size
    assert fields["tokenizer.ggml.tokens"][-1] == "[PAD519]"
    # Control, unknown, byte, normal, unused: each by its number.
    kinds = fields["tokenizer.ggml.token_type"]
    assert [kinds[place] for place in (0, 3, 4, 300, 519)] == [3, 2, 6, 1, 5]
    assert fields["tokenizer.ggml.add_bos_token"] is False


def test_an_export_says_where_it_comes_from(model, exported):
    fields = gguf.read(exported).fields
    manifest = encode(Store(model).manifest())
    assert fields["grokfetch.source.manifest_sha256"] == hashlib.sha256(manifest).hexdigest()
    assert json.loads(fields["grokfetch.config"]) == CONFIG.to_mapping()


def test_verify_and_publish_work_on_an_export(model, tmp_path):
    out = tmp_path / "out"
    grokfetch("export", model, out)
    assert "proven, by the manifest's sha256" in grokfetch("verify", out)
    published = invoke("publish", out)
    assert published.stdout.startswith("magnet:?xt=urn:btih:")
    assert "note" not in published.stderr
    assert "by the piece hashes" in grokfetch("verify", out)
    assert "already complete" in grokfetch("export", model, out)


def test_a_dry_run_writes_nothing_and_tells_the_true_sizes(model, tmp_path, whole):
    out = tmp_path / "out"
    said = grokfetch("export", model, out, "--dry-run")
    assert said == (f"{out}/small-model-Q8_0.gguf  {len(whole):,}\n{TENSORS} tensors, 2.2 MB\n")
    assert not out.exists()


def test_machines_are_told_how_far_it_is(model, tmp_path):
    events = [
        json.loads(line)
        for line in grokfetch("export", model, tmp_path / "out", "--json").splitlines()
    ]
    assert events[0]["command"] == "export"
    assert {event["phase"] for event in events if event["event"] == "progress"} == {
        "exporting",
        "hashing",
    }
    assert events[-1]["event"] == "finished"
    assert events[-1]["files"] == ["small-model-Q8_0.gguf"]
    assert (events[-1]["tensors"], events[-1]["kept"]) == (TENSORS, 0)


# --- refusals -------------------------------------------------------------------------------------


def test_only_proven_files_are_exported_unless_asked_otherwise(copy, tmp_path, whole):
    os.utime(copy / "ckpt-0/tensor00004_000")
    grokfetch("export", copy, tmp_path / "out", code=21)
    assert not (tmp_path / "out").exists()
    grokfetch("export", copy, tmp_path / "out", "--unproven")
    assert (tmp_path / "out/small-model-Q8_0.gguf").read_bytes() == whole


def test_groups_that_blocks_do_not_divide_are_refused_with_the_reason(tmp_path):
    said = grokfetch("export", fetch_demo(tmp_path / "demo"), tmp_path / "out", code=28)
    assert "rows for each scale, and Q8_0 has blocks of 32" in said
    assert not (tmp_path / "out").exists()


def test_a_scale_that_float16_lacks_is_refused_before_anything_is_written(copy, tmp_path):
    tensor = open_folder(copy / "ckpt-0", CONFIG)["transformer/decoder_layer_1/moe/linear/w"]
    weight, scales = np.array(tensor.weight), np.array(tensor.scales)
    scales[1, 0, 7] = 1e-9
    write_shard(tensor.path, weight, scales)
    said = grokfetch("export", copy, tmp_path / "out", "--unproven", code=28)
    assert tensor.path.name in said
    assert "cannot be represented in float16" in said
    assert not (tmp_path / "out").exists()
    grokfetch("export", copy, tmp_path / "out", "--unproven", "--type", "f32")


def test_another_export_and_other_files_are_left_alone(model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    out.joinpath("small-model-Q8_0.gguf").write_text("mine")
    grokfetch("export", model, out, code=16)
    assert out.joinpath("small-model-Q8_0.gguf").read_text() == "mine"
    grokfetch("export", model, tmp_path / "other", "--type", "f32")
    grokfetch("export", model, tmp_path / "other", code=13)


def test_without_a_tokenizer_the_hint_is_what_export_can_do(copy, tmp_path):
    copy.joinpath("tokenizer.model").unlink()
    said = grokfetch("export", copy, tmp_path / "out", code=26)
    assert "or use --tokenizer FILE" in said
    assert "--tokens" not in said


def test_a_file_name_for_out_is_a_usage_error(model, tmp_path):
    assert "OUT is a folder" in grokfetch("export", model, tmp_path / "x.gguf", code=2)


# --- ended half-way -------------------------------------------------------------------------------


def killed_once_saved(model, out):
    """Export in a process that is killed once tensors are recorded; returns their names."""
    killed("grokfetch.folder.advisory", "write", 1, "export", model, out)
    return json.loads((out / ".grokfetch/export.json").read_text())["done"]


def test_an_export_that_cannot_say_that_it_has_begun_lays_nothing_down(model, tmp_path):
    (tmp_path / ".grokfetch/export.json").mkdir(parents=True)
    said = grokfetch("export", model, tmp_path, code=16)
    assert "export.json" in said
    assert [path.name for path in tmp_path.iterdir()] == [".grokfetch"]


def test_after_a_kill_only_what_is_missing_is_written(model, tmp_path, whole, writes):
    out = tmp_path / "out"
    done = killed_once_saved(model, out)
    assert not (out / "small-model-Q8_0.gguf").exists()
    assert 0 < len(done) < TENSORS
    said = grokfetch("export", model, out)
    assert f"{len(done)} of them written before" in said
    file = out / "small-model-Q8_0.gguf"
    assert file.read_bytes() == whole
    held = gguf.read(file).tensors
    for name in done:
        entry = held[name]
        assert not [at for at in writes if entry.offset <= at < entry.offset + entry.nbytes], name


def test_a_shard_that_has_changed_since_is_exported_again(copy, tmp_path):
    out = tmp_path / "out"
    done = killed_once_saved(copy, out)
    names = {gguf_name: name for gguf_name, name in _sources(copy) if gguf_name in done}
    changed, source = next(iter(names.items()))
    path = open_folder(copy / "ckpt-0", CONFIG)[source].path
    os.utime(path, ns=(1, 1))
    grokfetch("export", copy, out, "--unproven")
    again = json.loads((out / ".grokfetch/export.json").read_text())["done"]
    assert again[changed][1] == 1
    assert len(again) == TENSORS


def _sources(model):
    from loader.export.layout import gguf_name

    for name, tensor in open_folder(model / "ckpt-0", CONFIG).items():
        yield gguf_name(tensor.spec), name


def test_what_is_lost_of_the_unfinished_file_is_written_again(model, tmp_path, whole):
    out = tmp_path / "out"
    killed_once_saved(model, out)
    (out / "small-model-Q8_0.gguf.part").unlink()
    grokfetch("export", model, out)
    assert (out / "small-model-Q8_0.gguf").read_bytes() == whole


def test_a_disk_that_is_too_small_is_refused_first(model, tmp_path):
    with small_disk(tmp_path / "disk", "size=1M") as disk:
        said = grokfetch("export", model, disk / "out", code=16)
        assert not list(disk.glob("out/*.part"))
    assert "bytes are still to come" in said
    assert "choose an OUT on another disk" in said


def test_a_disk_that_fills_up_meanwhile_costs_nothing_that_was_written(
    model, tmp_path, whole, monkeypatch
):
    from grokfetch.commands import export as command

    with small_disk(tmp_path / "disk", "size=1200k") as disk:
        with monkeypatch.context() as patched:
            patched.setattr(command, "checks", lambda *_: ())
            assert "the disk is full" in grokfetch("export", model, disk / "out", code=16)
        assert not (disk / "out/small-model-Q8_0.gguf").exists()
        subprocess.run(["mount", "-o", "remount,size=8M", disk], check=True)
        grokfetch("export", model, disk / "out")
        assert (disk / "out/small-model-Q8_0.gguf").read_bytes() == whole


def test_files_that_cannot_be_mapped_are_exported_alike(model, tmp_path, whole, monkeypatch):
    def refused(*_args, **_options):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(mmap, "mmap", refused)
    grokfetch("export", model, tmp_path / "out")
    assert (tmp_path / "out/small-model-Q8_0.gguf").read_bytes() == whole


def test_slabs_of_any_size_give_the_same_bytes(model, tmp_path, whole, monkeypatch):
    monkeypatch.setattr(jobs, "SLAB", 256 * 40)
    grokfetch("export", model, tmp_path / "out")
    assert (tmp_path / "out/small-model-Q8_0.gguf").read_bytes() == whole
