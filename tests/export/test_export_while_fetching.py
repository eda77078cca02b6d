"""An export during the fetch of its shards: each tensor is written when it has arrived."""

import errno
import json
import os
import threading

import pytest
from support import loadable
from support.fake_swarm import FakeSwarm
from support.program import grokfetch

from grokfetch.errors import StorageFailed
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.folder import advisory
from grokfetch.folder.known import EXPORT
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import parse
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import encode_torrent
from loader.export import gguf
from loader.export.jobs import Work
from loader.export.layout import Origin, gguf_name, gguf_plan
from loader.export.writing import Export
from loader.weights.checkpoint import expect_checkpoint
from loader.weights.schema import parameters

PATIENCE_S = 60
EARLY = {spec.name for spec in parameters(loadable.CONFIG) if spec.layer in {None, 0}}
NAMES = {gguf_name(spec) for spec in parameters(loadable.CONFIG) if spec.name in EARLY}
LOOPBACK = ("--listen", "127.0.0.1:0", "--no-discovery", "--no-mirrors")


@pytest.fixture(scope="module")
def published(model, tmp_path_factory):
    """The folder that contains a release, its torrent, and the path of its manifest."""
    above = tmp_path_factory.mktemp("published")
    return above, *loadable.publish(model, above)


def pieces_of(torrent, manifest, names):
    """The pieces with bytes of some tensors; for None, those of files without a tensor."""
    layout = parse_info(torrent.info, torrent.piece_layers)
    tensor_of = {tensor.file: tensor.name for tensor in parse(manifest.read_bytes(), "").tensors}
    files = [file for file in layout.payload if tensor_of.get(file.path) in names]
    return {piece for file in files for piece in layout.pieces_over(file)}


def exporting(published, tmp_path, swarm):
    """Export during a fetch from a swarm in memory, until either ends."""
    _, _, manifest = published
    described = parse(manifest.read_bytes(), "")
    store = Arriving(tmp_path / "grok")
    limits = Limits(save_s=0, stall_s=PATIENCE_S)
    events = fetch(store, swarm, manifest=described, limits=limits, demand=store.demand)
    with store.filled(events):
        plan = gguf_plan(loadable.CONFIG, (), Origin("x", None, "", ""), "Q8_0")
        target = Store(tmp_path / "out")
        with target.lock():
            for _ in Export(plan, expect_checkpoint(store, by_parts=True), target).write():
                pass


@pytest.fixture
def interrupting(monkeypatch):
    """Press Ctrl-C when all early tensors are written and nothing else can be done."""
    real = Work.await_more

    def interrupted(work):
        if EARLY.isdisjoint(part.spec.name for part in work.absent):
            raise KeyboardInterrupt
        real(work)

    with monkeypatch.context() as patched:
        patched.setattr(Work, "await_more", interrupted)
        yield patched


def recorded(out):
    """The tensors that are on the disk according to the export's record."""
    return json.loads((out / ".grokfetch/export.json").read_text())["done"].keys()


def never_written(file, names, writes):
    """Whether nothing was written in the places of these tensors."""
    spans = [entry for name, entry in gguf.read(file).tensors.items() if name in names]
    return not any(it.offset <= at < it.offset + it.nbytes for it in spans for at in writes)


def swarm_of(published, **options):
    """A swarm in memory."""
    above, torrent, _ = published
    layout = parse_info(torrent.info, torrent.piece_layers)
    files = {
        str(file.path.relative_to("release")): (above / file.path).read_bytes()
        for file in layout.payload
    }
    silence = threading.Event()
    return FakeSwarm(torrent, files, tick=lambda: silence.wait(0.02), **options)


def test_tensors_are_written_as_they_arrive_and_the_next_run_goes_on(
    published, tmp_path, interrupting, writes
):
    _, torrent, manifest = published
    # The shards of layer 1 lie behind those of layer 0, and the embedding before both.
    swarm = swarm_of(published, stall_after=len(pieces_of(torrent, manifest, EARLY)))
    with pytest.raises(KeyboardInterrupt):
        exporting(published, tmp_path, swarm)
    done = recorded(tmp_path / "out")
    assert done == NAMES
    interrupting.undo()
    writes.clear()
    exporting(published, tmp_path, swarm_of(published))
    (file,) = (tmp_path / "out").glob("*.gguf")
    assert never_written(file, done, writes)


def test_what_is_written_when_it_is_interrupted_is_recorded_after_what_was_written_before(
    published, tmp_path, interrupting, monkeypatch
):
    _, torrent, manifest = published
    real, began, another = advisory.write, threading.Event(), threading.Event()

    def write(path, schema, fields):
        mine = path.name == EXPORT
        first = mine and not began.is_set()
        if first:
            began.set()
            # Long enough for another to overtake it.
            another.wait(1)
        real(path, schema, fields)
        if mine and not first:
            another.set()

    monkeypatch.setattr(advisory, "write", write)
    swarm = swarm_of(published, stall_after=len(pieces_of(torrent, manifest, EARLY)))
    with pytest.raises(KeyboardInterrupt):
        exporting(published, tmp_path, swarm)
    assert recorded(tmp_path / "out") == NAMES


def test_a_fetch_that_fails_ends_the_export_with_its_error(published, tmp_path):
    swarm = swarm_of(published, full_after=90)
    with pytest.raises(StorageFailed, match=r"^the disk is full"):
        exporting(published, tmp_path, swarm)
    assert not list((tmp_path / "out").glob("*.gguf"))


def test_an_export_that_fails_does_not_wait_for_what_is_still_to_come(
    published, tmp_path, monkeypatch
):
    swarm = swarm_of(published, stall_after=90)
    real = os.pwrite

    def full(handle, data, offset):
        if offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(StorageFailed, match="full"):
        exporting(published, tmp_path, swarm)
    assert swarm.closed == 1


@pytest.mark.slow
def test_what_a_seed_has_is_written_and_the_next_run_goes_on(
    published, tmp_path, interrupting, writes
):
    above, torrent, manifest = published
    grok, out = tmp_path / "grok", tmp_path / "out"
    command = ("export", grok, out, "--while-fetching", *LOOPBACK)
    data, early = encode_torrent(torrent), pieces_of(torrent, manifest, {None, *EARLY})
    with seed(data, above, SwarmSettings.loopback(), have=early) as peer:
        source = ("--source", manifest, "--peer", f"127.0.0.1:{peer.port}")
        grokfetch(*command, *source, code=130)
    assert Store(grok).record().pieces == early
    done = recorded(out)
    assert done == NAMES
    interrupting.undo()
    writes.clear()
    with seed(data, above, SwarmSettings.loopback()) as peer:
        said = grokfetch(*command, "--peer", f"127.0.0.1:{peer.port}")
    assert f"{len(done)} of them written before" in said
    (file,) = out.glob("*.gguf")
    assert never_written(file, done, writes)
    assert "proven" in grokfetch("verify", out)
    grokfetch("export", grok, tmp_path / "again")
    assert file.read_bytes() == next((tmp_path / "again").glob("*.gguf")).read_bytes()


@pytest.mark.parametrize("option", ["--unproven", "--dry-run", "--format=shards"])
def test_options_that_go_together_or_not(tmp_path, option):
    grokfetch("export", tmp_path / "grok", tmp_path / "out", "--while-fetching", option, code=2)
    grokfetch("export", tmp_path / "grok", tmp_path / "out", "--source", "x", code=2)
    assert "does not exist" in grokfetch("export", tmp_path / "grok", tmp_path / "out", code=2)
