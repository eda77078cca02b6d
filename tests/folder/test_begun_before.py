"""A folder begun by an earlier version is read, verified, extended and run by this one."""

import json
import os
import shutil
from pathlib import Path, PurePosixPath

import pytest
from support.program import SIMPLEST, grokfetch, invoke

from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.folder.record import decode
from grokfetch.folder.store import Store
from grokfetch.folder.survey import survey
from grokfetch.manifest.shipped import demo_folder

STATE = Path(__file__).parents[1] / "data" / "begun-before-rooms"
PUBLISHED = demo_folder()
ASKED = 362_608
ALL = 1_527_348
PIECES, ALL_PIECES = 28, 150


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The folder as `fetch --layers 0-1` of an earlier version left it.

    The record gives the length and the time of each file; a file that was not asked for is not
    there, for no piece of it was needed: this torrent pads files to whole pieces.
    """
    root = tmp_path_factory.mktemp("begun") / "part"
    shutil.copytree(STATE, root / ".grokfetch", ignore=shutil.ignore_patterns("README.txt"))
    for path, proof in decode((STATE / "record.json").read_bytes()).files.items():
        data = (PUBLISHED / path).read_bytes()
        assert len(data) == proof.stamp.size
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
        os.utime(root / path, ns=(proof.stamp.mtime_ns, proof.stamp.mtime_ns))
    return root


@pytest.fixture
def part(begun, tmp_path):
    """A copy of it, with the times of its files."""
    shutil.copytree(begun, tmp_path / "part")
    return tmp_path / "part"


def unread(monkeypatch):
    """Make every attempt to read back payload fail."""

    def refuse(*_):
        raise AssertionError("payload is read")

    monkeypatch.setattr(os, "preadv", refuse)


def test_its_record_is_believed_and_nothing_is_read_again(part, monkeypatch):
    unread(monkeypatch)
    told = json.loads(grokfetch("status", part, "--json"))
    assert told["asked"] == {"what": "layers 0-1", "total": ASKED, "proven": ASKED}
    assert told["pieces"]["proven"] == PIECES
    assert told["files"]["proven"] == len(decode((STATE / "record.json").read_bytes()).files)
    assert told["checks"]["verify"]["count"] == 0
    assert [(group["name"], group["proven"] == group["total"]) for group in told["layers"][:3]] == [
        ("layer 0", True),
        ("layer 1", True),
        ("layer 2", False),
    ]
    store = Store(part)
    assert not store.warnings
    store.require(PurePosixPath("grok-demo/ckpt-0/tensor00002_000"))


def test_it_verifies(part):
    assert f"{ASKED:,} of {ASKED:,} bytes" in invoke("verify", part).output
    told = json.loads(grokfetch("status", part, "--json"))
    assert told["asked"]["proven"] == ASKED


def test_the_same_fetch_again_finds_nothing_to_do(part, monkeypatch):
    unread(monkeypatch)
    invoke("fetch", part, "--no-discovery", "--listen", "127.0.0.1:0", "--no-mirrors")


@pytest.mark.slow
def test_it_is_extended_with_the_rest_and_recites(part):
    torrent = (PUBLISHED / "grok-demo.torrent").read_bytes()
    with seed(torrent, PUBLISHED, SwarmSettings.loopback()) as peer:
        here = ("--no-discovery", "--listen", "127.0.0.1:0", "--no-mirrors")
        told = grokfetch(
            "fetch", part, "--all", "--json", *here, "--peer", f"127.0.0.1:{peer.port}"
        )
    last = json.loads(told.splitlines()[-1])
    assert (last["total"], last["fetched"], last["rehashed"]) == (ALL, ALL_PIECES - PIECES, 0)
    assert survey(Store(part)).proven == ALL
    beginning, rest = "Every piece is read back", " from the disk and hashed"
    said = grokfetch("run", part, beginning, "--max-tokens", 8, *SIMPLEST)
    assert said.strip().startswith((beginning + rest, rest.strip())), said
