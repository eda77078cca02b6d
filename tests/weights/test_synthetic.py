"""Synthetic checkpoints have the official form, are reproducible, and give sensible numbers."""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from loader.weights.checkpoint import open_folder
from loader.weights.schema import GrokConfig, parameters
from loader.weights.shard_writer import frame_layout
from loader.weights.synthetic import write_checkpoint, write_tensor

TINY = Path(__file__).parents[1] / "data" / "tiny"
CONFIG = GrokConfig(
    vocab_size=96,
    sequence_len=32,
    emb_size=128,
    widening_factor=2,
    key_size=16,
    num_q_heads=8,
    num_kv_heads=4,
    num_layers=3,
    num_experts=2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "deep" / "ckpt-0"
    write_checkpoint(folder, CONFIG, seed=5)
    return folder


def test_checkpoint_opens_as_its_config(folder):
    assert len(open_folder(folder, CONFIG)) == 2 + 12 * CONFIG.num_layers
    assert len(list(folder.iterdir())) == 2 + 12 * CONFIG.num_layers


def test_same_config_has_files_of_the_same_size_as_the_reference(tmp_path):
    config = GrokConfig.from_mapping(json.loads((TINY / "config.json").read_text()))
    write_checkpoint(tmp_path, config)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {path.name: path.stat().st_size for path in (TINY / "ckpt-0").iterdir()}


def test_same_seed_gives_the_same_bytes_whatever_was_written_before(folder, tmp_path):
    for spec in reversed(parameters(CONFIG)):
        size = write_tensor(tmp_path / spec.file, spec, CONFIG, seed=5)
        assert (tmp_path / spec.file).read_bytes() == (folder / spec.file).read_bytes()
        assert size == (folder / spec.file).stat().st_size


def test_other_seeds_and_other_tensors_have_other_weights(folder, tmp_path):
    write_checkpoint(tmp_path, CONFIG, seed=6)
    one, other = open_folder(folder, CONFIG), open_folder(tmp_path, CONFIG)
    for name, tensor in one.items():
        assert not np.array_equal(tensor.weight, other[name].weight)
    linear, linear_v = (
        one[f"transformer/decoder_layer_0/moe/{part}/w"] for part in ("linear", "linear_v")
    )
    assert not np.array_equal(linear.weight, linear_v.weight)
    assert not np.array_equal(linear.scales, linear_v.scales)


def test_every_product_keeps_the_variance_of_its_input(folder):
    random = np.random.default_rng(0)
    for tensor in open_folder(folder, CONFIG).values():
        if tensor.scales is None:
            continue
        rows = tensor.spec.shape[-2]
        scales = np.repeat(tensor.scales.astype(np.float64), rows // tensor.scales.shape[-2], -2)
        x = random.standard_normal((50, rows))
        assert 0.85 < np.std(x @ (tensor.weight * scales)) < 1.15


def test_scales_differ_between_groups_and_columns(folder):
    scales = open_folder(folder, CONFIG)["transformer/decoder_layer_2/moe/linear_1/w"].scales
    assert scales.shape == (2, 8, 128)
    assert len(np.unique(scales)) > 100


def test_sublayers_add_a_stream_of_order_one_whatever_the_depth(tmp_path):
    for layers in (1, 9):
        config = dataclasses.replace(CONFIG, num_layers=layers)
        write_checkpoint(tmp_path / str(layers), config)
        posts = [
            tensor.weight.astype(np.float64)
            for name, tensor in open_folder(tmp_path / str(layers), config).items()
            if name.endswith(("rms_norm_1/scale", "rms_norm_3/scale"))
        ]
        assert 0.9 < math.sqrt(sum(np.mean(scale**2) for scale in posts)) < 1.1


def test_logits_have_the_spread_of_the_reference(folder):
    checkpoint = open_folder(folder, CONFIG)
    embedding = checkpoint["language_model/in_out_embed/embeddings"].weight
    scale = checkpoint["language_model/rms_norm/scale"].weight
    hidden = np.random.default_rng(0).standard_normal((200, CONFIG.emb_size)) * scale
    logits = hidden @ embedding.T * CONFIG.output_multiplier_scale
    assert 2.2 < np.std(logits) < 2.8


def test_memory_stays_bounded(tmp_path):
    spec = dataclasses.replace(parameters(CONFIG)[0], shape=(64, 1_000_000))
    tracemalloc.start()
    size = write_tensor(tmp_path / "large", spec, CONFIG)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == frame_layout("float32", spec.shape).size
    assert peak < 64_000_000 < size
