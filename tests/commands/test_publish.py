"""Publishing: a folder becomes a torrent, a link and a manifest that strangers can use."""

import errno
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path, PurePosixPath

import libtorrent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import golden
from support.program import SIMPLEST, grokfetch, invoke, killed, started
from support.torrents import content, lay_down

from grokfetch import errors
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.manifest.schema import parse
from grokfetch.torrent import create as making
from grokfetch.torrent.create import Made, make, suitable_piece_length
from grokfetch.torrent.listing import leftovers, list_files
from grokfetch.torrent.magnet import parse_magnet
from grokfetch.torrent.metainfo import encode_torrent, parse_torrent

PIECE = 1 << 15
FILES = {
    "a": content(3 * PIECE - 1),
    "b": content(PIECE),
    "c": b"",
    "d": content(1),
    "deep/er/e": content(5 * PIECE + 20_000),
    "deep/f": content(2 * PIECE),
    "g": content(100),
    "h": b"",
}
LOOPBACK = ("--listen", "127.0.0.1:0", "--no-discovery", "--timeout", "60")


def made(folder, piece_length=PIECE, **kwargs):
    *_, last = make(folder, list_files(folder), piece_length, **kwargs)
    assert isinstance(last, Made)
    return last


def publish(*arguments, code=0):
    """The program's stdout, or both streams if it should fail."""
    return grokfetch("publish", *arguments, code=code).strip()


@pytest.fixture
def top(tmp_path):
    lay_down(tmp_path, FILES)
    return tmp_path / "top"


# --- the torrent ---------------------------------------------------------------------------------


def by_libtorrent(top, piece_length, flags):
    files = sorted(libtorrent.list_files(str(top)), key=lambda it: PurePosixPath(it.filename).parts)
    theirs = libtorrent.create_torrent(files, piece_length, flags)
    libtorrent.set_piece_hashes(theirs, str(top.parent))
    return parse_torrent(bytes(libtorrent.bencode(theirs.generate())))


@pytest.mark.parametrize("piece_length", [1 << 14, PIECE, 1 << 20])
def test_the_info_dictionary_is_to_the_byte_the_one_that_libtorrent_makes(top, piece_length):
    known = by_libtorrent(top, piece_length, 0)
    ours = made(top, piece_length).torrent
    assert ours.info == known.info
    assert ours.piece_layers == known.piece_layers


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.sampled_from([0, 1, 16 * 1024, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE]), min_size=1
    ).filter(any)
)
def test_for_files_of_any_sizes_the_info_hash_is_the_one_that_libtorrent_makes(sizes):
    with tempfile.TemporaryDirectory() as folder:
        lay_down(Path(folder), {f"{n:03}": content(size, n) for n, size in enumerate(sizes)})
        top = Path(folder, "top")
        assert made(top).torrent.info == by_libtorrent(top, PIECE, 0).info
        ours = made(top, v1_only=True).torrent
        assert ours.info == by_libtorrent(top, PIECE, libtorrent.create_torrent.v1_only).info
        assert (ours.v2, ours.piece_layers) == (None, {})


def test_libtorrent_reads_it_with_both_hashes(top):
    ours = made(top).torrent
    info = libtorrent.load_torrent_buffer(encode_torrent(ours)).ti
    assert (str(info.info_hashes().v1), str(info.info_hashes().v2)) == (ours.v1, ours.v2)


def test_every_file_has_its_sha256_and_the_order_of_the_torrent(top):
    ours = made(top)
    assert {str(file.path.relative_to("top")): file.sha256 for file in ours.files} == {
        name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()
    }


def test_names_sort_by_their_parts_as_the_v2_tree_does(tmp_path):
    lay_down(tmp_path, {"sub.c": b"1", "sub/b": b"2", "Z": b"3"})
    assert [str(path) for path, _ in list_files(tmp_path / "top")] == ["Z", "sub/b", "sub.c"]


def test_the_same_bytes_give_the_same_info_hash_whatever_else_differs(top, tmp_path):
    other = tmp_path / "elsewhere"
    for name in sorted(FILES, reverse=True):
        lay_down(other, {name: FILES[name]})
    other.joinpath("top/a").chmod(0o755)
    other.joinpath("top/.grokfetch").mkdir()
    other.joinpath("top/.grokfetch/record.json").write_text("mine")
    one = made(top).torrent
    two = made(other / "top", trackers=["udp://t.example:1"]).torrent
    assert one.info == two.info
    assert two.trackers == ("udp://t.example:1",)


def test_pieces_of_large_files_are_hashed_in_several_jobs_and_put_in_order(top, monkeypatch):
    whole = [made(top, v1_only=it).torrent for it in (False, True)]
    monkeypatch.setattr(making, "BATCH", 1)
    assert [made(top, v1_only=it).torrent for it in (False, True)] == whole


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ([1], 1 << 16),
        ([20_000 << 16], 1 << 16),
        ([(20_000 << 16) + 1], 1 << 17),
        ([413_000_000] * 770, 1 << 24),
        ([1 << 50], 64 << 20),
    ],
)
def test_the_piece_length_follows_the_size(sizes, length):
    assert suitable_piece_length(sizes) == length


def test_a_file_that_changes_while_it_is_read_ends_it(top):
    events = make(top, list_files(top), PIECE)
    next(events)
    top.joinpath("g").write_bytes(b"other")
    with pytest.raises(errors.StorageFailed, match="changed"):
        list(events)
    files = list_files(top)
    top.joinpath("deep/f").write_bytes(b"short")
    with pytest.raises(errors.StorageFailed, match="changed"):
        list(make(top, files, PIECE))


def test_a_link_to_a_file_stands_for_the_file_and_one_to_a_folder_is_refused(top, tmp_path):
    whole = made(top).torrent
    top.joinpath("a").rename(tmp_path / "blob")
    top.joinpath("a").symlink_to(tmp_path / "blob")
    assert made(top).torrent == whole
    top.joinpath("loop").symlink_to(top)
    with pytest.raises(errors.StorageFailed, match="link to a folder"):
        list_files(top)


@pytest.mark.parametrize(
    "name", ["a\\b", "new\nline", b"\xff".decode(errors="surrogateescape"), "C:x"]
)
def test_names_that_others_cannot_lay_down_are_refused(top, name):
    top.joinpath(name).write_text("x")
    with pytest.raises(errors.StorageFailed, match="cannot be shared"):
        list_files(top)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\\b", "backslash"),
        ("new\nline", "control character"),
        (b"\xff".decode(errors="surrogateescape"), "not UTF-8"),
    ],
)
def test_a_folder_whose_own_name_others_cannot_lay_down_is_refused_with_the_reason(
    tmp_path, name, reason
):
    lay_down(tmp_path, {"a": b"1"}, name)
    text = publish(tmp_path / name, code=errors.StorageFailed.exit_code)
    assert reason in text
    assert "rename the folder" in text


def test_a_link_that_leads_nowhere_is_refused_as_such(top):
    top.joinpath("link").symlink_to("gone")
    with pytest.raises(errors.StorageFailed, match="a link to 'gone', which does not exist"):
        list_files(top)


def test_names_that_differ_in_case_only_are_published_with_a_warning(tmp_path):
    lay_down(tmp_path, {"sub/a": b"1", "sub/A": b"2"})
    told = invoke("publish", tmp_path / "top").stderr
    assert "warning: 'sub/A' and 'sub/a' are the same name" in told


LEFT = (".DS_Store", "deep/.DS_Store", "._a", ".cache/huggingface/download/a.metadata")


def test_what_other_programs_leave_is_published_only_if_asked_for(top, tmp_path):
    clean = publish(top, "--output", tmp_path / "clean")
    for name in LEFT:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).write_bytes(b"left")
    (top / ".cache/huggingface/lock").symlink_to("gone")
    told = invoke("publish", top, "--output", tmp_path / "out")
    assert told.stdout.strip() == clean
    assert "left out: .DS_Store and others" in told.stderr
    (top / ".cache/huggingface/lock").unlink()
    whole = invoke("publish", top, "--output", tmp_path / "whole", "--leftovers")
    assert "left out" not in whole.stderr
    files = parse((tmp_path / "whole/top.json").read_bytes(), "top.json").files
    assert {f"top/{name}" for name in LEFT} < {str(file.path) for file in files}
    assert len(files) == len(FILES) + len(LEFT)


@pytest.mark.parametrize("name", [".cache/other/x", "huggingface/x", "a._b", "DS_Store", ".hidden"])
def test_what_only_looks_like_it_is_published(top, name):
    (top / name).parent.mkdir(parents=True, exist_ok=True)
    (top / name).write_bytes(b"x")
    assert leftovers(top) == []


def test_a_folder_with_the_longest_name_is_published(tmp_path):
    lay_down(tmp_path, {"a": b"1"}, "n" * 255)
    publish(tmp_path / ("n" * 255))
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".torrent", ".json"}


def test_a_folder_without_bytes_or_like_its_only_file_is_refused(tmp_path):
    lay_down(tmp_path, {"e": b""})
    with pytest.raises(errors.StorageFailed, match="no bytes"):
        list_files(tmp_path / "top")
    lay_down(tmp_path / "x", {"top": b"1"})
    with pytest.raises(errors.StorageFailed, match="own name"):
        list_files(tmp_path / "x/top")


# --- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stranger_fetches_verifies_and_runs_what_was_published(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    release = shutil.copytree(golden.TINY, ours / "tiny")
    config = release / "config.json"
    magnet = publish(release, "--config", config, "--piece-length", PIECE)
    torrent = ours.joinpath("tiny.torrent").read_bytes()
    link = parse_magnet(magnet)
    assert link.info_hash == parse_torrent(torrent).v1
    assert f"urn:btmh:1220{parse_torrent(torrent).v2}" in magnet
    shutil.move(ours / "tiny.json", tmp_path / "their.json")
    with seed(torrent, ours, SwarmSettings.loopback()) as seeder:
        for topic in (magnet, magnet.replace(f"xt=urn:btih:{link.info_hash}&", "")):
            grokfetch("fetch", f"{topic}&x.pe=127.0.0.1:{seeder.port}", "--to", theirs, *LOOPBACK)
            grokfetch("verify", theirs)
            shutil.rmtree(theirs)
        source = (f"{magnet}&x.pe=127.0.0.1:{seeder.port}", "--manifest", tmp_path / "their.json")
        grokfetch("fetch", *source, "--to", theirs, *LOOPBACK)
    assert f"by the piece hashes of {link.info_hash}" in grokfetch("verify", theirs)
    text = grokfetch("run", theirs, "--tokens", "181", "--max-tokens", 4, *SIMPLEST)
    assert text.split() == [str(token) for token in golden.arrays()["f32/p0_tokens"][:4]]


def test_any_folder_is_published_with_a_plain_manifest_and_only_our_state_is_added(top, tmp_path):
    before = sorted(top.rglob("*"))
    magnet = publish(
        *(top, "--output", tmp_path / "new" / "out"),
        *("--tracker", "udp://t.example:1/announce", "--web-seed", "https://w.example/a b/"),
    )
    after = (it for it in top.rglob("*") if ".grokfetch" not in it.relative_to(top).parts)
    assert sorted(after) == before
    out = tmp_path / "new" / "out"
    known = parse_torrent(out.joinpath("top.torrent").read_bytes())
    manifest = parse(out.joinpath("top.json").read_bytes(), "x")
    assert known.trackers == parse_magnet(magnet).trackers == ("udp://t.example:1/announce",)
    assert known.web_seeds == parse_magnet(magnet).web_seeds == ("https://w.example/a b/",)
    assert (manifest.info_hash, manifest.magnet, manifest.model) == (known.v1, magnet, None)
    assert all(file.sha256 for file in manifest.files)
    assert parse_magnet(magnet).name == "top"


def test_a_v1_torrent_has_one_info_hash_and_is_fetched_by_it(top, tmp_path):
    magnet = publish(top, "--v1", "--piece-length", PIECE)
    assert "btmh" not in magnet
    torrent = top.with_name("top.torrent").read_bytes()
    with seed(torrent, tmp_path, SwarmSettings.loopback()) as seeder:
        link = f"{magnet}&x.pe=127.0.0.1:{seeder.port}"
        grokfetch("fetch", link, "--to", tmp_path / "theirs", *LOOPBACK)
    for name, data in FILES.items():
        assert tmp_path.joinpath("theirs/top", name).read_bytes() == data


def test_a_published_folder_is_known_to_the_other_commands(top):
    publish(top, "--piece-length", PIECE)
    size = sum(map(len, FILES.values()))
    assert f"{size:,} of {size:,} bytes proven, by the piece hashes" in grokfetch("verify", top)
    assert "100" in grokfetch("status", top, "--plain")
    top.joinpath("a").write_bytes(content(3 * PIECE - 1, 1))
    grokfetch("verify", top, code=errors.Damaged.exit_code)
    publish(top, "--piece-length", PIECE)
    grokfetch("verify", top)


def test_a_published_checkpoint_runs_where_it_lies(tmp_path):
    release = shutil.copytree(golden.TINY, tmp_path / "tiny")
    publish(release, "--config", release / "config.json")
    text = grokfetch("run", release, "--tokens", "181", "--max-tokens", 4, *SIMPLEST)
    assert text.split() == [str(token) for token in golden.arrays()["f32/p0_tokens"][:4]]


@pytest.mark.parametrize("version", [(), ("--v1",)])
def test_publish_seed_shares_until_its_goal_and_another_fetches_it(top, tmp_path, version):
    seeding = ("--seed", "--ratio", "1", "--listen", "127.0.0.1:0", "--no-discovery")
    command = ("publish", top, *version, *seeding)
    with started(*command, until="sharing") as (child, lines):
        port = lines[-1].partition("on port ")[2].partition(";")[0]
        torrent = top.with_name("top.torrent")
        theirs = tmp_path / "theirs"
        grokfetch("fetch", torrent, "--peer", f"127.0.0.1:{port}", "--to", theirs, *LOOPBACK)
        child.communicate(timeout=60)
        assert child.returncode == 0
    assert theirs.joinpath("top/deep/er/e").read_bytes() == FILES["deep/er/e"]


def test_with_state_elsewhere_nothing_is_written_into_the_folder(top, tmp_path):
    before = sorted(top.rglob("*"))
    publish(top, "--state", tmp_path / "state")
    assert sorted(top.rglob("*")) == before
    grokfetch("verify", top, "--state", tmp_path / "state")
    publish(top, "--state", top / "state", code=2)


def test_a_folder_that_takes_no_state_is_published_with_a_note(top, monkeypatch):
    real = Path.mkdir

    def refused(path, *args, **kwargs):
        if path.name == ".grokfetch":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", refused)
    told = invoke("publish", top)
    assert "note: " in told.stderr
    assert told.stdout.startswith("magnet:")
    publish(top, "--seed", code=errors.StorageFailed.exit_code)


def test_a_folder_that_does_not_take_the_mark_of_its_publisher_is_an_error_that_is_told(top):
    in_the_way = top / ".grokfetch/published.json"
    in_the_way.mkdir(parents=True)
    assert f"note: {in_the_way}" in invoke("publish", top).stderr
    publish(top, "--seed", code=errors.StorageFailed.exit_code)
    in_the_way.rmdir()
    publish(top)
    grokfetch("verify", top)


def test_a_folder_is_published_again_after_that_was_killed_before_its_torrent_was_kept(top):
    publish(top)
    top.joinpath("a").write_bytes(b"other")
    killed("grokfetch.folder.advisory", "write_first", 1, "publish", top)
    top.joinpath("b").write_bytes(b"other")
    assert "note: " not in invoke("publish", top).stderr
    grokfetch("verify", top)


def test_what_was_fetched_into_a_folder_stays_in_force_when_it_is_published(top, tmp_path):
    (tmp_path / "x.torrent").write_bytes(encode_torrent(made(top).torrent))
    lay_down(tmp_path / "other", FILES)
    folder = tmp_path / "other"
    grokfetch("fetch", tmp_path / "x.torrent", "--to", folder, *LOOPBACK)
    kept = folder.joinpath(".grokfetch/metadata.torrent").read_bytes()
    assert "does not replace" in invoke("publish", folder).stderr
    assert folder.joinpath(".grokfetch/metadata.torrent").read_bytes() == kept
    publish(folder, "--seed", code=errors.Contradiction.exit_code)


def test_a_tokenizer_among_the_files_is_named_in_the_manifest(top):
    top.joinpath("tokenizer.model").write_bytes(b"words")
    publish(top)
    manifest = parse(top.with_name("top.json").read_bytes(), "x")
    assert manifest.tokenizer.path == PurePosixPath("top/tokenizer.model")
    assert manifest.tokenizer.sha256 == hashlib.sha256(b"words").hexdigest()


def test_output_inside_the_folder_and_strange_addresses_are_wrong_calls(top):
    publish(top, "--output", top / "out", code=2)
    publish(top, "--tracker", "gopher://x", code=2)
    publish(top, "--web-seed", "udp://x", code=2)
    publish(top, "--piece-length", 100_000, code=2)


def test_shards_of_another_model_are_refused_without_its_config(tmp_path):
    release = shutil.copytree(golden.TINY, tmp_path / "tiny")
    text = publish(release, code=errors.CheckpointInvalid.exit_code)
    assert "--config" in text


def test_a_fetch_that_is_not_complete_is_not_published(top, tmp_path):
    lay_down(tmp_path / "other", FILES)
    (tmp_path / "x.torrent").write_bytes(encode_torrent(made(top).torrent))
    folder = tmp_path / "other"
    grokfetch("fetch", tmp_path / "x.torrent", "--to", folder, *LOOPBACK)
    publish(folder)
    folder.joinpath("top/a").write_bytes(b"half")
    publish(folder, code=errors.NotProven.exit_code)


def test_publishing_needs_no_libtorrent(top):
    code = (
        "import sys; sys.modules['libtorrent'] = None\n"
        f"from grokfetch.cli import main\nmain(['publish', {str(top)!r}])"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
