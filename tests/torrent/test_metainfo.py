import contextlib
import hashlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.torrents import content, v1_info, v1_torrent, v2_torrent

from grokfetch.errors import TorrentInvalid
from grokfetch.torrent import bencode
from grokfetch.torrent.info_dictionary import parse_info, right_layers
from grokfetch.torrent.magnet import parse_magnet
from grokfetch.torrent.metainfo import check_info_hash, encode_torrent, parse_torrent

PIECE = 32768
FILES = {"a": content(100_000), "b/c": content(10), "b/empty": b""}

values = st.recursive(
    st.integers(-(2**62), 2**62) | st.binary(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.binary(max_size=8), inner, max_size=4)
    ),
    max_leaves=20,
)


def info(**changes):
    value = bencode.decode(v1_info(FILES, PIECE))
    for key, change in changes.items():
        value[key.replace("_", " ").encode()] = change
    return bencode.encode(value)


def one_file(**changes):
    entry = {b"length": 5, b"path": [b"a"]} | {
        key.replace("_", " ").encode(): value for key, value in changes.items()
    }
    return info(files=[entry], pieces=bytes(20))


@given(values)
def test_bencoding_reads_back_what_it_wrote(value):
    assert bencode.decode(bencode.encode(value)) == value


@given(st.binary(max_size=200))
@example(b"i-0e")
@example(b"i01e")
@example(b"01:a")
@example(b"5:abc")
@example(b"l" * 100_000)
@example(b"d1:a" * 5_000)
@example(b"d1:ai1e1:ai2ee")
@example(b"d" + b"i1e" * 2 + b"e")
@example(b"i1ei2e")
@example(b"i" + b"9" * 100 + b"e")
def test_any_bytes_are_a_torrent_or_refused(data):
    for read in (parse_torrent, parse_info, bencode.decode, bencode.members):
        try:
            value = read(data)
        except TorrentInvalid:
            continue
        assert read in (bencode.decode, bencode.members), value


fields = st.sampled_from(
    [b"name", b"piece length", b"pieces", b"files", b"length", b"file tree", b"meta version", b"x"]
)


@given(st.dictionaries(fields, values | st.just(2)))
def test_any_dictionary_is_a_torrent_or_refused(found):
    base = bencode.decode(v1_info(FILES, PIECE))
    for value in (found, base | found):
        data = bencode.encode(value)
        with contextlib.suppress(TorrentInvalid):
            assert parse_info(data).files
        with contextlib.suppress(TorrentInvalid):
            assert parse_torrent(b"d4:info" + data + b"e").info == data


@pytest.mark.parametrize(
    ("damaged", "named"),
    [
        (info(name=b".."), "name"),
        (info(name=b"a/b"), "name"),
        (info(name=b".grokfetch"), "own folder"),
        (info(name=b".GrokFetch"), "own folder"),
        (info(name=b"\xff\xfe"), "UTF-8"),
        (info(name=b""), "name"),
        (info(piece_length=0), "piece length"),
        (info(piece_length=1 << 40), "piece length"),
        (info(pieces=bytes(19)), "pieces"),
        (info(pieces=bytes(2000)), "pieces"),
        (info(files=[], pieces=b""), "files"),
        (one_file(path=[b"..", b"etc"]), "unsafe"),
        (one_file(path=[b"a/b"]), "unsafe"),
        (one_file(path=[b"/etc"]), "unsafe"),
        (one_file(path=[b""]), "unsafe"),
        (one_file(path=[]), "unsafe"),
        (one_file(path=[b"a\0b"]), "unsafe"),
        (one_file(path=[b"a\nb"]), r"unsafe: it has a control character \(U\+000A\)"),
        (one_file(path=[b"a\\b"]), "unsafe: it has a backslash"),
        (one_file(path=[b"a\xff"]), "UTF-8: b'a"),
        (one_file(path=[b"x" * 300]), "unsafe: a part has 300 bytes"),
        (info(name=b"x" * 256), "unsafe: a part has 256 bytes"),
        (one_file(attr=b"l"), "symbolic link"),
        (one_file(symlink_path=[b"etc"]), "symbolic link"),
        (one_file(length=-1), "length"),
        (one_file(length=1 << 62), "length"),
        (one_file(length=1 << 59), "pieces"),
        (
            info(
                files=[{b"length": 1, b"path": [b"a"]}, {b"length": 1, b"path": [b"a"]}],
                pieces=bytes(20),
            ),
            "twice",
        ),
        (
            info(
                files=[{b"length": 1, b"path": [b"a"]}, {b"length": 1, b"path": [b"a", b"b"]}],
                pieces=bytes(20),
            ),
            "both a file and a folder",
        ),
    ],
)
def test_a_hostile_torrent_is_refused_and_the_reason_named(damaged, named):
    with pytest.raises(TorrentInvalid, match=named):
        parse_info(damaged)


def test_the_info_hash_is_that_of_the_original_bytes_even_if_keys_are_not_sorted():
    raw = b"d4:name3:top12:piece lengthi32768e6:pieces0:6:lengthi0ee"
    torrent = parse_torrent(b"d4:info" + raw + b"e")
    assert torrent.info == raw
    assert torrent.v1 == hashlib.sha1(raw).hexdigest()
    assert torrent.v2 is None


def test_nothing_may_follow_a_torrent():
    data = encode_torrent(v1_torrent(FILES, PIECE))
    with pytest.raises(TorrentInvalid, match=rf"something follows.*byte {len(data):,}"):
        parse_torrent(data + b"e")


def test_metadata_of_another_torrent_is_refused():
    torrent = v1_torrent(FILES, PIECE)
    check_info_hash(torrent, torrent.v1)
    with pytest.raises(TorrentInvalid, match="metadata's info hash is"):
        check_info_hash(torrent, "0" * 40)


def test_a_torrent_survives_writing_with_its_trackers_and_layers():
    torrent = parse_torrent(v2_torrent(FILES, PIECE))
    assert torrent.v1 is None
    around = encode_torrent(torrent).replace(b"d4:info", b"d8:announce8:http://x4:info", 1)
    again = parse_torrent(around)
    assert again.trackers == ("http://x",)
    assert parse_torrent(encode_torrent(again)) == again
    assert again.info == torrent.info
    assert again.piece_layers == torrent.piece_layers


@pytest.mark.parametrize("spoil", ["short", "wrong"])
def test_piece_layers_must_be_the_ones_whose_root_the_torrent_names(spoil):
    torrent = parse_torrent(v2_torrent(FILES, PIECE))
    (root, layer), *_ = torrent.piece_layers.items()
    layers = {
        "short": {root: layer[:-32]},
        "wrong": {root: bytes(32) + layer[32:]},
    }[spoil]
    with pytest.raises(TorrentInvalid, match="piece layer"):
        parse_info(torrent.info, layers)
    assert right_layers(torrent.info, {**torrent.piece_layers, **layers}).keys() == (
        torrent.piece_layers.keys() - {root}
    )
    assert right_layers(torrent.info, torrent.piece_layers) == torrent.piece_layers


def test_of_a_file_whose_layer_is_still_to_come_no_piece_can_be_proven():
    torrent = parse_torrent(v2_torrent(FILES, PIECE))
    whole = parse_info(torrent.info, torrent.piece_layers)
    known = dict(torrent.piece_layers)
    known.popitem()
    layout = parse_info(torrent.info, known)
    (lacking,) = layout.unprovable
    assert whole.unprovable == ()
    assert (layout.files, layout.piece_count) == (whole.files, whole.piece_count)
    provable = {piece for piece in range(layout.piece_count) if layout.provable(piece)}
    assert provable == set(range(layout.piece_count)) - set(layout.pieces_over(lacking))
    assert all(layout.expected(piece) == whole.expected(piece) for piece in provable)


@pytest.mark.parametrize("length", [1000, 8192, 49152])
def test_a_v2_piece_length_is_a_power_of_two_from_16_kib_on(length):
    value = bencode.decode(parse_torrent(v2_torrent(FILES, PIECE)).info)
    value[b"piece length"] = length
    with pytest.raises(TorrentInvalid, match="power of two"):
        parse_info(bencode.encode(value))


def test_pads_are_zeros_that_do_not_exist_on_disk():
    files = [
        {b"length": 5, b"path": [b"a"]},
        {b"length": PIECE - 5, b"path": [b".pad", b"1"], b"attr": b"p"},
        {b"length": 7, b"path": [b"b"]},
        {b"length": PIECE - 7, b"path": [b".pad", b"1"], b"attr": b"p"},
    ]
    layout = parse_info(info(files=files, pieces=bytes(40)))
    assert [str(file.path) for file in layout.payload] == ["top/a", "top/b"]
    assert [part.file.pad for part in layout.segments(0)] == [False, True]


HASH = "5f5417efd00df1c0b2b3b2b1b6d2ee1c1c1a0c11"


@pytest.mark.parametrize(
    ("link", "info_hash"),
    [
        (f"magnet:?xt=urn:btih:{HASH}", HASH),
        (f"magnet:?xt=urn:btih:{HASH.upper()}", HASH),
        ("magnet:?xt=urn:btih:L5KBP36QBXY4BMVTWKY3NUXODQOBUDAR", HASH),
        (f"magnet:?xt=urn:btmh:1220{'ab' * 32}", "ab" * 32),
        (f"magnet:?xt=urn:btmh:1220{'ab' * 32}&xt=urn:btih:{HASH}", HASH),
        (f"magnet:?xt.1=urn:btih:{HASH}", HASH),
    ],
)
def test_a_magnet_link_names_its_info_hash_in_any_notation(link, info_hash):
    assert parse_magnet(link).info_hash == info_hash


def test_a_magnet_link_carries_name_trackers_peers_and_web_seeds():
    magnet = parse_magnet(
        f"magnet:?xt=urn:btih:{HASH}&dn=gro%20k&tr=http%3A%2F%2Fa%2Fx&tr=udp://b"
        "&x.pe=127.0.0.1:6881&ws=https://c/"
    )
    assert magnet.name == "gro k"
    assert magnet.trackers == ("http://a/x", "udp://b")
    assert magnet.peers == ("127.0.0.1:6881",)
    assert magnet.web_seeds == ("https://c/",)


@pytest.mark.parametrize(
    "link",
    ["", "http://x", "magnet:", "magnet:?xt=urn:btih:12", "magnet:?xt=urn:sha1:a", "magnet://["],
)
def test_a_link_without_an_info_hash_is_refused(link):
    with pytest.raises(TorrentInvalid, match="magnet"):
        parse_magnet(link)


@given(st.text(max_size=100))
def test_any_text_is_a_magnet_link_or_refused(text):
    for link in (text, f"magnet:?{text}"):
        with contextlib.suppress(TorrentInvalid):
            assert len(parse_magnet(link).info_hash) in (40, 64)
