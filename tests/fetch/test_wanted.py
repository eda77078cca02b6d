"""SOURCE in every form in which people have it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from support.torrents import content, manifest_of, v1_torrent
from support.web_server import WebServer

from grokfetch.errors import OutOfReach, SourceInvalid, TorrentInvalid
from grokfetch.fetch.swarm import SwarmSettings
from grokfetch.fetch.wanted import Network, resolve
from grokfetch.manifest.schema import encode
from grokfetch.manifest.shipped import grok_1
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import encode_torrent

FILES = {name: content(40_000, number) for number, name in enumerate("abc")}
TORRENT = v1_torrent(FILES, 16384)
LINK = f"magnet:?xt=urn:btih:{TORRENT.v1}"
MANIFEST = dataclasses.replace(manifest_of(FILES, TORRENT.v1), magnet=LINK)
HERE = Network(SwarmSettings.loopback())


@pytest.fixture
def web():
    files = {"a/t.torrent": encode_torrent(TORRENT), "m.json": encode(MANIFEST), "page": b"<html>"}
    with WebServer(files) as server:
        yield server


@pytest.mark.parametrize(
    "source", [TORRENT.v1, f" {TORRENT.v1.upper()} ", f'"{LINK}"', f"{LINK}&amp;tr=udp://t:1"]
)
def test_info_hashes_and_copied_links_are_magnet_links(source):
    assert resolve(source, None).origin.info_hash == TORRENT.v1


def test_a_link_that_is_longer_than_a_file_name_may_be_is_a_link():
    assert resolve(f"{LINK}&dn={'n' * 9000}", None).origin.info_hash == TORRENT.v1


@pytest.mark.parametrize("path", ["a/t.torrent", "moved"])
def test_a_torrent_at_a_web_address(web, path):
    web.redirects["moved"] = f"{web.url}/a/t.torrent"
    assert resolve(f"{web.url}/{path}", None).origin.v1 == TORRENT.v1


def test_a_manifest_at_a_web_address(web):
    wanted = resolve(f"{web.url}/m.json", None)
    assert wanted.manifest == MANIFEST
    assert wanted.origin.info_hash == TORRENT.v1


def test_a_web_address_without_a_torrent_says_what_lies_there(web):
    with pytest.raises(TorrentInvalid, match="a web page, neither a torrent nor a manifest"):
        resolve(f"{web.url}/page", None)
    with pytest.raises(OutOfReach, match="404") as caught:
        resolve(f"{web.url}/nothing", None)
    assert "name the file" in caught.value.hint


@pytest.mark.parametrize("status", [429, 503])
def test_a_web_address_that_limits_us_is_not_waited_for(web, status):
    web.status, web.headers = status, {"Retry-After": "600"}
    with pytest.raises(OutOfReach, match=f"it answers {status}") as caught:
        resolve(f"{web.url}/a/t.torrent", None)
    assert web.url in str(caught.value)
    assert len(web.asked) == 1


@pytest.mark.parametrize(
    "source",
    [
        "xai-org/grok-1",
        "https://huggingface.co/xai-org/grok-1",
        "https://huggingface.co/xai-org/grok-1/tree/main/",
        "hf://xai-org/grok-1",
        "huggingface.co/xai-org/grok-1",
    ],
)
def test_a_repository_stands_for_the_manifest_that_is_shipped_for_it(source):
    assert resolve(source, None).manifest == grok_1()


def test_another_repository_is_told_how_its_files_can_be_used():
    with pytest.raises(SourceInvalid) as caught:
        resolve("somebody/else", None)
    assert "hf download somebody/else" in caught.value.hint


@pytest.mark.parametrize("source", ["nowhere", "nowhere/", "./deep/er/x", "x.torrent"])
def test_what_does_not_exist_is_told_what_a_source_can_be(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceInvalid) as caught:
        resolve(source, None)
    assert ".torrent" in caught.value.hint


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"PK\x03\x04abc", "a zip archive"),
        (b"\x80\x04\x95", "a pickle"),
        (b"[1]", "a JSON list"),
        (b"\x00noise", "begins with b'\\\\x00noise'"),
    ],
)
def test_a_file_that_is_no_torrent_is_named_for_what_it_is(data, kind, tmp_path):
    tmp_path.joinpath("file").write_bytes(data)
    with pytest.raises(TorrentInvalid, match=kind):
        resolve(str(tmp_path / "file"), None)


def test_a_link_with_an_address_of_its_metadata_needs_no_peer_for_it(web):
    link = f"{LINK}&tr=udp://t.example:1&x.pe=127.0.0.1:9&xs={web.url}/a/t.torrent"
    wanted = resolve(link, None, network=HERE)
    assert wanted.origin.v1 == TORRENT.v1
    assert "udp://t.example:1" in wanted.origin.trackers
    assert wanted.peers == ("127.0.0.1:9",)
    assert not wanted.warnings


def test_metadata_that_is_another_torrents_is_told_and_left_out(web):
    web.files["other"] = encode_torrent(v1_torrent({"z": b"z"}, 16384))
    wanted = resolve(f"{LINK}&xs={web.url}/other&as={web.url}/none", None, network=HERE)
    assert wanted.origin.info_hash == TORRENT.v1
    assert all(it in told for it, told in zip(("other", "404"), wanted.warnings, strict=True))


def test_without_mirrors_no_address_in_a_link_is_asked(web):
    network = Network(SwarmSettings.loopback(), mirrors=False)
    resolve(f"{LINK}&xs={web.url}/a/t.torrent", None, network=network)
    assert not web.asked


def test_a_selection_in_a_link_asks_for_those_files():
    layout = parse_info(TORRENT.info, TORRENT.piece_layers)
    assert isinstance(layout, Layout)
    wanted = resolve(f"{LINK}&so=0,2", None)
    assert wanted.request(manifest_of(FILES, None), layout).only == ("top/a", "top/c")


def test_a_manifest_without_a_link_says_what_to_name(tmp_path):
    fields = json.loads(encode(manifest_of(FILES, None)))
    tmp_path.joinpath("m.json").write_text(json.dumps(fields))
    with pytest.raises(SourceInvalid) as caught:
        resolve(str(tmp_path / "m.json"), None)
    assert "--manifest" in caught.value.hint
