"""Parts of a checkpoint: what is asked for becomes pieces, and nothing else is fetched."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_swarm import FakeSwarm, NoPeers
from support.torrents import content, lay_down, v1_torrent, v2_torrent
from support.web_server import WebServer

from grokfetch.errors import ManifestInvalid, NotProven, SelectionInvalid
from grokfetch.events import Outcome, Summary
from grokfetch.fetch import fetch
from grokfetch.fetch.mirror import MirrorSettings, Together
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.folder.store import Store
from grokfetch.folder.survey import survey
from grokfetch.folder.verify import verify
from grokfetch.manifest import selection as selections
from grokfetch.manifest.schema import Manifest, ManifestFile, ManifestTensor
from grokfetch.manifest.selection import (
    Request,
    Selection,
    parse_numbers,
    pieces_of,
    spans,
    urgency,
)
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import encode_torrent, parse_torrent

PIECE = 16384
EXPERTS, ROWS, COLUMNS = 4, 96, 256
HEAD, TAIL = 201, 333
"""Bytes of a shard's frame before and after its payload."""

MOE = HEAD + EXPERTS * ROWS * COLUMNS + TAIL
NAMES = {
    "t0": ("language_model/in_out_embed/embeddings", 3 * PIECE + 17),
    "t1": ("transformer/decoder_layer_0/moe/linear/w", MOE),
    "t2": ("transformer/decoder_layer_0/router/w", 900),
    "t3": ("transformer/decoder_layer_1/moe/linear/w", MOE),
    "t4": ("transformer/decoder_layer_1/router/w", 900),
    "t5": ("transformer/decoder_layer_2/moe/linear/w", MOE),
    "t6": ("transformer/decoder_layer_2/router/w", 900),
}
FILES = {
    f"ckpt/{name}": content(size, seed) for seed, (name, (_, size)) in enumerate(NAMES.items())
}
FILES["NOTES"] = content(5000, 9)
MIRROR = MirrorSettings(connections=2, patience_s=5, rest_s=0.01, attempts=3)
V1 = v1_torrent(FILES, PIECE)
V2 = parse_torrent(v2_torrent(FILES, PIECE))


def path(name):
    return PurePosixPath("top", "NOTES" if name == "NOTES" else f"ckpt/{name}")


def tensor(file, name, size):
    if "/moe/" in name:
        return ManifestTensor(name, path(file), "int8", (EXPERTS, ROWS, COLUMNS), HEAD)
    return ManifestTensor(name, path(file), "int8", (size,), 0)


def manifest(torrent):
    return Manifest(
        "grok-test",
        tuple(ManifestFile(PurePosixPath("top", name), len(data)) for name, data in FILES.items()),
        info_hash=torrent.info_hash,
        tensors=tuple(tensor(file, *entry) for file, entry in NAMES.items()),
        model={"num_experts": EXPERTS},
    )


@pytest.fixture(params=["v1", "v2"])
def swarm(request):
    return FakeSwarm({"v1": V1, "v2": V2}[request.param], dict(FILES))


def run(root, source, **asked):
    request = Request(**asked) if asked else None
    torrent = V1 if source.info_hash == V1.info_hash else V2
    events = list(fetch(Store(root), source, manifest=manifest(torrent), request=request))
    assert isinstance(events[-1], Outcome)
    return events[-1]


def names(root):
    return sorted(
        str(file.relative_to(root / "top")) for file in (root / "top").rglob("*") if file.is_file()
    )


def whole(root):
    """The files that have their own names; each must have its own content."""
    found = [name for name in names(root) if not name.endswith(".part")]
    for name in found:
        assert (root / "top" / name).read_bytes() == FILES[name], name
    return found


def summary(root):
    return list(verify(Store(root)))[-1]


def test_layers_come_with_what_lies_outside_them_and_nothing_else_looks_whole(swarm, tmp_path):
    run(tmp_path, swarm, layers=(1,))
    assert whole(tmp_path) == ["ckpt/t0", "ckpt/t3", "ckpt/t4"]
    store = Store(tmp_path)
    store.require(path("t3"))
    for name in ("t2", "t5"):
        with pytest.raises(NotProven):
            store.require(path(name), 0, 1)


def test_only_the_pieces_of_what_is_asked_for_are_fetched(swarm, tmp_path):
    run(tmp_path, swarm, layers=(1,))
    layout = parse_info(swarm.torrent.info, swarm.torrent.piece_layers)
    wanted = {
        piece
        for name in ("t0", "t3", "t4")
        for piece in layout.pieces_over(layout.file(path(name)))
    }
    assert set(swarm.fetched) == wanted
    assert len(wanted) <= layout.piece_count / 2


def test_a_real_swarm_leaves_no_neighbour_that_looks_whole_and_completes_it_later(tmp_path):
    lay_down(tmp_path / "seed", FILES)
    with seed(encode_torrent(V1), tmp_path / "seed", SwarmSettings.loopback()) as seeder:
        peer = dataclasses.replace(SwarmSettings.loopback(), peers=(f"127.0.0.1:{seeder.port}",))
        folder = tmp_path / "part"
        run(folder, Swarm(V1, peer), layers=(1,))
        assert whole(folder) == ["ckpt/t0", "ckpt/t3", "ckpt/t4"]
        assert [name for name in names(folder) if name.endswith(".part")]
        assert summary(folder).complete
        list(fetch(Store(folder), Swarm(V1, peer), request=Request()))
    assert whole(folder) == names(folder) == sorted(FILES)


def test_a_proven_part_can_be_shared(tmp_path):
    folder = tmp_path / "part"
    run(folder, FakeSwarm(V1, dict(FILES)), layers=(1,))
    store = Store(folder)
    layout, have = store.layout(), store.record().pieces
    data = encode_torrent(V1)
    with seed(data, folder, SwarmSettings.loopback(), have, layout) as seeder:
        peer = dataclasses.replace(SwarmSettings.loopback(), peers=(f"127.0.0.1:{seeder.port}",))
        run(tmp_path / "other", Swarm(V1, peer), layers=(1,))
    assert whole(tmp_path / "other") == ["ckpt/t0", "ckpt/t3", "ckpt/t4"]


def test_a_mirror_brings_a_part_too(tmp_path):
    with WebServer({f"main/{name}": data for name, data in FILES.items()}) as server:
        address = f"{server.url}/main/{{path}}"
        for asked in ({"layers": (1,)}, {"layers": (2,)}):
            mirror = Together(NoPeers(V1), (address,), settings=MIRROR)
            run(tmp_path, mirror, **asked)
    expected = ["ckpt/t0", "ckpt/t3", "ckpt/t4", "ckpt/t5", "ckpt/t6"]
    assert whole(tmp_path) == expected
    assert summary(tmp_path).complete


def test_later_run_extends_what_was_asked_for_and_fetches_the_difference(swarm, tmp_path):
    run(tmp_path, swarm, layers=(1,))
    first = set(swarm.fetched)
    outcome = run(tmp_path, swarm, layers=(0,))
    second = set(swarm.orders[-1].want)
    assert not first & second
    # Bytes next to those of an edge piece share a disk block with them.
    assert outcome.rehashed <= 2
    assert whole(tmp_path) == ["ckpt/t0", "ckpt/t1", "ckpt/t2", "ckpt/t3", "ckpt/t4"]
    assert summary(tmp_path).complete
    run(tmp_path, swarm)
    assert len(swarm.orders) == 2, "the same again asks for nothing"


def test_everything_can_be_asked_for_in_the_end(swarm, tmp_path):
    run(tmp_path, swarm, layers=(1,))
    list(fetch(Store(tmp_path), swarm, request=Request()))
    assert whole(tmp_path) == sorted(FILES)
    assert names(tmp_path) == sorted(FILES), "nothing is left of the parts"
    assert len(swarm.fetched) == len(set(swarm.fetched))
    assert not (tmp_path / ".grokfetch/selection.json").exists()
    assert summary(tmp_path).complete


def test_of_experts_only_their_own_bytes_are_proven(swarm, tmp_path):
    run(tmp_path, swarm, layers=(1,), experts=(2,))
    store, each = Store(tmp_path), ROWS * COLUMNS
    store.require(path("t3"), 0, HEAD)
    store.require(path("t3"), HEAD + 2 * each, each)
    store.require(path("t3"), HEAD + EXPERTS * each, TAIL)
    store.require(path("t4"))
    with pytest.raises(NotProven):
        store.require(path("t3"))
    assert survey(store).files[path("t3")] == "begun"
    data = (tmp_path / "top/ckpt/t3").read_bytes()
    start = HEAD + 2 * each
    assert data[start : start + each] == FILES["ckpt/t3"][start : start + each]


def test_globs_choose_files_and_tensors(swarm, tmp_path):
    run(tmp_path, swarm, only=("NOTES", "*layer_2/router*"))
    assert whole(tmp_path) == ["NOTES", "ckpt/t6"]


def test_verification_judges_what_was_asked_for(swarm, tmp_path):
    run(tmp_path, swarm, layers=(1,))
    found = summary(tmp_path)
    assert isinstance(found, Summary)
    assert found.complete
    sizes = sum(len(FILES[f"ckpt/{name}"]) for name in ("t0", "t3", "t4"))
    assert found.total == found.proven >= sizes
    assert found.total < sum(map(len, FILES.values())) / 2
    outcome = run(tmp_path, swarm)
    assert (outcome.fetched, outcome.rehashed) == (0, 0), "verifying has lost no proof"
    target = tmp_path / "top/ckpt/t3"
    data = bytearray(target.read_bytes())
    data[70_000] ^= 1
    target.write_bytes(data)
    assert not summary(tmp_path).complete


def test_survey_tells_what_was_asked_for(swarm, tmp_path):
    run(tmp_path, swarm, layers=(1,))
    found = survey(Store(tmp_path))
    assert found.asked.what == "layers 1"
    assert found.asked.proven == found.asked.total < found.total
    states = {str(path.name): state for path, state in found.files.items()}
    assert states["t3"] == "proven"
    assert states["t5"] == "not asked for"


def test_file_that_only_its_digest_proves_is_asked_for_as_a_whole(swarm, tmp_path):
    known = manifest(swarm.torrent)
    stranger = dataclasses.replace(
        known,
        info_hash=None,
        files=tuple(
            dataclasses.replace(
                file, sha256=hashlib.sha256(FILES[str(file.path.relative_to("top"))]).hexdigest()
            )
            for file in known.files
        ),
    )
    request = Request(layers=(1,), experts=(2,))
    list(fetch(Store(tmp_path), swarm, manifest=stranger, request=request))
    assert whole(tmp_path) == ["ckpt/t0", "ckpt/t3", "ckpt/t4"]
    Store(tmp_path).require(path("t3"))
    assert summary(tmp_path).complete


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(layers=(2, 7, 8)), "has layers 0-2, not 7-8"),
        (Request(experts=(4,)), "has experts 0-3, not 4"),
        (Request(only=("nothing*",)), "nothing in grok-test matches: nothing"),
    ],
)
def test_what_is_not_there_is_refused_before_anything_is_kept(swarm, tmp_path, request_, message):
    with pytest.raises(SelectionInvalid, match=message):
        list(fetch(Store(tmp_path), swarm, manifest=manifest(swarm.torrent), request=request_))
    assert not swarm.orders
    assert not (tmp_path / ".grokfetch/selection.json").exists()


def test_what_is_not_there_is_refused_of_a_whole_folder_too(swarm, tmp_path):
    store = Store(tmp_path)
    list(fetch(store, swarm, manifest=manifest(swarm.torrent)))
    with pytest.raises(SelectionInvalid, match="not 7"):
        list(fetch(store, swarm, request=Request(layers=(7,))))


def test_manifest_without_tensors_has_files_to_choose_only():
    bare = dataclasses.replace(manifest(V1), tensors=())
    with pytest.raises(SelectionInvalid, match="names no layers"):
        spans(bare, Selection((Request(layers=(1,)),)))
    assert list(spans(bare, Selection((Request(only=("*/t3",)),)))) == [path("t3")]


def test_damaged_selection_is_set_aside_and_everything_is_asked_for(swarm, tmp_path):
    run(tmp_path, swarm, layers=(1,))
    (tmp_path / ".grokfetch/selection.json").write_text('{"schema": 99}')
    run(tmp_path, swarm)
    assert whole(tmp_path) == sorted(FILES)
    assert len(swarm.fetched) == len(set(swarm.fetched))


def test_what_lies_outside_the_layers_is_the_most_urgent_and_the_last_layer_the_least():
    layout = parse_info(V2.info, V2.piece_layers)
    ranks = urgency(manifest(V2), layout, range(layout.piece_count))
    assert set(ranks) == set(range(layout.piece_count))
    assert set(ranks.values()) <= set(range(1, 8))

    def of(name):
        return [ranks[piece] for piece in layout.pieces_over(layout.file(path(name)))]

    assert min(of("t0")) >= max(of("t1"))
    assert min(of("t1")) >= max(of("t3")) >= min(of("t3")) >= max(of("t5"))
    assert max(of("t0")) == 7
    assert min(of("t6")) == 1


def test_without_tensors_all_pieces_are_equally_urgent():
    layout = parse_info(V2.info, V2.piece_layers)
    bare = dataclasses.replace(manifest(V2), tensors=())
    [rank] = set(urgency(bare, layout, range(layout.piece_count)).values())
    assert 1 <= rank <= 7


@given(st.sets(st.integers(0, 999), min_size=1))
def test_numbers_survive_being_written_as_ranges(numbers):
    text = str(Request(layers=tuple(sorted(numbers)))).removeprefix("layers ")
    assert parse_numbers(text) == tuple(sorted(numbers))


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "-1", "1,,2", "1-2-3", "9" * 7, "1;2"])
def test_what_is_no_number_or_range_is_refused(text):
    with pytest.raises(SelectionInvalid, match="not numbers or ranges"):
        parse_numbers(text)


REQUESTS = st.builds(
    Request,
    st.none() | st.lists(st.integers(0, 2), min_size=1, unique=True).map(tuple),
    st.none() | st.lists(st.integers(0, 3), min_size=1, unique=True).map(tuple),
    st.lists(st.sampled_from(["*", "*moe*", "t2", "*layer_1*"])).map(tuple),
)


@given(st.lists(REQUESTS, min_size=1, max_size=3))
def test_selection_survives_its_file(requests):
    selection = Selection(tuple(requests))
    assert selections.decode(selections.encode(selection)) == selection


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"schema": 3, "requests": []}', b"\xff"])
def test_text_that_is_no_selection_is_refused(text):
    with pytest.raises(ManifestInvalid):
        selections.decode(text)


@pytest.mark.parametrize("torrent", [V1, V2], ids=["v1", "v2"])
@given(requests=st.lists(REQUESTS, min_size=1, max_size=2))
def test_pieces_are_those_with_a_byte_that_is_asked_for(torrent, requests):
    layout = parse_info(torrent.info, torrent.piece_layers)
    try:
        asked = spans(manifest(torrent), Selection(tuple(requests)))
    except SelectionInvalid:
        return
    pieces = pieces_of(layout, asked)
    for piece in range(layout.piece_count):
        holds = any(
            start < part.offset + part.length and part.offset < stop
            for part in layout.segments(piece)
            for start, stop in asked.get(part.file.path, ())
        )
        assert holds == (piece in pieces)
    for file, parts in asked.items():
        stops = [0, *(stop for _, stop in parts)]
        assert all(
            before <= start < stop for before, (start, stop) in zip(stops, parts, strict=False)
        )
        assert stops[-1] <= len(FILES[str(file.relative_to("top"))])
