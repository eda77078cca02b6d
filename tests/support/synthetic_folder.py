"""A small synthetic checkpoint, its manifest, and a store that believes every file."""

import dataclasses
from pathlib import PurePosixPath

from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest
from loader.weights.inventory import expected
from loader.weights.schema import GrokConfig, parameters

CONFIG = GrokConfig(
    vocab_size=64,
    sequence_len=32,
    emb_size=32,
    widening_factor=2,
    key_size=8,
    num_q_heads=4,
    num_kv_heads=2,
    num_layers=2,
    num_experts=4,
)
LINEAR = "transformer/decoder_layer_1/moe/linear_1/w"
NORM = "language_model/rms_norm/scale"
SPECS = {spec.name: spec for spec in parameters(CONFIG)}


class LenientStore(Store):
    """Believes every file, and remembers what it was asked."""

    def __init__(self, root):
        super().__init__(root)
        self.required = []

    def require(self, path, start=0, length=None):
        self.required.append((path, start, length))


def manifest_of(config, folder):
    files, tensors = expected(config, PurePosixPath(folder))
    return Manifest("test", files, tensors=tensors, model=config.to_mapping())


def manifested(store, manifest):
    with store.lock():
        store.save_manifest(manifest)
    return store


def changed(store, name, **fields):
    """Let the manifest say something else about one tensor."""
    manifest = store.manifest()
    tensors = (
        dataclasses.replace(tensor, **fields) if tensor.name == name else tensor
        for tensor in manifest.tensors
    )
    return manifested(store, dataclasses.replace(manifest, tensors=tuple(tensors)))
