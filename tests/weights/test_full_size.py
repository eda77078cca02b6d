"""The writer of full-size checkpoints, benchmarks/full_size.py, at a small size."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path, PurePosixPath

import pytest

from grokfetch.errors import StorageFailed
from grokfetch.events import Summary
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.manifest.schema import Manifest
from loader.weights.checkpoint import open_checkpoint
from loader.weights.inventory import expected
from loader.weights.schema import GrokConfig
from loader.weights.synthetic import write_checkpoint

# Twelve layers, because 10 and 11 come before 2 among file names.
CONFIG = GrokConfig(
    vocab_size=96,
    sequence_len=32,
    emb_size=32,
    widening_factor=2,
    key_size=8,
    num_q_heads=4,
    num_kv_heads=2,
    num_layers=12,
    num_experts=2,
)
FILES, TENSORS = expected(CONFIG, PurePosixPath("ckpt-0"))


@pytest.fixture(scope="module")
def full_size():
    path = Path(__file__).parents[2] / "benchmarks" / "full_size.py"
    spec = importlib.util.spec_from_file_location("full_size", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def make(full_size):
    def call(root, layers):
        store = Store(root)
        wanted = Manifest(full_size.NAME, FILES, tensors=TENSORS, model=CONFIG.to_mapping())
        return store, *full_size.make(store, wanted, CONFIG, layers)

    return call


def nodes(store):
    """The inode of every tensor's file, by name."""
    return {
        name: tensor.path.stat().st_ino
        for name, tensor in open_checkpoint(Store(store.root)).items()
    }


def of_layer(found, layer):
    return [node for name, node in found.items() if f"decoder_layer_{layer}/" in name]


def check(store, layers, distinct):
    """Check that everything is proven, and layer l is linked only to layer l mod `layers`."""
    *_, summary = verify(Store(store.root))
    assert isinstance(summary, Summary)
    assert summary.complete
    found = nodes(store)
    for layer in range(CONFIG.num_layers):
        assert of_layer(found, layer) == of_layer(found, layer % layers)
    assert len(set(found.values())) == 2 + 12 * layers
    sizes = {path.stat().st_ino: path.stat().st_size for path in store.root.rglob("tensor*")}
    assert sum(sizes.values()) == distinct
    assert not [*store.root.rglob("*.partial")]


def test_layers_beyond_the_distinct_ones_are_links(make, tmp_path):
    store, manifest, distinct = make(tmp_path / "full", 2)
    assert store.manifest() == manifest
    check(store, 2, distinct)
    write_checkpoint(tmp_path / "whole", CONFIG)
    for name, tensor in open_checkpoint(store).items():
        if "_layer_1/" in name or "_layer_" not in name:
            assert tensor.path.read_bytes() == (tmp_path / "whole" / tensor.path.name).read_bytes()


def test_what_is_there_stays_and_what_is_missing_or_cut_is_written(make, tmp_path, capsys):
    store, manifest, distinct = make(tmp_path / "full", 1)
    before = nodes(store)
    assert make(tmp_path / "full", 1)[1] == manifest
    assert capsys.readouterr().out == "it is there already\n"
    assert nodes(store) == before
    cut, gone, link = (store.payload(manifest.files[index].path) for index in (3, 4, -1))
    cut.write_bytes(cut.read_bytes()[:100])
    gone.unlink()
    link.unlink()
    gone.with_name(f"{gone.name}.partial").write_bytes(b"half")
    make(tmp_path / "full", 1)
    check(store, 1, distinct)
    embedding = "language_model/in_out_embed/embeddings"
    assert nodes(store)[embedding] == before[embedding]


def test_the_number_of_distinct_layers_can_change(make, tmp_path):
    for layers in (1, 2, 1):
        store, _, distinct = make(tmp_path / "full", layers)
        check(store, layers, distinct)


def test_a_folder_with_other_files_is_left_alone(make, tmp_path):
    (tmp_path / "ckpt-0").mkdir()
    shard = tmp_path / "ckpt-0" / "tensor00000_000"
    shard.write_bytes(b"theirs")
    with pytest.raises(StorageFailed, match="not a new or empty folder"):
        make(tmp_path, 1)
    store = Store(tmp_path)
    with store.lock():
        store.save_manifest(Manifest("grok-1", FILES))
    with pytest.raises(StorageFailed, match="holds grok-1"):
        make(tmp_path, 1)
    assert [path.read_bytes() for path in (tmp_path / "ckpt-0").iterdir()] == [b"theirs"]


def test_a_disk_without_room_is_refused_before_the_first_file(make, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(StorageFailed, match="are free"):
        make(tmp_path, 1)
    assert not [*tmp_path.rglob("tensor*")]


def test_names_and_sizes_are_the_official_ones(full_size):
    manifest = full_size.describe(GrokConfig())
    assert len(manifest.files) == 770
    assert manifest.size == 318_239_886_140
    assert manifest.magnet is None
    assert not manifest.mirrors
