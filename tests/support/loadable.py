"""A small synthetic model in a shape that llama.cpp loads, proven by its manifest."""

import json
import shutil

from grokfetch.manifest.shipped import demo_folder
from grokfetch.torrent.metainfo import parse_torrent
from loader.weights.schema import GrokConfig
from loader.weights.synthetic import write_checkpoint
from support.program import grokfetch

# The number of heads times the head size is the width, and groups have 32 rows, as Q8_0 needs; both
# differ from every other dimension.
CONFIG = GrokConfig(
    vocab_size=520,
    sequence_len=64,
    emb_size=256,
    widening_factor=1.5,
    key_size=32,
    num_q_heads=8,
    num_kv_heads=2,
    num_layers=2,
    num_experts=3,
    attn_output_multiplier=0.2,
    embedding_multiplier_scale=8.0,
    output_multiplier_scale=0.5,
)


def make(root, config=CONFIG):
    """Write shards, the demo's tokenizer and a manifest into a folder; returns the folder."""
    write_checkpoint(root / "ckpt-0", config, seed=7)
    shutil.copyfile(demo_folder() / "grok-demo/tokenizer.model", root / "tokenizer.model")
    described = root.with_suffix(".json")
    described.write_text(json.dumps(config.to_mapping()))
    grokfetch("manifest", root, "--config", described)
    return root


def publish(model, above):
    """Publish a copy of such a folder below `above`; returns torrent and path of the manifest."""
    copy = shutil.copytree(model, above / "release", ignore=shutil.ignore_patterns(".grokfetch"))
    described = above / "config.json"
    described.write_text(json.dumps(CONFIG.to_mapping()))
    grokfetch("publish", copy, "--config", described, "--piece-length", 16384)
    return parse_torrent((above / "release.torrent").read_bytes()), above / "release.json"
