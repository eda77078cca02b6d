"""Magnet links as people have them: copied from mails, pages and chats, complete and damaged."""

from __future__ import annotations

import base64
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokfetch.errors import TorrentInvalid
from grokfetch.torrent.magnet import link_of_hash, parse_magnet

HASH = "5f96d43576e3d386c9ba65b883210a393b68210e"
LINK = f"magnet:?xt=urn:btih:{HASH}&dn=grok-1&tr=udp%3A%2F%2Ft.example%3A1&x.pe=10.0.0.1:6881"


@pytest.mark.parametrize(
    "link",
    [
        f"  {LINK}\n",
        f'"{LINK}"',
        f"'{LINK}'",
        f"<{LINK}>",
        f"\u201c{LINK}\u201d",
        LINK.replace("&", "&amp;"),
        LINK.replace("&", "&#38;"),
        LINK.replace("magnet:", "MAGNET:"),
        LINK.replace("urn:btih:", "URN:BTIH:"),
        LINK.replace("xt=", "XT=").replace("dn=", "Dn=").replace("tr=", "TR="),
        LINK.replace("x.pe=", "X.PE="),
        LINK.replace("&tr", "\r\n&tr"),
        LINK.replace(HASH, base64.b32encode(bytes.fromhex(HASH)).decode()),
    ],
)
def test_a_link_in_any_form_that_copying_leaves_means_the_same(link):
    assert parse_magnet(link) == parse_magnet(LINK)


@pytest.mark.parametrize("name", ["grok 1 weights", "grok #1", "a b # c & d".replace(" & d", "")])
def test_a_name_that_was_not_encoded_swallows_nothing_behind_it(name):
    magnet = parse_magnet(f"magnet:?xt=urn:btih:{HASH}&dn={name}&tr=udp://t.example:1")
    assert magnet.name == name
    assert magnet.trackers == ("udp://t.example:1",)


def test_the_addresses_of_the_metadata_and_the_selection_are_read():
    magnet = parse_magnet(f"{LINK}&xs=https://a.example/g.torrent&as=http://b/t&xs=dht:x&so=0,4-6")
    assert magnet.metadata == ("https://a.example/g.torrent", "http://b/t")
    assert magnet.files == (0, 4, 5, 6)
    assert magnet.unusable == ()


def test_what_of_a_link_cannot_be_used_is_named_and_the_rest_used():
    magnet = parse_magnet(f"{LINK}&tr=nonsense&tr=http://[&x.pe=host&x.pe=h:99999&so=x,1")
    assert magnet.trackers == ("udp://t.example:1",)
    assert magnet.peers == ("10.0.0.1:6881",)
    assert magnet.files == (1,)
    told = "\n".join(magnet.unusable)
    assert all(word in told for word in ("'nonsense'", "'http://['", "'host'", "'h:99999'", "'x'"))
    assert "nonsense" not in magnet.text


@pytest.mark.parametrize(
    ("text", "link"),
    [
        (HASH, f"magnet:?xt=urn:btih:{HASH}"),
        (f" {HASH.upper()}\n", f"magnet:?xt=urn:btih:{HASH}"),
        (base64.b32encode(bytes.fromhex(HASH)).decode(), f"magnet:?xt=urn:btih:{HASH}"),
        ("AB" * 32, f"magnet:?xt=urn:btmh:1220{'ab' * 32}"),
        ("grok-1", None),
        ("ab" * 19, None),
        ("1" * 32, None),
    ],
)
def test_a_bare_info_hash_is_a_link(text, link):
    assert link_of_hash(text) == link


def test_a_link_that_was_cut_short_says_what_to_do():
    with pytest.raises(TorrentInvalid) as caught:
        parse_magnet("magnet:?xt=urn:btih:5f96d4")
    assert "quotes" in caught.value.hint


names = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp", "Cf")), min_size=1)
trackers = st.lists(st.from_regex(r"(udp|http)://[a-z]{1,9}:[1-9][0-9]{0,3}/a", fullmatch=True))
peers = st.lists(st.from_regex(r"[a-z]{1,9}:[1-9][0-9]{0,3}", fullmatch=True))


@given(st.binary(min_size=20, max_size=20), names, trackers, peers)
def test_what_is_written_is_read_again(digest, name, trackers, peers):
    pairs = [("dn", name), *(("tr", it) for it in trackers), *(("x.pe", it) for it in peers)]
    link = f"magnet:?xt=urn:btih:{digest.hex()}" + "".join(
        f"&{key}={quote(value, safe='')}" for key, value in pairs
    )
    magnet = parse_magnet(link)
    assert magnet.info_hash == digest.hex()
    assert magnet.name == name
    assert magnet.trackers == tuple(dict.fromkeys(trackers))
    assert magnet.peers == tuple(dict.fromkeys(peers))
    assert parse_magnet(magnet.text) == magnet


@given(st.text(max_size=200))
def test_whatever_stands_behind_the_hash_loses_nothing_of_it(rest):
    magnet = parse_magnet(f"magnet:?xt=urn:btih:{HASH}&dn={rest}")
    assert magnet.info_hash == HASH
    assert parse_magnet(magnet.text).info_hash == HASH
