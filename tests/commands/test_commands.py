"""The commands from end to end: a real swarm on 127.0.0.1, the golden checkpoint, the program."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import psutil
import pytest
from support import golden
from support.program import SIMPLEST, grokfetch, imported_by, invoke
from support.release import publish

from grokfetch import errors
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.manifest.schema import TokenizerSource, parse
from grokfetch.torrent.metainfo import parse_torrent
from loader.devices import arrangement
from loader.weights.capacity import Memory

LOOPBACK = ("--listen", "127.0.0.1:0", "--no-discovery", "--no-mirrors", "--timeout", "60")
ALONE = ("--dtype", "float32", "--mesh", "model=1")
"""Use one of the test's eight devices, which compiles in a fraction of the time."""

TOKENIZER = TokenizerSource(
    PurePosixPath("tokenizer.model"), 9, "ab" * 32, "https://host.example/t"
)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    publish(root, 32 * 1024, "an extra file", TOKENIZER)
    return root


@pytest.fixture(scope="module")
def fetched_once(published, peer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fetched") / "grok"
    text = grokfetch("fetch", published / "tiny.json", "--to", folder, "--peer", peer, *LOOPBACK)
    assert "proven" in text
    return folder


@pytest.fixture
def fetched(fetched_once, tmp_path):
    """A fetched checkpoint that the test may damage."""
    return shutil.copytree(fetched_once, tmp_path / "grok", copy_function=shutil.copy2)


def shard(folder, index):
    return folder / f"release/ckpt-0/tensor{index:05d}_000"


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# --- fetch ---------------------------------------------------------------------------------------


def test_a_magnet_link_becomes_the_references_tokens(fetched_once):
    prompt = " ".join(map(str, golden.prompt("p1")))
    asked = ("run", fetched_once, "--tokens", prompt, "--max-tokens", 32, *ALONE)
    assert grokfetch(*asked) == " ".join(map(str, golden.arrays()["f32/p1_tokens"])) + "\n"
    # What it took is told to status and report.
    run = json.loads(grokfetch("status", fetched_once, "--json"))["runs"][-1]
    assert (run["placement"], run["prompt"], run["tokens"]) == ("mapped", 7, 32)
    assert [sum(layer) for layer in run["experts"]] == [2 * (7 + 31)] * golden.CONFIG.num_layers
    assert run["first_token_s"] > 0 < run["tokens_per_s"]


def test_a_second_fetch_says_that_all_is_there_and_asks_nobody(fetched_once):
    assert "complete" in grokfetch("fetch", fetched_once, "--timeout", "0.001")


def test_a_torrent_file_and_a_manifest_beside_it_are_a_source(published, peer, tmp_path):
    folder = tmp_path / "out"
    source = (published / "tiny.torrent", "--manifest", published / "tiny.json")
    grokfetch("fetch", *source, "--to", folder, "--peer", peer, *LOOPBACK)
    assert "release/NOTES" in folder.joinpath(".grokfetch/manifest.json").read_text()
    assert "all" not in grokfetch("verify", folder).split("proven")[0]


@pytest.mark.slow
def test_the_state_can_be_kept_elsewhere_and_every_command_finds_it(published, peer, tmp_path):
    folder, state = tmp_path / "out", ("--state", tmp_path / "state")
    source = (published / "tiny.json", "--to", folder, "--peer", peer)
    grokfetch("fetch", *source, *LOOPBACK, *state)
    assert not folder.joinpath(".grokfetch").exists()
    grokfetch("verify", folder, code=errors.StateMissing.exit_code)
    grokfetch("verify", folder, *state)
    assert "complete" in grokfetch("fetch", folder, *state)
    assert "layer" in grokfetch("status", folder, *state)
    assert "router/w" in grokfetch("inspect", folder, *state)
    text = grokfetch("run", folder, "--tokens", "181", "--max-tokens", 1, *state, *SIMPLEST)
    assert len(text.split()) == 1


def test_files_that_only_the_torrent_has_are_listed(published, peer, tmp_path):
    command = ("fetch", published / "tiny.json", "--to", tmp_path / "out", "--peer", peer)
    result = invoke(*command, *LOOPBACK)
    assert "also in the torrent: release/NOTES, 13 B" in result.stderr


def test_any_torrent_is_fetched_and_verified_and_only_run_lacks_a_model(published, peer, tmp_path):
    folder = tmp_path / "out"
    info_hash = parse_torrent(published.joinpath("tiny.torrent").read_bytes()).info_hash
    magnet = f"magnet:?xt=urn:btih:{info_hash}&x.pe={peer}"
    grokfetch("fetch", magnet, "--to", folder, *LOOPBACK)
    grokfetch("verify", folder)
    text = grokfetch("run", folder, "--tokens", "1", code=errors.NoModel.exit_code)
    assert "not a model" in text


def test_a_torrent_that_is_not_what_the_manifest_says_is_refused_before_any_byte(
    published, peer, tmp_path
):
    wrong = json.loads(published.joinpath("tiny.json").read_text())
    wrong["files"][3]["size"] += 1
    tmp_path.joinpath("wrong.json").write_text(json.dumps(wrong))
    source = (published / "tiny.torrent", "--manifest", tmp_path / "wrong.json")
    arguments = ("fetch", *source, "--to", tmp_path / "out", "--peer", peer, *LOOPBACK)
    text = grokfetch(*arguments, code=errors.Contradiction.exit_code)
    assert "tensor00003_000" in text
    assert not list(tmp_path.joinpath("out").rglob("tensor*"))


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("nowhere.torrent", errors.SourceInvalid),
        ("magnet:?xt=urn:btih:xyz", errors.TorrentInvalid),
        ("noise", errors.TorrentInvalid),
        ("list.json", errors.ManifestInvalid),
        (".", errors.SourceInvalid),
    ],
)
def test_what_is_no_source_is_refused(tmp_path, monkeypatch, source, kind):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("noise").write_bytes(b"\x00noise")
    tmp_path.joinpath("list.json").write_text('{"schema": 1}')
    text = grokfetch("fetch", source, "--to", "out", code=kind.exit_code)
    assert source in text or "magnet" in text


def test_a_swarm_without_anybody_ends_with_what_to_do(tmp_path):
    magnet = "magnet:?xt=urn:btih:" + "12" * 20
    text = grokfetch(
        *("fetch", magnet, "--to", tmp_path / "out", *LOOPBACK, "--timeout", "0.3"),
        code=errors.Stalled.exit_code,
    )
    assert "--peer HOST:PORT" in text


def test_ctrl_c_keeps_what_is_proven_and_the_next_run_goes_on(published, tmp_path):
    folder = tmp_path / "out"
    command = [sys.executable, "-m", "grokfetch", "fetch", published / "tiny.torrent"]
    command += ["--to", folder, *LOOPBACK]
    alone = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not folder.joinpath(".grokfetch/record.json").exists():
        assert time.monotonic() < deadline
        assert alone.poll() is None
        os.sched_yield()
    alone.send_signal(2)
    assert alone.wait(60) == 130
    assert "interrupted" in alone.stderr.read()
    alone.stderr.close()
    torrent = published.joinpath("tiny.torrent").read_bytes()
    with seed(torrent, published, SwarmSettings.loopback()) as seeder:
        grokfetch("fetch", folder, "--peer", f"127.0.0.1:{seeder.port}", *LOOPBACK)
    grokfetch("verify", folder)


# --- verify --------------------------------------------------------------------------------------


def test_verify_says_how_much_is_proven_and_by_what(fetched_once):
    info_hash = parse(fetched_once.joinpath(".grokfetch/manifest.json").read_bytes(), "x").info_hash
    assert f"proven, by the piece hashes of {info_hash}" in grokfetch("verify", fetched_once)


@pytest.mark.parametrize("command", ["verify", "status"])
def test_a_folder_is_judged_without_importing_what_a_fetch_needs(fetched_once, command):
    code = (
        "import contextlib, io, sys\nfrom grokfetch.cli import main\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        f"    main([{command!r}, {str(fetched_once)!r}], standalone_mode=False)\n"
        "assert 'proven' in out.getvalue()\n"
        "assert not [name for name in sys.modules if name.startswith('grokfetch.fetch')]"
    )
    assert not imported_by(code) & {"asyncio", "libtorrent", "psutil", "tqdm"}


def test_a_flipped_bit_is_found_with_its_tensor_and_costs_one_piece(fetched, peer):
    flip(shard(fetched, 2), 50_000)
    text = grokfetch("verify", fetched, code=errors.Damaged.exit_code)
    assert "corrupt piece" in text
    assert "[transformer/decoder_layer_0/moe/linear/w]" in text
    assert f"grokfetch verify {fetched} --repair" in text
    grokfetch("run", fetched, "--tokens", "1", code=errors.NotProven.exit_code)
    grokfetch("fetch", fetched, "--peer", peer, *LOOPBACK)
    grokfetch("verify", fetched)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "missing"),
        (lambda path: os.truncate(path, 100), "short"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "long"),
    ],
)
def test_missing_short_and_long_files_are_named(fetched, damage, said):
    damage(shard(fetched, 7))
    text = grokfetch("verify", fetched, code=errors.Damaged.exit_code)
    assert f"{said} release/ckpt-0/tensor00007_000" in text


def test_an_extra_file_is_listed_and_does_no_harm(fetched):
    fetched.joinpath("diary.txt").write_text("mine")
    assert "extra diary.txt" in grokfetch("verify", fetched)


def test_a_folder_about_which_nothing_is_known_says_what_to_do(tmp_path):
    text = grokfetch("verify", tmp_path, code=errors.StateMissing.exit_code)
    assert "grokfetch manifest" in text


# --- manifest and inspect ------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path):
    """The golden checkpoint on a disk, not fetched by a torrent."""
    return shutil.copytree(golden.TINY, tmp_path / "tiny")


def test_layers_are_fetched_first_and_the_rest_when_it_is_asked_for(published, peer, tmp_path):
    folder = tmp_path / "part"
    source, options = published / "tiny.json", ("--peer", peer, *LOOPBACK)
    text = grokfetch("fetch", source, "--to", folder, "--layers", "0-1", *options)
    assert "(layers 0-1)" in text
    assert "layers 0-1" in grokfetch("verify", folder)
    told = json.loads(grokfetch("status", folder, "--json"))
    assert told["asked"]["proven"] == told["asked"]["total"] < told["bytes"]["total"]
    names = {
        file.name for file in (folder / "release/ckpt-0").iterdir() if ".part" not in file.name
    }
    assert len(names) == 2 + 2 * 12
    missing = grokfetch("run", folder, "--tokens", "181", code=errors.NotProven.exit_code)
    assert "layers 0-1" in missing
    grokfetch("fetch", folder, "--all", *options)
    assert grokfetch("verify", folder).count("layers") == 0
    arguments = ("--tokens", "181", "--max-tokens", 3, *SIMPLEST)
    assert grokfetch("run", folder, *arguments).split() == [
        str(token) for token in golden.arrays()["f32/p0_tokens"][:3]
    ]


def test_what_is_no_part_of_the_checkpoint_is_a_clear_error(published, peer, tmp_path):
    source, options = published / "tiny.json", ("--peer", peer, *LOOPBACK)
    code = errors.SelectionInvalid.exit_code
    for choice, said in (
        (("--layers", "99"), "has layers 0-11, not 99"),
        (("--layers", "x"), "not numbers or ranges"),
        (("--only", "nothing"), "matches: nothing"),
    ):
        found = grokfetch("fetch", source, "--to", tmp_path / "p", *choice, *options, code=code)
        assert said in found
    grokfetch("fetch", source, "--to", tmp_path / "p", "--all", "--layers", "1", *options, code=2)


def test_files_that_came_another_way_are_described_verified_and_run(copied, tmp_path):
    out = tmp_path / "manifest.json"
    grokfetch("manifest", copied, "--config", copied / "config.json", "--output", out)
    made = parse(out.read_bytes(), "out")
    assert len(made.files) == len(made.tensors) == 146
    for file in made.files:
        assert file.sha256 == hashlib.sha256((copied / file.path).read_bytes()).hexdigest()
    assert "unchanged since" in grokfetch("verify", copied)
    text = grokfetch("run", copied, "--tokens", "181", "--max-tokens", 4, *SIMPLEST)
    assert text.split() == [str(token) for token in golden.arrays()["f32/p0_tokens"][:4]]
    flip(copied / "ckpt-0/tensor00009_000", 300)
    text = grokfetch("verify", copied, code=errors.Damaged.exit_code)
    assert "corrupt ckpt-0/tensor00009_000" in text


def test_files_whose_frame_is_right_run_unproven_only_on_request(copied):
    grokfetch("manifest", copied, "--config", copied / "config.json")
    copied.joinpath(".grokfetch/record.json").unlink()
    arguments = ("run", copied, "--tokens", "181", "--max-tokens", 2, *SIMPLEST)
    text = grokfetch(*arguments, code=errors.NotProven.exit_code)
    assert f"grokfetch verify {copied}" in text
    assert len(grokfetch(*arguments, "--unproven").split()) == 2


def test_a_config_of_another_model_is_refused(copied):
    text = grokfetch("manifest", copied, code=errors.CheckpointInvalid.exit_code)
    assert "--config" in text


def test_inspect_lists_names_shapes_and_offsets_without_jax(copied):
    grokfetch("manifest", copied, "--config", copied / "config.json")
    lines = grokfetch("inspect", copied, "--json").splitlines()
    assert len(lines) == 146
    assert json.loads(lines[2]) == {
        "name": "transformer/decoder_layer_0/moe/linear/w",
        "dtype": "int8",
        "shape": [8, 64, 112],
        "scales": [8, 1, 112],
        "bytes": 57344,
        "offset": 199,
        "file": "ckpt-0/tensor00002_000",
    }
    code = f"from grokfetch.cli import main\ntry: main(['inspect', {str(copied)!r}])\n"
    code += "except SystemExit: pass\nimport sys; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=True)


def test_inspect_of_a_hostile_pickle_prints_the_error_and_executes_nothing(tmp_path):
    witness = tmp_path / "witness"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {witness}",)

    evil = tmp_path / "tensor00000_000"
    evil.write_bytes(pickle.dumps(Hostile(), protocol=4))
    text = grokfetch("inspect", evil, code=errors.ShardInvalid.exit_code)
    assert "STACK_GLOBAL" in text
    assert "system" in text
    assert not witness.exists()


# --- run -----------------------------------------------------------------------------------------


def test_without_a_tokenizer_its_address_and_digest_are_said_before_anything_is_loaded(
    fetched_once,
):
    text = grokfetch("run", fetched_once, "Hello", code=errors.TokenizerMissing.exit_code)
    assert "https://host.example/t" in text
    assert "ab" * 32 in text
    assert "loaded" not in text
    assert "mapped" not in text


def test_run_wants_either_a_prompt_or_tokens(fetched_once):
    assert "either" in grokfetch("run", fetched_once, code=2)
    assert "not token ids" in grokfetch("run", fetched_once, "--tokens", "1 two", code=2)
    assert "expert=N" in grokfetch("run", fetched_once, "--tokens", "1", "--mesh", "8", code=2)


def test_a_prompt_that_cannot_be_is_refused_before_anything_is_loaded(fetched_once):
    text = grokfetch("run", fetched_once, "--tokens", "512", code=errors.PromptInvalid.exit_code)
    assert "vocabulary" in text
    assert "loaded" not in text
    assert "mapped" not in text


@pytest.mark.slow
def test_the_mesh_can_be_chosen_and_changes_no_token(fetched_once):
    arguments = ("run", fetched_once, "--tokens", "181", "--max-tokens", 4, "--dtype", "float32")
    one = grokfetch(*arguments, "--mesh", "model=1")
    assert grokfetch(*arguments, "--mesh", "data=2,expert=2,model=2") == one


def test_copies_of_mapped_weights_are_refused(fetched_once):
    arguments = ("run", fetched_once, "--tokens", "1", "--placement", "mapped")
    text = grokfetch(*arguments, "--mesh", "data=2,model=4", code=errors.MeshInvalid.exit_code)
    assert "data and expert must be 1, not data=2,expert=1,model=4" in text
    assert "loaded" not in text


def test_a_device_that_cannot_hold_its_share_is_refused_with_what_would_help(
    fetched_once, monkeypatch
):
    monkeypatch.setattr(arrangement, "free_memory", lambda _: Memory(3_000_000))
    text = grokfetch(
        *("run", fetched_once, "--tokens", "1", *SIMPLEST),
        code=errors.OutOfReach.exit_code,
    )
    assert "MB of memory of each device, 3.0 MB are free" in text
    assert "such devices would do" in text


@pytest.mark.parametrize(
    ("free", "hint"), [(4_000_000, "--placement mapped"), (2_000_000, "make memory free")]
)
def test_weights_that_the_memory_cannot_hold_are_refused_before_they_are_loaded(
    fetched_once, monkeypatch, free, hint
):
    there = psutil.virtual_memory()._replace(available=free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: there)
    text = grokfetch(
        *("run", fetched_once, "--tokens", "1", *SIMPLEST),
        code=errors.OutOfReach.exit_code,
    )
    assert f"the model takes 5.6 MB of memory, {free / 1e6:.1f} MB are free\n" in text
    assert hint in text
    assert "loaded" not in text
