"""Publishing from a mirror: files are hashed while streaming; the torrent is that of a disk."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import golden
from support.patience import wait_for
from support.program import grokfetch, invoke
from support.torrents import content, lay_down
from support.web_server import WebServer

from grokfetch import errors
from grokfetch.commands.published import describe
from grokfetch.fetch import wanted
from grokfetch.fetch.mirror import MirrorSettings, passing
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.manifest.schema import parse
from grokfetch.torrent.create import make
from grokfetch.torrent.metainfo import parse_torrent
from grokfetch.torrent.streamed import FileHasher, made_of
from loader.weights.synthetic import write_checkpoint

PIECE = 1 << 15
FILES = {
    "a": content(3 * PIECE - 1),
    "b": content(PIECE),
    "c": b"",
    "d": content(1),
    "deep/er/e f": content(40 * PIECE + 20_000),
}
LOOPBACK = ("--listen", "127.0.0.1:0", "--no-discovery", "--timeout", "60")


@pytest.fixture
def web():
    """A server with the files below `top`, as a repository has them."""
    served = {f"top/{name}".replace(" ", "%20"): data for name, data in FILES.items()}
    with WebServer(served) as server:
        yield server


@pytest.fixture
def listed(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("".join(f"{name}\n" for name in reversed(FILES)))
    return path


@pytest.fixture
def from_disk(tmp_path):
    """Torrent and manifest of the same files on a disk."""
    lay_down(tmp_path / "disk", FILES)
    grokfetch("publish", tmp_path / "disk/top", "--piece-length", PIECE)
    return read(tmp_path / "disk")


def read(folder, name="top"):
    torrent = parse_torrent(folder.joinpath(f"{name}.torrent").read_bytes())
    return torrent, parse(folder.joinpath(f"{name}.json").read_bytes(), "x")


def publish(web, listed, out, *more, code=0):
    address = f"{web.url}/top/{{path}}"
    return invoke(
        *("publish", address, "--files", listed, "--output", out, "--piece-length", PIECE, *more),
        code=code,
    )


def hashed(out):
    """How many files an interrupted run would not read again."""
    path = out.joinpath(".top.publishing/hashed.json")
    return len(json.loads(path.read_text())["files"]) if path.exists() else 0


# --- hashing --------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from([0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE]), min_size=1).filter(
        any
    ),
    st.sampled_from([7_001, PIECE, 1 << 20]),
)
def test_files_of_any_sizes_in_chunks_of_any_size_make_the_torrent_that_a_disk_makes(
    tmp_path_factory, sizes, chunk
):
    files = {f"{n:03}": content(size, n) for n, size in enumerate(sizes)}
    root = tmp_path_factory.mktemp("disk")
    lay_down(root, files)
    listing = [
        (path.relative_to(root / "top"), path.stat().st_size)
        for path in sorted((root / "top").iterdir())
    ]
    *_, known = make(root / "top", listing, PIECE)
    hashes = {}
    for path, size in listing:
        hasher = FileHasher(size, PIECE, padded=len(files) > 1)
        data = memoryview(files[path.name])
        for start in range(0, size, chunk):
            hasher.update(data[start : start + chunk])
        hashes[path] = hasher.result()
    ours = made_of("top", listing, PIECE, hashes)
    assert ours.torrent == known.torrent
    assert [it.sha256 for it in ours.files] == [it.sha256 for it in known.files]


# --- the command ----------------------------------------------------------------------------------


def test_it_is_the_torrent_and_the_manifest_that_publish_makes_of_the_folder(
    web, listed, from_disk, tmp_path
):
    told = publish(web, listed, tmp_path / "out")
    torrent, manifest = read(tmp_path / "out")
    assert (torrent.info, torrent.piece_layers) == (from_disk[0].info, from_disk[0].piece_layers)
    assert manifest.files == from_disk[1].files
    # What precedes the torrent's name and a file's path is a web seed as in BEP 19.
    assert torrent.web_seeds == (f"{web.url}/",)
    assert manifest.mirrors == (f"{web.url}/top/{{path}}",)
    assert told.stdout.strip() == manifest.magnet
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["top.json", "top.torrent"]


@pytest.mark.parametrize("source", ["torrent", "json"])
def test_its_torrent_is_fetched_from_the_mirror_and_a_peer_alone(web, listed, tmp_path, source):
    out = tmp_path / "out"
    publish(web, listed, out)
    torrent = out.joinpath("top.torrent").read_bytes()
    grokfetch("fetch", out / "top.torrent", "--to", tmp_path / "mine", *LOOPBACK)
    assert "proven, by the piece hashes" in grokfetch("verify", tmp_path / "mine")
    with seed(torrent, tmp_path / "mine", SwarmSettings.loopback()) as seeder:
        peer = ("--peer", f"127.0.0.1:{seeder.port}", "--no-mirrors")
        grokfetch("fetch", out / f"top.{source}", "--to", tmp_path / "theirs", *peer, *LOOPBACK)
    for name, data in FILES.items():
        assert tmp_path.joinpath("theirs/top", name).read_bytes() == data


def test_an_address_that_is_not_named_like_the_torrent_is_a_mirror_to_us_alone(tmp_path, listed):
    served = {f"me/model/resolve/main/{name}": data for name, data in FILES.items()}
    with WebServer({name.replace(" ", "%20"): data for name, data in served.items()}) as web:
        address = f"{web.url}/me/model/resolve/main/{{path}}"
        out = tmp_path / "out"
        grokfetch("publish", address, "--files", listed, "--output", out, "--piece-length", PIECE)
        torrent, _ = read(out, "model")
        assert torrent.web_seeds == (address,)
        grokfetch("fetch", out / "model.torrent", "--to", tmp_path / "mine", *LOOPBACK)
    assert tmp_path.joinpath("mine/model/a").read_bytes() == FILES["a"]


def test_an_interrupted_run_goes_on_with_the_files_that_were_not_whole(
    web, listed, from_disk, tmp_path
):
    out = tmp_path / "out"
    web.halt.add("top/deep/er/e%20f")
    command = ("publish", f"{web.url}/top/{{path}}", "--files", listed, "--output", out)
    program = [sys.executable, "-m", "grokfetch", *map(str, command), "--piece-length", str(PIECE)]
    with subprocess.Popen(program, stderr=subprocess.DEVNULL) as child:
        wait_for(lambda: hashed(out) == len(FILES) - 1)
        child.send_signal(signal.SIGINT)
        assert child.wait(60) == errors.exit_code_of(KeyboardInterrupt())
    web.halt.clear()
    web.asked.clear()
    publish(web, listed, out)
    # The length of each file is requested; beyond that, only incomplete files are.
    assert sorted(web.asked) == sorted([*web.files, "top/deep/er/e%20f"])
    assert read(out)[0].info == from_disk[0].info
    assert not out.joinpath(".top.publishing").exists()


def test_a_bit_that_changes_in_what_was_kept_is_not_published(
    web, listed, from_disk, tmp_path, monkeypatch
):
    out = tmp_path / "out"

    def full(*_):
        raise errors.StorageFailed("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr("grokfetch.commands.publish_mirror.put_out", full)
        publish(web, listed, out, code=errors.StorageFailed.exit_code)
    assert hashed(out) == len(FILES)
    state = out / ".top.publishing/hashed.json"
    fields = json.loads(state.read_text())
    row = fields["files"]["top/a"]
    row[3] = f"{int(row[3][0], 16) ^ 1:x}{row[3][1:]}"
    state.write_text(json.dumps(fields))
    publish(web, listed, out)
    assert read(out)[0].info == from_disk[0].info


def test_answers_that_break_off_are_continued_where_they_ended(web, listed, from_disk, tmp_path):
    web.cut_after = 0.6
    publish(web, listed, tmp_path / "out")
    assert read(tmp_path / "out")[0].info == from_disk[0].info
    assert web.asked.count("top/deep/er/e%20f") > 2


@pytest.mark.parametrize("change", ["length", "etag"])
def test_a_file_that_changes_in_the_middle_is_an_error_that_says_so(web, listed, tmp_path, change):
    web.headers["ETag"] = '"one"'

    def before(path):
        if web.asked.count("top/a") > 1:
            if change == "etag":
                web.headers["ETag"] = '"two"'
            else:
                web.files["top/a"] = FILES["a"] + b"more"

    web.before = before
    told = publish(web, listed, tmp_path / "out", code=errors.Contradiction.exit_code)
    assert "has changed" in told.stderr


def allow(monkeypatch, limited_s):
    """Limit how long servers may let us wait."""
    settings = partial(MirrorSettings, rest_s=0.01, limited_s=limited_s)
    monkeypatch.setattr(wanted, "MirrorSettings", settings)


@pytest.mark.parametrize("case", [(429, 0), (429, len(FILES) + 2), (503, len(FILES) + 2)])
def test_a_server_that_only_has_us_wait_is_given_up_with_what_it_answers(
    web, listed, tmp_path, monkeypatch, case
):
    status, answered = case
    allow(monkeypatch, 0.5)
    web.headers["Retry-After"] = "0.1"

    def before(_path):
        if len(web.asked) > answered:
            web.status = status

    web.before = before
    told = publish(web, listed, tmp_path / "out", code=errors.Stalled.exit_code)
    assert f"{web.url}/top/{{path}}: top/" in told.stderr
    assert f"it answers {status}, and has us wait for 0.50 s or more" in told.stderr
    assert "run the same command again later" in told.stderr
    # Requests are made in between, but not after each response.
    assert answered + 2 <= len(web.asked) <= answered + 50
    web.before = lambda _path: None
    web.status = None
    publish(web, listed, tmp_path / "out")


def test_a_server_that_has_us_wait_for_too_long_is_not_waited_for(
    web, listed, tmp_path, monkeypatch
):
    allow(monkeypatch, 300)
    web.status, web.headers = 429, {"Retry-After": "400"}
    publish(web, listed, tmp_path / "out", code=errors.Stalled.exit_code)


def test_a_long_rest_is_said_and_what_was_limited_in_between_is_no_failure(
    web, listed, from_disk, tmp_path, monkeypatch
):
    allow(monkeypatch, 20)
    monkeypatch.setattr(passing, "LONG_REST_S", 0.2)
    web.status, web.failures, web.headers = 429, 9, {"Retry-After": "0.2"}
    told = publish(web, listed, tmp_path / "out")
    assert f"mirror {web.url}/top/{{path}}: it answers 429 and asks us to wait 0 s" in told.stderr
    assert told.stderr.count("asks us to wait") == 1
    assert read(tmp_path / "out")[0].info == from_disk[0].info


def test_a_file_that_is_another_one_in_the_next_run_is_hashed_again(web, listed, tmp_path):
    web.headers["ETag"] = '"one"'
    missing = web.files.pop("top/d")
    publish(web, listed, tmp_path / "out", code=errors.OutOfReach.exit_code)
    web.files["top/d"] = missing
    web.files["top/a"] = content(3 * PIECE - 1, seed=9)
    web.headers["ETag"] = '"two"'
    publish(web, listed, tmp_path / "out")
    lay_down(tmp_path / "new", {**FILES, "a": web.files["top/a"]})
    grokfetch("publish", tmp_path / "new/top", "--piece-length", PIECE)
    assert read(tmp_path / "out")[0].info == read(tmp_path / "new")[0].info


def test_a_manifest_says_which_files_there_are_and_must_be_right(web, from_disk, tmp_path):
    manifest = tmp_path / "disk/top.json"
    out = ("--output", tmp_path / "out", "--piece-length", PIECE)
    address = f"{web.url}/top/{{path}}"
    grokfetch("publish", address, "--manifest", manifest, *out)
    assert read(tmp_path / "out")[1].files == from_disk[1].files
    web.spoil.add("top/b")
    told = grokfetch(
        "publish", address, "--manifest", manifest, *out, code=errors.Damaged.exit_code
    )
    assert "its sha256 is" in told
    web.files["top/b"] = b"short"
    grokfetch("publish", address, "--manifest", manifest, *out, code=errors.Contradiction.exit_code)


def test_a_checkpoint_has_its_tensors_and_its_model_in_the_manifest(tmp_path):
    release = shutil.copytree(golden.TINY, tmp_path / "disk/tiny")
    config = ("--config", release / "config.json", "--piece-length", PIECE)
    grokfetch("publish", release, *config)
    known = read(tmp_path / "disk", "tiny")
    paths = sorted(path.relative_to(release) for path in release.rglob("*") if path.is_file())
    names = [str(path) for path in paths if ".grokfetch" not in path.parts]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(names))
    with WebServer({f"tiny/{name}": (release / name).read_bytes() for name in names}) as web:
        out = tmp_path / "out"
        address = f"{web.url}/tiny/{{path}}"
        grokfetch("publish", address, "--files", listed, *config, "--output", out)
        torrent, manifest = read(out, "tiny")
        assert torrent.info == known[0].info
        assert (manifest.files, manifest.tensors, manifest.model, manifest.tokenizer) == (
            known[1].files,
            known[1].tensors,
            known[1].model,
            known[1].tokenizer,
        )


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """A checkpoint of one layer, and the configuration of its model."""
    root = tmp_path_factory.mktemp("release") / "tiny"
    config = dataclasses.replace(golden.CONFIG, num_layers=1)
    write_checkpoint(root / "ckpt-0", config)
    root.joinpath("config.json").write_text(json.dumps(config.to_mapping()))
    return root


@contextlib.contextmanager
def shards(release, tmp_path):
    """A server that holds the shards of a release, and the command that publishes them."""
    names = [str(path.relative_to(release)) for path in release.glob("ckpt-0/*")]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(names))
    with WebServer({f"tiny/{name}": (release / name).read_bytes() for name in names}) as web:
        address = (f"{web.url}/tiny/{{path}}", "--files", listed, "--output", tmp_path / "out")
        yield web, ("publish", *address, "--config", release / "config.json")


def tensors(tmp_path):
    """What the published manifest says about each tensor."""
    found = read(tmp_path / "out", "tiny")[1].tensors
    return [(it.file.name, it.dtype, it.shape, it.offset) for it in found]


def described(release):
    """The same from the release."""
    found = describe(release, release / "config.json").tensors
    return [(it.file.name, it.dtype, it.shape, it.offset) for it in found]


def test_what_is_kept_of_shards_is_whole_where_the_disk_takes_it_by_halves(
    release, tmp_path, monkeypatch
):
    real = os.pwrite

    def halves(handle, data, offset):
        return real(handle, data[: -(-len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", halves)
    with shards(release, tmp_path) as (_web, command):
        grokfetch(*command)
    assert tensors(tmp_path) == described(release)


def test_a_shard_of_which_a_kept_bit_changes_is_read_anew_and_no_other(
    release, tmp_path, monkeypatch
):
    def interrupted(*_):
        raise errors.StorageFailed("the disk is full")

    with shards(release, tmp_path) as (web, command):
        with monkeypatch.context() as patched:
            patched.setattr("grokfetch.commands.publish_mirror.put_out", interrupted)
            grokfetch(*command, code=errors.StorageFailed.exit_code)
        frame = tmp_path / "out/.tiny.publishing/frames/tiny/ckpt-0/tensor00003_000"
        with frame.open("r+b") as file:
            file.write(b"\0")
        asked = len(web.asked)
        grokfetch(*command)
        # The length of each is requested first.
        again = [path for path in set(web.asked[asked:]) if web.asked[asked:].count(path) > 1]
    assert again == ["tiny/ckpt-0/tensor00003_000"]
    assert tensors(tmp_path) == described(release)


def test_a_bit_of_a_shard_that_changes_as_it_is_kept_is_found_and_mended(
    release, tmp_path, monkeypatch
):
    real = os.pwrite
    flipped = []

    def flip(handle, data, offset):
        if not flipped:
            flipped.append(Path(f"/proc/self/fd/{handle}").readlink())
            data = bytes([data[0] ^ 1]) + bytes(data[1:])
        return real(handle, data, offset)

    with shards(release, tmp_path) as (_web, command):
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", flip)
            said = grokfetch(*command, code=errors.Damaged.exit_code)
        assert str(flipped[0]) in said
        grokfetch(*command)
    assert tensors(tmp_path) == described(release)


def test_what_is_recorded_of_a_shard_is_on_the_disk_by_then(release, tmp_path, monkeypatch):
    frames = tmp_path / "out/.tiny.publishing/frames/tiny"
    flushed, recorded, early = set(), set(), set()
    real = os.fsync

    def watching(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        if path.name.startswith(".hashed.json"):
            rows = json.loads(path.read_text())["files"]
            recorded.update(frames / Path(name).relative_to("tiny") for name in rows)
            early.update(recorded - flushed)
        flushed.add(path)
        real(handle)

    monkeypatch.setattr(os, "fsync", watching)
    with shards(release, tmp_path) as (web, command):
        grokfetch(*command)
    assert len(recorded) == len(web.files)
    assert not early
    assert frames / "ckpt-0" in flushed


def test_what_does_not_go_together_is_a_wrong_call(web, listed, tmp_path):
    address = f"{web.url}/top/{{path}}"
    grokfetch("publish", address, code=2)
    grokfetch("publish", f"{web.url}/top/", "--files", listed, code=2)
    grokfetch("publish", address, "--files", listed, "--v1", code=2)
    grokfetch("publish", f"{web.url}/{{path}}", "--files", listed, code=2)
    grokfetch("publish", tmp_path, "--files", listed, code=2)
    listed.write_text("../up\n")
    grokfetch("publish", address, "--files", listed, code=errors.SourceInvalid.exit_code)
