"""Names that libtorrent would rewrite, fetched from a real seed on 127.0.0.1 as they are."""

import functools
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.torrents import lay_down, manifest_of, torrent_of

from grokfetch.errors import TorrentInvalid
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.folder import payload
from grokfetch.folder.store import Store
from grokfetch.manifest.selection import Request
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.magnet import parse_magnet
from grokfetch.torrent.metainfo import parse_torrent
from grokfetch.torrent.names import unsafe_name

HERE = SwarmSettings.loopback()
LIMITS = Limits(metadata_s=20, stall_s=20)
PIECE = 16 * 1024

# What libtorrent 2.1 removes from names or replaces.
REWRITTEN = "\u061c\u200b\u200c\u200d\u200e\u200f\u202a\u202e\u2060\u2064\u2066\u2069\ufeff\x80\x9f"

parts = (
    st.text(
        st.characters(exclude_categories=["Cs"]) | st.sampled_from(REWRITTEN),
        min_size=1,
        max_size=255,
    )
    | st.sampled_from("a\u200b\u00e9\U0001f600").flatmap(
        lambda it: st.integers(230, 255).map(lambda size: it * (size // len(it.encode())))
    )
).filter(lambda it: "/" not in it and unsafe_name(it) is None and len(it.encode()) <= 255)
# Above 4,096 bytes the whole path would be too long for the file system.
paths = st.lists(parts, min_size=1, max_size=3).map("/".join)


@functools.cache
def categories():
    """One character of every category; Python takes half a second to look through them all."""
    found = {
        unicodedata.category(character): character
        for character in map(chr, range(sys.maxunicode, 0x1F, -1))
        if character not in "/\\\x7f"
    }
    del found["Cs"]
    return found


def fetched(folder, version, names, top="top", request=None):
    """Which of the published names are in a folder that was fetched from a seed."""
    files = {name: f"{index} of them".encode() for index, name in enumerate(names)}
    lay_down(folder / "seed", files, top)
    data = torrent_of(folder / "seed" / top, PIECE, version)
    torrent = parse_torrent(data)
    topic = f"btih:{torrent.v1}" if torrent.v1 else f"btmh:1220{torrent.v2}"
    root = folder / "fetched"
    manifest = manifest_of(files, torrent.info_hash, name=top)
    with seed(data, folder / "seed", HERE) as seeder:
        link = parse_magnet(f"magnet:?xt=urn:{topic}&x.pe=127.0.0.1:{seeder.port}")
        list(
            fetch(Store(root), Swarm(link, HERE), manifest=manifest, limits=LIMITS, request=request)
        )
    there = {
        str(path.relative_to(root / top)): path.read_bytes()
        for path in root.joinpath(top).rglob("*")
        if path.is_file()
    }
    return there, files


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["v1", "v2", "hybrid"]),
    st.lists(paths, min_size=1, max_size=6, unique_by=lambda it: it.split("/")[0]),
    parts,
)
def test_any_name_that_a_file_system_takes_is_fetched_as_it_is(version, names, top):
    if names == [top]:
        return
    with tempfile.TemporaryDirectory() as folder:
        there, files = fetched(Path(folder), version, names, top)
    assert there == files


@pytest.mark.parametrize("version", ["v1", "v2", "hybrid"])
def test_every_category_of_characters_and_every_length_arrives(tmp_path, version):
    names = [f"{name} {it}{it}" for name, it in categories().items()]
    names += [f"x{it}" for it in REWRITTEN] + ["x", *REWRITTEN]
    names += [f"{length} ".ljust(length, "n") for length in range(236, 256)]
    names += [f"folder {it}/{it * 80}/file" for it in "\u200d\u202e"]
    there, files = fetched(tmp_path, version, names, top="t\u200dp " + "é" * 124)
    assert there == files


def test_a_file_of_the_longest_name_that_is_not_asked_for_leaves_its_shared_bytes(tmp_path):
    names = ["a", "b" * 255]
    there, files = fetched(tmp_path, "v1", names, request=Request(only=("top/a",)))
    assert there.pop("a") == files["a"]
    [(name, data)] = there.items()
    assert name.endswith(".part")
    assert len(name) == 255
    assert data == files["b" * 255]


@pytest.mark.parametrize("version", ["v1", "v2", "hybrid"])
def test_names_that_differ_in_case_only_arrive_where_the_disk_tells_them_apart(tmp_path, version):
    names = ["a/x", "A/x", "A/X", "straße", "STRASSE", "é", "e\u0301"]
    there, files = fetched(tmp_path, version, names)
    assert there == files
    assert not [
        it for it in tmp_path.joinpath("fetched").iterdir() if it.name[:11] == ".grokfetch-"
    ]


def test_where_the_disk_does_not_tell_them_apart_the_torrent_is_refused(tmp_path, monkeypatch):
    lay_down(tmp_path, {"a": b"1", "A": b"2"})
    torrent = parse_torrent(torrent_of(tmp_path / "top", PIECE))
    real = Path.touch

    def touch(path, *args, **kwargs):
        real(path.with_name(path.name.lower()), *args, **kwargs)

    monkeypatch.setattr(Path, "touch", touch)
    root = tmp_path / "root"
    with pytest.raises(TorrentInvalid, match="same name on this file system"):
        payload.refuse_look_alikes(root, parse_info(torrent.info, torrent.piece_layers))
    assert not list(root.iterdir())
