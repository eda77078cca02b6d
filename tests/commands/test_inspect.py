"""`grokfetch inspect` without the files: only the frames come, from a swarm or from mirrors."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile

import pytest
from support.patience import PATIENCE_S, wait_for
from support.peer import Peer
from support.program import grokfetch, invoke
from support.release import publish, publish_files
from support.torrents import content
from support.web_server import WebServer

from grokfetch import errors
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, encode
from grokfetch.manifest.shipped import grok_1
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import parse_torrent

LOOPBACK = ("--listen", "127.0.0.1:0", "--no-discovery")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    publish(root, notes="an extra file")
    return root


@pytest.fixture(scope="module")
def listing(published):
    """What is printed for the same files on the disk."""
    return grokfetch("inspect", published, "--json")


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary folders."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_magnet_link_is_listed_as_the_files_are_and_nothing_stays(
    published, peer, listing, temporary
):
    torrent = parse_torrent(published.joinpath("tiny.torrent").read_bytes())
    link = f"magnet:?xt=urn:btih:{torrent.info_hash}"
    assert grokfetch("inspect", link, "--peer", peer, "--json", *LOOPBACK) == listing
    names = [json.loads(line)["name"] for line in listing.splitlines()]
    assert names[-1] == "transformer/decoder_layer_9/router/w"
    assert not list(temporary.iterdir())


def test_only_pieces_with_a_frame_come_and_are_kept_where_one_wants_them(
    published, peer, listing, tmp_path
):
    given = ("inspect", published / "tiny.torrent", "--to", tmp_path / "kept", "--json", *LOOPBACK)
    assert grokfetch(*given, "--peer", peer) == listing
    torrent = parse_torrent(published.joinpath("tiny.torrent").read_bytes())
    layout = parse_info(torrent.info, torrent.piece_layers)
    with_a_frame = set()
    for tensor in Store(tmp_path / "kept").manifest().tensors:
        file = layout.file(tensor.file)
        stops = [start + length for start, length in tensor.spans()]
        for start in (0, *stops):
            with_a_frame.update(layout.pieces_over(file, min(start, file.size - 1), 1))
    assert Store(tmp_path / "kept").record().pieces == with_a_frame
    assert len(with_a_frame) < layout.piece_count
    # Nothing is requested again.
    assert grokfetch(*given) == listing


def test_mirrors_give_the_frames_where_there_is_no_peer(published, listing, temporary):
    files = published.joinpath("release").rglob("*")
    served = {it.relative_to(published).as_posix(): it.read_bytes() for it in files if it.is_file()}
    with WebServer(served) as server:
        given = ("inspect", published / "tiny.torrent", "--json", *LOOPBACK)
        assert grokfetch(*given, "--web-seed", server.url) == listing
    assert not list(temporary.iterdir())


def test_a_manifest_that_names_the_tensors_is_listed_without_asking_anybody(tmp_path):
    lines = grokfetch("inspect", "--json").splitlines()
    assert len(lines) == 770
    assert json.loads(lines[2])["shape"] == [8, 6144, 32768]
    official = grok_1()
    without_a_link = Manifest("mine", official.files, tensors=official.tensors)
    tmp_path.joinpath("mine.json").write_bytes(encode(without_a_link))
    assert grokfetch("inspect", tmp_path / "mine.json", "--json").splitlines() == lines


class Hostile:
    def __reduce__(self):
        return os.system, ("false",)


def test_a_shard_that_is_none_is_refused_and_the_others_are_listed(tmp_path, published):
    there = published / "release/ckpt-0"
    files = {name: there.joinpath(name).read_bytes() for name in ("tensor00000_000",)}
    files["tensor00001_000"] = pickle.dumps(Hostile(), protocol=4)
    data = publish_files(tmp_path, files, 1 << 14)
    with seed(data, tmp_path, SwarmSettings.loopback()) as other:
        told = invoke(
            *("inspect", tmp_path / "top.torrent", "--json", *LOOPBACK),
            *("--peer", f"127.0.0.1:{other.port}"),
            code=errors.ShardInvalid.exit_code,
        )
    [line] = told.stdout.splitlines()
    assert json.loads(line)["file"] == "top/tensor00000_000"
    assert "top/tensor00001_000" in told.stderr
    assert "STACK_GLOBAL" in told.stderr


def test_a_torrent_without_shards_is_told_to_have_none(tmp_path):
    data = publish_files(tmp_path, {"a.txt": content(50_000)}, 1 << 14)
    with seed(data, tmp_path, SwarmSettings.loopback()) as other:
        told = invoke(
            *("inspect", tmp_path / "top.torrent", "--peer", f"127.0.0.1:{other.port}", *LOOPBACK),
            code=errors.CheckpointInvalid.exit_code,
        ).stderr
    assert "grokfetch plan" in told


def test_ctrl_c_ends_it_and_nothing_stays(published, tmp_path):
    torrent = parse_torrent(published.joinpath("tiny.torrent").read_bytes())
    count = parse_info(torrent.info, torrent.piece_layers).piece_count
    with Peer(torrent.v1, count, lambda *_: None) as silent:
        command = [sys.executable, "-m", "grokfetch", "inspect", str(published / "tiny.torrent")]
        child = subprocess.Popen(
            [*command, *LOOPBACK, "--peer", f"127.0.0.1:{silent.port}"],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"TMPDIR": str(tmp_path)},
        )
        try:
            wait_for(lambda: silent.asked)
            child.send_signal(signal.SIGINT)
            _, told = child.communicate(timeout=PATIENCE_S)
        finally:
            child.kill()
    assert child.returncode == 130
    assert "Traceback" not in told
    assert not list(tmp_path.iterdir())
