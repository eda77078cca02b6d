"""The export as safetensors."""

import json
import math
import struct

import ml_dtypes
import numpy as np
import pytest
from support import loadable
from support.program import grokfetch, invoke, killed

from loader.weights.checkpoint import open_folder

CONFIG = loadable.CONFIG
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16}
LAYERS = range(CONFIG.num_layers)
EXPERTS = range(CONFIG.num_experts)
IN_VLLM = {
    "moe/linear/w": "moe_block.experts.{}.linear.weight",
    "moe/linear_v/w": "moe_block.experts.{}.linear_v.weight",
    "moe/linear_1/w": "moe_block.experts.{}.linear_1.weight",
    "multi_head_attention/query/w": "attn.q_proj.weight",
    "multi_head_attention/key/w": "attn.k_proj.weight",
    "multi_head_attention/value/w": "attn.v_proj.weight",
    "multi_head_attention/linear/w": "attn.o_proj.weight",
    "rms_norm/scale": "pre_attn_norm.scale",
    "rms_norm_1/scale": "post_attn_norm.scale",
    "rms_norm_2/scale": "pre_moe_norm.scale",
    "rms_norm_3/scale": "post_moe_norm.scale",
    "router/w": "moe_block.gate.weight",
}
IN_SGLANG = {
    "moe/linear/w": "block_sparse_moe.experts.{}.w1.weight",
    "moe/linear_v/w": "block_sparse_moe.experts.{}.w3.weight",
    "moe/linear_1/w": "block_sparse_moe.experts.{}.w2.weight",
    "multi_head_attention/query/w": "self_attn.q_proj.weight",
    "multi_head_attention/key/w": "self_attn.k_proj.weight",
    "multi_head_attention/value/w": "self_attn.v_proj.weight",
    "multi_head_attention/linear/w": "self_attn.o_proj.weight",
    "rms_norm/scale": "pre_attn_norm.weight",
    "rms_norm_1/scale": "post_attn_norm.weight",
    "rms_norm_2/scale": "pre_moe_norm.weight",
    "rms_norm_3/scale": "post_moe_norm.weight",
    "router/w": "block_sparse_moe.gate.weight",
}


def read(path):
    """The metadata and the tensors of a file, by the definition of the format."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    metadata, payload, end, tensors = header.pop("__metadata__"), data[8 + length :], 0, {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        assert start == end
        array = np.frombuffer(payload[start:stop], DTYPES[entry["dtype"]])
        tensors[name], end = array.reshape(entry["shape"]), stop
    assert end == len(payload)
    return metadata, tensors


def all_of(out):
    held = {}
    for path in out.glob("*.safetensors"):
        held |= read(path)[1]
    return held


def rounded(values):
    return values.astype(np.float32).astype(ml_dtypes.bfloat16)


def expected(model, names, norm):
    """Every tensor as the engine needs it: `[out, in]`, and bfloat16 if it is multiplied."""
    for name, tensor in open_folder(model / "ckpt-0", CONFIG).items():
        values = tensor.dequantize()
        outer, _, within = name.partition("/decoder_layer_")
        if outer == "language_model/in_out_embed/embeddings":
            yield "model.embed_tokens.weight", rounded(values)
        elif outer == "language_model/rms_norm/scale":
            yield f"model.norm.{norm}", values
        else:
            layer, _, kind = within.partition("/")
            prefix = f"model.layers.{layer}.{names[kind]}"
            if values.ndim == 3:
                for expert in EXPERTS:
                    yield prefix.format(expert), rounded(values[expert].T)
            elif tensor.scales is not None:
                yield prefix, rounded(values.T)
            else:
                yield prefix, values.T


@pytest.mark.parametrize(
    ("option", "names", "norm"), [("vllm", IN_VLLM, "scale"), ("sglang", IN_SGLANG, "weight")]
)
def test_every_value_is_that_of_the_shards(model, tmp_path, option, names, norm):
    out = tmp_path / "out"
    grokfetch("export", model, out, "--format", "safetensors", "--names", option)
    wanted = dict(expected(model, names, norm))
    if option == "sglang":
        wanted["lm_head.weight"] = wanted["model.embed_tokens.weight"]
    metadata, held = read(out / "model.safetensors")
    assert held.keys() == wanted.keys()
    for name, values in wanted.items():
        assert held[name].dtype == values.dtype, name
        assert np.array_equal(held[name], values), name
    assert len(metadata["grokfetch.source.manifest_sha256"]) == 64


def test_files_are_split_and_the_index_says_where_each_tensor_is(model, tmp_path):
    out = tmp_path / "out"
    grokfetch("export", model, out, "--format", "safetensors", "--split", "600k")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    size = 0
    for name in files:
        _, held = read(out / name)
        assert {it for it, file in index["weight_map"].items() if file == name} == held.keys()
        size += sum(math.prod(array.shape) * array.dtype.itemsize for array in held.values())
    assert index["metadata"]["total_size"] == size
    assert all_of(out).keys() == index["weight_map"].keys()


def test_config_and_tokenizer_stand_beside_it(model, tmp_path):
    out = tmp_path / "out"
    grokfetch("export", model, out, "--format", "safetensors", "--names", "sglang")
    config = json.loads((out / "config.json").read_text())
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_local_experts": 3,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
        "load_presharded_moe": False,
    }
    assert {key: config[key] for key in sizes} == sizes
    assert (out / "tokenizer.model").read_bytes() == (model / "tokenizer.model").read_bytes()
    assert json.loads((out / "tokenizer_config.json").read_text())["add_bos_token"] is False
    compile((out / "configuration_grok1.py").read_text(), "configuration_grok1.py", "exec")


def test_verify_and_publish_work_on_it(model, tmp_path):
    out = tmp_path / "out"
    grokfetch("export", model, out, "--format", "safetensors", "--split", "600k")
    assert "proven, by the manifest's sha256" in grokfetch("verify", out)
    assert invoke("publish", out).stdout.startswith("magnet:?xt=urn:btih:")


def test_after_a_kill_it_goes_on(model, tmp_path):
    out, other = tmp_path / "out", tmp_path / "other"
    options = ("--format", "safetensors", "--split", "600k")
    killed("grokfetch.folder.advisory", "write", 1, "export", model, out, *options)
    assert not list(out.glob("*.safetensors"))
    for folder in (out, other):
        grokfetch("export", model, folder, *options)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == {
        path.name: path.read_bytes() for path in other.iterdir() if path.is_file()
    }


def test_choices_that_do_not_go_together_are_refused(model, tmp_path):
    form = ("--format", "safetensors")
    grokfetch("export", model, tmp_path / "out", *form, "--type", "f32", code=2)
    grokfetch("export", model, tmp_path / "out", "--names", "vllm", code=2)
