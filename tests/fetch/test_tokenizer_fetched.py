"""The tokenizer comes from the address in the manifest, and only the right one is kept."""

import dataclasses
import hashlib
from pathlib import PurePosixPath

import pytest
from support.fake_swarm import FakeSwarm
from support.torrents import content, lay_down, manifest_of, v1_torrent
from support.web_server import WebServer

from grokfetch.fetch import fetch
from grokfetch.fetch.mirror import bring_tokenizer
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import TokenizerSource

PIECE = 32768
FILES = {"a": content(2 * PIECE), "readme": content(100)}
TORRENT = v1_torrent(FILES, PIECE)
WORDS = content(5000, 7)


@pytest.fixture
def with_tokenizer(tmp_path):
    """A fetched folder whose manifest names a tokenizer at some address."""

    def make(url, data=WORDS, path="tokenizer.model"):
        root = tmp_path / "out"
        lay_down(root, FILES)
        source = TokenizerSource(
            PurePosixPath(path), len(data), hashlib.sha256(data).hexdigest(), url
        )
        manifest = dataclasses.replace(manifest_of(FILES, TORRENT.info_hash), tokenizer=source)
        list(fetch(Store(root), FakeSwarm(TORRENT, {}), manifest=manifest))
        return root

    return make


def test_the_tokenizer_is_fetched_once_and_a_wrong_one_is_replaced(with_tokenizer):
    with WebServer({"t": WORDS}) as server:
        server.redirects = {"first": f"{server.url}/t"}
        root = with_tokenizer(f"{server.url}/first")
        assert "tokenizer fetched" in bring_tokenizer(Store(root)).text
        assert (root / "tokenizer.model").read_bytes() == WORDS
        assert bring_tokenizer(Store(root)) is None
        (root / "tokenizer.model").write_bytes(b"another")
        assert bring_tokenizer(Store(root)) is not None
        assert (root / "tokenizer.model").read_bytes() == WORDS
        assert server.asked == ["first", "t"] * 2


@pytest.mark.parametrize("served", [None, WORDS[::-1], WORDS + b"x", WORDS[:-1]])
def test_another_tokenizer_is_refused_and_what_lay_there_stays(with_tokenizer, served):
    with WebServer({} if served is None else {"t": served}) as server:
        root = with_tokenizer(f"{server.url}/t")
        (root / "tokenizer.model").write_bytes(b"old")
        assert "could not be fetched" in bring_tokenizer(Store(root)).text
    assert (root / "tokenizer.model").read_bytes() == b"old"
    assert {path.name for path in root.iterdir()} == {".grokfetch", "top", "tokenizer.model"}


def test_a_tokenizer_is_not_written_over_the_payload_or_through_a_link(with_tokenizer, tmp_path):
    with WebServer({"t": WORDS}) as server:
        root = with_tokenizer(f"{server.url}/t", path="top/readme")
        assert bring_tokenizer(Store(root)) is None
        root = with_tokenizer(f"{server.url}/t", path="link/tokenizer.model")
        (tmp_path / "elsewhere").mkdir()
        (root / "link").symlink_to(tmp_path / "elsewhere")
        assert "symbolic link" in bring_tokenizer(Store(root)).text
        assert not list((tmp_path / "elsewhere").iterdir())
        assert server.asked == []
