"""Names become lazy views of the right bytes, and only of proven ones."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from support import golden
from support.fake_swarm import FakeSwarm
from support.program import grokfetch
from support.release import publish
from support.synthetic_folder import (
    CONFIG,
    LINEAR,
    NORM,
    SPECS,
    LenientStore,
    manifest_of,
    manifested,
)

import loader
from grokfetch.errors import (
    CheckpointInvalid,
    ManifestInvalid,
    NoModel,
    NotProven,
    StateMissing,
    StorageFailed,
)
from grokfetch.events import Outcome
from grokfetch.fetch import fetch
from grokfetch.folder.store import Store
from grokfetch.manifest.selection import Request
from loader.weights.checkpoint import open_checkpoint, open_folder, require_whole
from loader.weights.schema import parameters
from loader.weights.shard_reader import read_shard
from loader.weights.synthetic import write_checkpoint


def test_every_parameter_is_there_in_file_order(store):
    checkpoint = open_checkpoint(store)
    assert list(checkpoint) == list(SPECS)
    assert len(checkpoint) == len(SPECS)
    assert checkpoint.config == CONFIG
    assert "no such tensor" not in checkpoint
    for name, tensor in checkpoint.items():
        assert tensor.spec == SPECS[name]
        assert tensor.path == store.root / "ckpt-0" / SPECS[name].file
        assert (tensor.weight.shape, tensor.weight.dtype.name) == (
            tensor.spec.shape,
            tensor.spec.dtype,
        )


def test_views_show_the_bytes_of_the_file(store):
    tensor = open_checkpoint(store)[LINEAR]
    data = tensor.path.read_bytes()
    shard = read_shard(tensor.path)
    assert tensor.weight.tobytes() == data[shard.array.offset :][: shard.array.nbytes]
    assert tensor.scales.tobytes() == data[shard.scales.offset :][: shard.scales.nbytes]
    assert tensor.scales.dtype == ml_dtypes.bfloat16
    assert tensor.scales.shape == tensor.spec.scale_shape


def test_plain_tensors_have_no_scales(store):
    tensor = open_checkpoint(store)[NORM]
    assert tensor.scales is None
    assert tensor.scale_span is None


def test_views_cannot_be_written_to(store):
    tensor = open_checkpoint(store)[LINEAR]
    for view in (tensor.weight, tensor.scales):
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            view[...] = 0
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True


def test_arrays_are_mapped_not_copied(store):
    tensor = open_checkpoint(store)[LINEAR]
    first = tensor.weight.reshape(-1)[0]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.array.offset)
        file.write(bytes([first.view(np.uint8) ^ 1]))
    assert tensor.weight.reshape(-1)[0] != first


def test_nothing_is_mapped_before_it_is_asked_for(store):
    tensor = open_checkpoint(store)[LINEAR]
    tensor.path.unlink()
    with pytest.raises(StorageFailed):
        _ = tensor.weight


def test_file_that_shrinks_before_it_is_mapped_is_refused(store):
    tensor = open_checkpoint(store)[LINEAR]
    os.truncate(tensor.path, tensor.array.offset + tensor.array.nbytes - 1)
    with pytest.raises(CheckpointInvalid, match="shrunk"):
        _ = tensor.weight


def test_every_byte_of_every_file_is_asked_for(store):
    open_checkpoint(store)
    sizes = {file.path: file.size for file in store.manifest().files}
    assert store.required == [(path, 0, size) for path, size in sizes.items()]


def test_unproven_files_are_refused_before_they_are_looked_into(store):
    real = Store(store.root)
    (store.root / "ckpt-0" / "tensor00000_000").write_bytes(b"no pickle at all")
    with pytest.raises(NotProven):
        open_checkpoint(real)


def test_unproven_files_of_the_right_form_are_opened_on_request(store):
    assert len(open_checkpoint(Store(store.root), proven=False)) == len(SPECS)


def test_folder_without_manifest_is_refused(written):
    with pytest.raises(StateMissing):
        open_checkpoint(Store(written))


def test_manifest_without_model_is_refused_or_if_it_names_tensors_gives_just_these(store):
    files_only = dataclasses.replace(store.manifest(), model=None, tensors=())
    manifested(store, dataclasses.replace(store.manifest(), model=None))
    checkpoint = open_checkpoint(store)
    assert [tensor.spec.name for tensor in checkpoint.values()] == list(SPECS)
    with pytest.raises(NoModel, match="how wide a head is"):
        checkpoint.config  # noqa: B018 - to look is what is tested
    manifested(store, files_only)
    with pytest.raises(NoModel):
        open_checkpoint(store)


def test_manifest_with_half_a_model_is_refused(store):
    model = {key: value for key, value in CONFIG.to_mapping().items() if key != "num_layers"}
    manifested(store, dataclasses.replace(store.manifest(), model=model))
    with pytest.raises(ManifestInvalid, match="num_layers"):
        open_checkpoint(store)


def test_bare_folder_opens_by_its_config(written):
    checkpoint = open_folder(written / "ckpt-0", CONFIG)
    assert list(checkpoint) == list(SPECS)


def test_files_may_lie_in_any_folder_of_the_torrent(written, tmp_path):
    shutil.copytree(written / "ckpt-0", tmp_path / "DIR" / "a" / "b")
    store = manifested(LenientStore(tmp_path / "DIR"), manifest_of(CONFIG, "a/b"))
    assert open_checkpoint(store)[NORM].path == Path(store.root, "a", "b", SPECS[NORM].file)


def test_opening_needs_no_jax():
    modules = "loader.weights.checkpoint, loader.weights.synthetic"
    code = f"import sys, {modules}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- a part of a checkpoint ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def part(tmp_path_factory):
    """A folder into which one layer of the golden checkpoint was fetched."""
    root = tmp_path_factory.mktemp("part")
    root.joinpath("from").mkdir()
    torrent, manifest = publish(root / "from")
    files = {
        str(file.path): (root / "from/release" / file.path).read_bytes() for file in manifest.files
    }
    events = fetch(
        Store(root / "part"),
        FakeSwarm(torrent, files),
        manifest=manifest,
        request=Request(layers=(1,)),
    )
    assert isinstance(list(events)[-1], Outcome)
    return root / "part"


def test_part_lists_all_names_and_reads_what_is_there(part):
    with loader.open_checkpoint(part) as checkpoint:
        assert set(checkpoint) == set(golden.CHECKPOINT)
        assert LINEAR in checkpoint
        assert (checkpoint[LINEAR].weight == golden.CHECKPOINT[LINEAR].weight).all()
        assert (checkpoint[NORM].weight == golden.CHECKPOINT[NORM].weight).all()


def test_part_says_which_fetch_brings_the_rest(part):
    other = LINEAR.replace("layer_1", "layer_3")
    with loader.open_checkpoint(part) as checkpoint:
        assert other in checkpoint
        with pytest.raises(NotProven, match="only layers 1") as caught:
            checkpoint[other]
    assert caught.value.hint == f"run: grokfetch fetch {part} --layers 3"


def test_part_is_not_the_whole(part):
    with pytest.raises(NotProven, match="only a part") as caught:
        require_whole(Store(part))
    assert "--all" in caught.value.hint
    with pytest.raises(NotProven):
        open_checkpoint(Store(part))
    assert "only a part" in grokfetch("run", part, "a prompt", code=NotProven.exit_code)


def test_name_that_is_not_there_is_answered_with_near_ones():
    with pytest.raises(KeyError, match=LINEAR):
        golden.CHECKPOINT[LINEAR.replace("linear_1/w", "linear1/w")]


def test_checkpoint_is_written_short():
    assert repr(golden.CHECKPOINT) == "<Checkpoint: 146 tensors, 2.8 MB>"


MAP_ALL = """
import os, resource, sys
from pathlib import Path
import numpy as np
import loader

resource.setrlimit(resource.RLIMIT_NOFILE, (24, int(sys.argv[2])))
checkpoint = loader.open_checkpoint(Path(sys.argv[1]), proven=False)
arrays = [np.asarray(tensor) for tensor in checkpoint.values()]
print(len(arrays), len(os.listdir("/dev/fd")))
"""


def map_all(root, hard_limit):
    """Map all tensors of a deep model in a process with a hard limit on open files."""
    config = dataclasses.replace(CONFIG, num_layers=8)
    write_checkpoint(root / "top", config)
    manifested(Store(root), manifest_of(config, "top"))
    command = [sys.executable, "-c", MAP_ALL, root, str(hard_limit)]
    return config, subprocess.run(command, capture_output=True, text=True, check=False)


def test_more_files_are_mapped_than_may_be_open_by_default(tmp_path):
    config, done = map_all(tmp_path, 4096)
    assert done.returncode == 0, done.stderr
    mapped, still_open = map(int, done.stdout.split())
    assert mapped == len(parameters(config)) > 80
    assert (still_open < 24) is (sys.version_info >= (3, 13))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="mapped files are not open then")
def test_a_hard_limit_that_is_too_low_is_named_with_the_file(tmp_path):
    _, done = map_all(tmp_path, 60)
    assert done.returncode != 0
    assert "StorageFailed" in done.stderr
    assert "tensor000" in done.stderr
    assert "because too many files are open" in done.stderr
    assert "ulimit -Hn" in done.stderr
