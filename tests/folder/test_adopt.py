"""Files in another layout than the torrent's are found, proven and kept where they are."""

import hashlib
import json
import os
import shutil
from pathlib import PurePosixPath
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.fake_swarm import FakeSwarm, Killed, write_at
from support.program import SIMPLEST, grokfetch
from support.torrents import content, lay_down, manifest_of, v1_torrent, v2_torrent

from grokfetch.errors import ManifestInvalid, StorageFailed
from grokfetch.events import Finding, Notice, Outcome, Summary
from grokfetch.fetch import fetch
from grokfetch.fetch.swarm import Swarm, SwarmSettings, seed
from grokfetch.folder.store import Store
from grokfetch.folder.survey import survey
from grokfetch.folder.verify import verify
from grokfetch.manifest import relocation as placing
from grokfetch.manifest.relocation import beside, guesses
from grokfetch.manifest.selection import Request
from grokfetch.manifest.shipped import demo_folder
from grokfetch.torrent.layout import LayoutFile
from grokfetch.torrent.metainfo import encode_torrent, parse_torrent

PIECE = 32768
FILES = {
    "README.md": content(3000),
    "ckpt-0/t0": content(5 * PIECE - 100),
    "ckpt-0/t1": content(6 * PIECE + 17),
    "ckpt-0/t2": content(3 * PIECE, 1),
}
SIZE = sum(map(len, FILES.values()))
V1 = v1_torrent(FILES, PIECE)
V2 = parse_torrent(v2_torrent(FILES, PIECE))
T1 = PurePosixPath("ckpt-0/t1")


@pytest.fixture(params=[V1, V2], ids=["v1", "v2"])
def swarm(request):
    return FakeSwarm(request.param, dict(FILES))


def run(root, swarm, **kwargs):
    return list(fetch(Store(root), swarm, **kwargs))


def pieces_of(swarm):
    return swarm.orders[0].layout.piece_count


def check(root):
    """Check that all reading commands find everything proven; returns verify's other findings."""
    *findings, summary = (e for e in verify(Store(root)) if isinstance(e, Finding | Summary))
    assert summary.complete
    assert set(survey(Store(root)).files.values()) == {"proven"}
    store = Store(root)
    for file in store.manifest().files:
        store.require(file.path)
        assert store.payload(file.path).read_bytes() == FILES[name_of(file.path)]
    return [(found.kind, str(found.path)) for found in findings]


def name_of(path):
    return next(name for name in FILES if PurePosixPath(name).name == path.name)


def files_below(root):
    return sorted(
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and ".grokfetch" not in path.parts
    )


def hugging_face(root, files=FILES):
    """The torrent's files without its top folder."""
    lay_down(root.parent, files, root.name)


def test_hugging_faces_layout_is_adopted_and_nothing_comes(tmp_path, swarm):
    hugging_face(tmp_path / "hf")
    last = run(tmp_path / "hf", FakeSwarm(swarm.torrent, {}))[-1]
    assert (last.total, last.fetched) == (SIZE, 0)
    assert files_below(tmp_path / "hf") == sorted(FILES)
    assert check(tmp_path / "hf") == []
    again = run(tmp_path / "hf", FakeSwarm(swarm.torrent, {}))[-1]
    assert again == Outcome(SIZE, 0, 0)


@pytest.mark.parametrize("how", ["missing", "short", "corrupt"])
def test_only_what_is_missing_or_bad_comes_and_goes_beside_the_rest(tmp_path, swarm, how):
    root = tmp_path / "hf"
    hugging_face(root)
    if how == "missing":
        (root / T1).unlink()
    elif how == "short":
        os.truncate(root / T1, 2 * PIECE)
    else:
        write_at(root / T1, 3 * PIECE + 5, b"spoiled")
    run(root, swarm)
    assert len(swarm.fetched) <= {"missing": 8, "short": 6, "corrupt": 1}[how]
    assert files_below(root) == sorted(FILES)
    assert check(root) == []


def test_a_cache_of_links_is_read_and_a_bad_file_gets_a_copy_of_its_own(tmp_path, swarm):
    root, blobs = tmp_path / "snapshots/main", tmp_path / "blobs"
    blobs.mkdir()
    for number, (name, data) in enumerate(FILES.items()):
        (blobs / str(number)).write_bytes(data)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(blobs / str(number))
    assert run(root, FakeSwarm(swarm.torrent, {}))[-1].fetched == 0
    assert check(root) == []
    write_at(blobs / "2", 3 * PIECE + 5, b"spoiled")
    bad = blobs.joinpath("2").read_bytes()
    events = run(root, swarm)
    assert len(swarm.fetched) == 1
    assert [e.text for e in events if isinstance(e, Notice)] == [
        "ckpt-0/t1 was a link, and is a copy now, for bytes of it are missing"
    ]
    assert not (root / T1).is_symlink()
    assert (root / "ckpt-0/t0").is_symlink()
    assert blobs.joinpath("2").read_bytes() == bad
    assert check(root) == []


def test_a_link_that_leads_nowhere_is_replaced_and_nothing_is_made_where_it_led(tmp_path, swarm):
    root = tmp_path / "hf"
    hugging_face(root)
    (root / T1).unlink()
    (root / T1).symlink_to(tmp_path / "gone")
    (root / "top/ckpt-0").mkdir(parents=True)
    (root / "top/ckpt-0/t1").symlink_to(tmp_path / "gone")
    run(root, swarm)
    assert not (tmp_path / "gone").exists()
    assert (root / "top" / T1).read_bytes() == FILES["ckpt-0/t1"]
    assert check(root) == [("extra", "ckpt-0/t1")]


def test_below_a_link_to_a_folder_files_are_adopted_and_not_written(tmp_path, swarm):
    root = tmp_path / "dir"
    hugging_face(tmp_path / "elsewhere")
    hugging_face(root, {"README.md": FILES["README.md"]})
    (root / "ckpt-0").symlink_to(tmp_path / "elsewhere/ckpt-0")
    assert run(root, FakeSwarm(swarm.torrent, {}))[-1].fetched == 0
    assert check(root) == []
    write_at(tmp_path / "elsewhere" / T1, 9, b"spoiled")
    with pytest.raises(StorageFailed, match="symbolic link to a folder") as caught:
        run(root, swarm)
    assert caught.value.path == str(root / "ckpt-0")


@pytest.mark.parametrize(
    ("ending", "top"), [(".part", "top"), *((ending, ".") for ending in placing.UNFINISHED)]
)
def test_what_another_client_has_not_completed_is_adopted_and_gets_its_name(
    tmp_path, swarm, ending, top
):
    root = tmp_path / "dir"
    hugging_face(root / top)
    path = root / top / T1
    os.truncate(path, 4 * PIECE)
    path.rename(path.with_name(f"t1{ending}"))
    run(root, swarm)
    assert len(swarm.fetched) <= 4
    assert files_below(root) == sorted(str(PurePosixPath(top, name)) for name in FILES)
    assert check(root) == []


@pytest.mark.parametrize("layout", ["folder", "snapshot", "alone"])
def test_what_the_hubs_client_has_begun_under_its_digest_goes_on_beside_the_rest(
    tmp_path, swarm, layout
):
    root = tmp_path / "models--o--n/snapshots/main"
    data = FILES[str(T1)]
    digest = hashlib.sha256(data).hexdigest()
    begun = root / f".cache/huggingface/download/ckpt-0/t1.{digest}.incomplete"
    if layout == "snapshot":
        begun = root.parents[1] / f"blobs/{digest}.incomplete"
    if layout != "alone":
        hugging_face(root, {name: it for name, it in FILES.items() if name != str(T1)})
    begun.parent.mkdir(parents=True)
    begun.write_bytes(data[: 4 * PIECE])
    manifest = manifest_of(FILES, swarm.info_hash, digests=True)
    store = Store(root)
    list(fetch(store, swarm, manifest=manifest))
    assert len(swarm.fetched) <= (4 if layout != "alone" else pieces_of(swarm) - 2)
    assert not begun.exists()
    top = "top" if layout == "alone" else ""
    assert files_below(root) == sorted(str(PurePosixPath(top, name)) for name in FILES)
    assert check(root) == []


@pytest.mark.parametrize("top", ["top", "."])
def test_what_aria2_has_begun_at_its_whole_length_is_adopted_by_its_hashes(tmp_path, swarm, top):
    root = tmp_path / "dir"
    hugging_face(root / top)
    path = root / top / T1
    # Such a client allocates the whole file, and keeps a list of its pieces beside it.
    path.write_bytes(FILES[str(T1)][: 4 * PIECE].ljust(len(FILES[str(T1)]), b"\0"))
    control = path.with_name("t1.aria2")
    control.write_bytes(b"\0\1")
    run(root, swarm)
    assert len(swarm.fetched) <= 4
    assert control.read_bytes() == b"\0\1"
    assert {kind for kind, _ in check(root)} == {"extra"}


def test_a_stranger_of_the_same_name_and_size_is_not_touched(tmp_path, swarm):
    strange = {name: content(len(data), 99) for name, data in FILES.items()}
    hugging_face(tmp_path / "hf", strange)
    run(tmp_path / "hf", swarm)
    for name, data in strange.items():
        assert (tmp_path / "hf" / name).read_bytes() == data
    assert not (tmp_path / "hf/.grokfetch/places.json").exists()
    assert {kind for kind, _ in check(tmp_path / "hf")} == {"extra"}


def test_where_the_likelier_place_holds_a_stranger_the_next_one_is_tried(tmp_path, swarm):
    hugging_face(tmp_path / "dir/a")
    hugging_face(tmp_path / "dir/b")
    for name, data in FILES.items():
        write_at(tmp_path / "dir/a" / name, 0, content(len(data), 99))
    assert run(tmp_path / "dir", FakeSwarm(swarm.torrent, {}))[-1].fetched == 0
    assert {path.parts[0] for path in Store(tmp_path / "dir").places().values()} == {"b"}


def test_files_that_are_put_there_later_are_adopted_too(tmp_path, swarm):
    root = tmp_path / "dir"
    swarm.die_after = 1
    with pytest.raises(Killed):
        run(root, swarm)
    shutil.rmtree(root / "top")
    hugging_face(root / "copies")
    assert run(root, FakeSwarm(swarm.torrent, {}))[-1].fetched == 0
    assert check(root) == []


def test_a_part_of_what_lies_elsewhere_can_be_asked_for_and_then_the_rest(tmp_path, swarm):
    root = tmp_path / "hf"
    hugging_face(root, {name: FILES[name] for name in ("ckpt-0/t0", "ckpt-0/t1")})
    manifest = manifest_of(FILES, swarm.info_hash)
    write_at(root / T1, 3 * PIECE + 5, b"spoiled")
    run(root, swarm, manifest=manifest, request=Request(only=("ckpt-0/t1",)))
    assert len(swarm.fetched) <= 3
    assert (root / T1).read_bytes() == FILES["ckpt-0/t1"]
    Store(root).require(T1)
    rest = FakeSwarm(swarm.torrent, dict(FILES))
    run(root, rest, request=Request())
    assert not set(rest.fetched) & set(swarm.fetched)
    assert [path for path in files_below(root) if not path.endswith(".part")] == sorted(FILES)
    assert check(root) == []


@pytest.mark.parametrize("text", ["", "{}", '{"schema": 2}', '{"schema": 1, "places": []}'])
def test_damaged_places_are_set_aside_and_found_again(tmp_path, swarm, text):
    root = tmp_path / "hf"
    hugging_face(root)
    run(root, FakeSwarm(swarm.torrent, {}))
    (root / ".grokfetch/places.json").write_text(text)
    store = Store(root)
    assert list(fetch(store, FakeSwarm(swarm.torrent, {})))[-1].fetched == 0
    assert "places.json is set aside" in " ".join(store.warnings)
    assert check(root) == []


def test_the_commands_know_where_adopted_files_lie(tmp_path):
    root = tmp_path / "hf"
    hugging_face(root)
    write_at(root / T1, 3 * PIECE + 5, b"spoiled")
    lay_down(tmp_path / "seed", FILES)
    torrent = tmp_path / "x.torrent"
    torrent.write_bytes(encode_torrent(V1))

    here = ("--no-discovery", "--listen", "127.0.0.1:0", "--peer")
    with seed(torrent.read_bytes(), tmp_path / "seed", SwarmSettings.loopback()) as seeder:
        grokfetch("fetch", torrent, "--to", root, *here, f"127.0.0.1:{seeder.port}")
        assert seeder.uploaded() == PIECE
    assert json.loads(grokfetch("status", root, "--json"))["files"]["proven"] == len(FILES)
    assert "bytes proven" in grokfetch("verify", root)
    store = Store(root)
    layout = store.layout()
    with seed(torrent.read_bytes(), root, SwarmSettings.loopback(), None, layout) as seeder:
        peers = SwarmSettings.loopback((f"127.0.0.1:{seeder.port}",))
        run(tmp_path / "copy", Swarm(V1, peers))
    for name, data in FILES.items():
        assert (tmp_path / "copy/top" / name).read_bytes() == data


@pytest.mark.slow
def test_an_adopted_checkpoint_is_verified_and_run_with_the_tokenizer_that_lies_there(tmp_path):
    """As in the tutorial: what a manifest names by path is found where it was adopted."""
    published, root = demo_folder(), tmp_path / "hf"
    shutil.copytree(published / "grok-demo", root)
    torrent, manifest = published / "grok-demo.torrent", published / "grok-demo.json"
    here = ("--no-discovery", "--listen", "127.0.0.1:0", "--no-mirrors")
    grokfetch("fetch", torrent, "--manifest", manifest, "--to", root, *here)
    assert "extra" not in grokfetch("verify", root)
    known = Store(root).manifest()
    assert str(known.tokenizer.path) == "tokenizer.model"
    assert known.file(known.tokenizer.path).sha256 == known.tokenizer.sha256
    kept = json.loads((root / ".grokfetch/manifest.json").read_text())
    assert kept["tokenizer"]["path"] == "grok-demo/tokenizer.model"
    said = grokfetch("run", root, "Every piece is read back", "--max-tokens", 6, *SIMPLEST)
    assert "from the disk and" in said


# --- guesses, which are pure ---------------------------------------------------------------------


def files(*names, size=10):
    return [LayoutFile(PurePosixPath(name), size, 0) for name in names]


def first_guess(wanted, there, digests=MappingProxyType({})):
    return {
        str(name): str(place)
        for name, place in next(
            guesses(wanted, [(PurePosixPath(p), s) for p, s in there], digests), {}
        ).items()
    }


def test_more_of_the_path_counts_most_then_the_size_then_the_company():
    wanted = files("top/a/x", "top/a/y")
    assert first_guess(wanted, [("b/x", 10), ("a/x", 9)]) == {"top/a/x": "a/x"}
    assert first_guess(wanted, [("b/a/x", 9), ("a/x", 10)]) == {"top/a/x": "a/x"}
    there = [("b/a/x", 10), ("c/a/x", 10), ("c/a/y", 10)]
    assert first_guess(wanted, there) == {"top/a/x": "c/a/x", "top/a/y": "c/a/y"}
    assert first_guess(wanted, [("a/x", 11), ("z", 10), ("y", 0)]) == {}


@pytest.mark.parametrize(
    "begun",
    [
        "blobs/{}.incomplete",
        "blobs/{}.0a1b2c3d.incomplete",
        ".cache/huggingface/download/a/x.{}.incomplete",
        ".cache/huggingface/download/a/9cZ-_0=.{}.0a1b2c3d.incomplete",
    ],
)
def test_what_the_hubs_client_has_begun_is_known_by_its_digest(begun):
    wanted, digest = files("top/a/x"), hashlib.sha256(b"x").hexdigest()
    place = begun.format(digest)
    digests = {PurePosixPath("top/a/x"): digest}
    assert first_guess(wanted, [(place, 9)], digests) == {"top/a/x": place}
    assert first_guess(wanted, [(place, 9), ("b/x", 9)], digests) == {"top/a/x": "b/x"}
    assert first_guess(wanted, [(begun.format("0" * 64), 9)], digests) == {}
    assert first_guess(wanted, [(place, 9)]) == {}


def test_what_is_nowhere_belongs_beside_most_of_what_was_found():
    places = {"top/c/x": "c/x", "top/c/y": "c/y", "top/z": "other/z"}
    found = beside(
        {PurePosixPath(name): PurePosixPath(place) for name, place in places.items()},
        [PurePosixPath("top/c/w"), PurePosixPath("top/readme")],
    )
    assert {str(name): str(place) for name, place in found.items()} == {
        "top/c/w": "c/w",
        "top/readme": "readme",
    }


PATHS = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(lambda p: PurePosixPath(*p))


@given(st.dictionaries(PATHS, PATHS))
def test_places_survive_their_file_if_they_are_distinct(places):
    text = placing.encode(places)
    if len(set(places.values())) == len(places):
        assert placing.decode(text) == places
    else:
        with pytest.raises(ManifestInvalid, match="distinct"):
            placing.decode(text)


@pytest.mark.parametrize("place", ["/etc/passwd", "../x", ".grokfetch/lock", "a//b"])
def test_places_that_lead_out_of_the_folder_are_refused(place):
    with pytest.raises(ManifestInvalid, match="plain relative path"):
        placing.decode(json.dumps({"schema": 1, "places": {"top/a": place}}).encode())
