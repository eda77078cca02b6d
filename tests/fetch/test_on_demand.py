"""A checkpoint that is fetched as it is read: nothing comes but what is looked at."""

from __future__ import annotations

import numpy as np
import pytest
from support import golden
from support.patience import wait_for
from support.release import publish
from support.web_server import WebServer

import loader
from grokfetch.errors import NoModel, StateLocked
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.fetch.wanted import Network
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.torrent.metainfo import encode_torrent, parse_info
from loader.weights.checkpoint import model_of

GATE = "transformer/decoder_layer_3/moe/linear/w"
ROUTER = "transformer/decoder_layer_5/router/w"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return root, *publish(root)


@pytest.fixture(scope="module")
def seeded(published):
    root, torrent, _ = published
    with seed(encode_torrent(torrent), root, SwarmSettings.loopback()) as peer:
        yield peer


def network(*ports, web_seeds=()):
    settings = SwarmSettings.loopback(tuple(f"127.0.0.1:{port}" for port in ports))
    return Network(settings, mirrors=bool(web_seeds), web_seeds=web_seeds)


def opened(published, folder, *ports, **options):
    source = str(published[0] / "tiny.json")
    given = network(*ports, **options)
    return loader.open_checkpoint(source, folder, fetch=True, network=given)


def proven(folder):
    return Store(folder).record().pieces


def count(published):
    _, torrent, _ = published
    return parse_info(torrent.info, torrent.piece_layers).piece_count


def test_only_the_pieces_under_what_is_read_come_and_they_are_proven(published, seeded, tmp_path):
    with opened(published, tmp_path, seeded.port) as grok:
        assert len(grok) == len(golden.CHECKPOINT)
        part = grok[GATE][3, :, 8:16]
        assert np.array_equal(part, golden.CHECKPOINT[GATE][3, :, 8:16])
    few = proven(tmp_path)
    assert 0 < len(few) < count(published) // 10
    selection = str(Store(tmp_path).selection())
    assert selection == "what was read"
    with opened(published, tmp_path) as grok:
        # Nobody is there, and nobody is needed.
        assert np.array_equal(grok[GATE][3, :, 8:16], part)
    assert proven(tmp_path) == few


def test_what_is_read_later_extends_what_was_asked_for_and_is_remembered(
    published, seeded, tmp_path
):
    with opened(published, tmp_path, seeded.port) as grok:
        assert np.array_equal(grok[ROUTER].weight, golden.CHECKPOINT[ROUTER].weight)
        first = len(Store(tmp_path).asked())
        wanted = golden.CHECKPOINT[GATE].dequantize(np.s_[1])
        assert np.array_equal(grok[GATE].dequantize(np.s_[1]), wanted)
        assert len(Store(tmp_path).asked()) > first
    *_, summary = verify(Store(tmp_path))
    assert summary.complete


def test_prefetch_brings_tensors_and_parts_before_they_are_read(published, seeded, tmp_path):
    with opened(published, tmp_path, seeded.port) as grok:
        with pytest.raises(KeyError, match="near it"):
            grok.prefetch(["transformer/decoder_layer_5/router/x"])
        grok.prefetch([ROUTER, (GATE, np.s_[2])])
        wait_for(lambda: not grok.store.demand.ahead)
    with opened(published, tmp_path) as grok:
        assert np.array_equal(grok[ROUTER].weight, golden.CHECKPOINT[ROUTER].weight)
        assert np.array_equal(grok[GATE][2], golden.CHECKPOINT[GATE][2])


def test_mirrors_bring_what_is_read_where_there_is_no_peer(published, tmp_path):
    root, _, manifest = published
    files = {
        f"release/{file.path}": root.joinpath("release", file.path).read_bytes()
        for file in manifest.files
    }
    torrent = str(root / "tiny.torrent")
    with WebServer(files) as server:
        given = network(web_seeds=(server.url,))
        source = loader.open_checkpoint(
            torrent, tmp_path, fetch=True, network=given, manifest=root / "tiny.json"
        )
        with source as grok:
            part = grok[GATE][3, :, 8:16]
            assert np.array_equal(part, golden.CHECKPOINT[GATE][3, :, 8:16])
            assert np.array_equal(grok[ROUTER].weight, golden.CHECKPOINT[ROUTER].weight)
    assert 0 < len(proven(tmp_path)) < count(published) // 5


def test_a_torrent_without_a_manifest_is_read_too_but_its_hyperparameters_are_not_known(
    published, seeded, tmp_path
):
    torrent = published[0] / "tiny.torrent"
    given = network(seeded.port)
    with loader.open_checkpoint(torrent, tmp_path, fetch=True, network=given) as grok:
        assert list(grok) == list(golden.CHECKPOINT)
        assert grok.nbytes == golden.CHECKPOINT.nbytes
        part = grok[GATE].dequantize(np.s_[3, :, 8:16])
        assert np.array_equal(part, golden.CHECKPOINT[GATE].dequantize(np.s_[3, :, 8:16]))
        with pytest.raises(NoModel, match="how wide a head is"):
            grok.config  # noqa: B018 - to look is what is tested
    few = proven(tmp_path)
    assert 0 < len(few) < count(published)
    with loader.open_checkpoint(None, tmp_path, fetch=True, network=network()) as grok:
        # The names are kept, and nobody is asked.
        assert np.array_equal(grok[GATE].dequantize(np.s_[3, :, 8:16]), part)
    assert proven(tmp_path) == few
    with pytest.raises(NoModel):
        model_of(Store(tmp_path))


def test_a_folder_that_another_process_holds_is_refused(published, seeded, tmp_path):
    held = Store(tmp_path).lock()
    with held, pytest.raises(StateLocked), opened(published, tmp_path, seeded.port):
        pass


def test_fetch_and_a_folder_go_together(tmp_path):
    for given in ({"source": tmp_path, "folder": tmp_path}, {"source": tmp_path, "fetch": True}):
        with pytest.raises(TypeError, match="fetch=True"):
            loader.open_checkpoint(**given)
