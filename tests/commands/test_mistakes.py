"""A newcomer's mistake gets a message of a line or two, and the last one says what to do."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.demo import LOOPBACK, fetch_demo
from support.fake_swarm import FakeSwarm
from support.fetched import FILES, V1, run
from support.program import grokfetch, invoke
from support.small_disk import small_disk
from support.torrents import v1_torrent

from grokfetch import errors
from grokfetch.fetch.preflight import probe
from grokfetch.manifest.shipped import demo_folder, grok_1
from grokfetch.torrent.metainfo import encode_torrent

ROOT = Path(__file__).parents[2]
TOO_LONG = "x" * 300

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    and issubclass(kind, errors.GrokfetchError)
    and kind not in {errors.GrokfetchError, errors.ShardInvalid}
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_refusal_has_a_next_step(kind):
    assert str(kind("it is so")) == f"it is so\n  {kind.next_step}"
    assert len(kind.next_step) > 10
    assert str(kind("it is so", hint="do that")) == "it is so\n  do that"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("fecth", "fetch"),
        ("download", "fetch"),
        ("magnet:?xt=urn:btih:" + 40 * "a", "fetch"),
        ("check", "verify"),
        ("generate", "run"),
        ("ls", "inspect"),
        ("help", "--help"),
    ],
)
def test_a_command_by_another_name_is_told_ours(typed, meant):
    assert f"Did you mean '{meant}'?" in invoke(typed, code=2).stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "d", "--slots", "0"), "must be an integer, 1 to 256, not '0'"),
        (("serve", "d", "--port", "x"), "must be an integer, 0 to 65,535, not 'x'"),
        (("run", "d", "x", "--top-p", "0"), "must be a number, more than 0, at most 1, not '0'"),
        (("run", "d", "x", "--max-tokens", "1.5"), "must be an integer, 1 or more, not '1.5'"),
        (("fetch", "--timeout", "0"), "must be a number, more than 0, not '0'"),
    ],
)
def test_a_value_out_of_bounds_is_told_the_bounds_in_words(arguments, said):
    assert said in invoke(*arguments, code=2).stderr


@pytest.mark.parametrize("command", ["run", "serve", "fetch", "publish"])
def test_help_tells_bounds_in_words_too(command):
    text = invoke(command, "--help").stdout
    assert " RANGE" not in text
    assert "x>" not in text
    assert "<=x" not in text


def test_a_word_too_many_is_told_to_be_quoted(tmp_path):
    assert "put the prompt in quotes" in invoke("run", tmp_path, "hello", "world", code=2).stderr


def test_a_folder_that_is_not_there_may_be_where_to_fetch_to(tmp_path):
    told = invoke("fetch", "grok-9", code=errors.SourceInvalid.exit_code).stderr
    assert told.endswith("grokfetch fetch --to grok-9\n")
    arguments = ("fetch", "x.torrent", "--to", tmp_path)
    told = invoke(*arguments, code=errors.SourceInvalid.exit_code).stderr
    assert told.endswith("leave it out for Grok-1\n")


def test_a_folder_begun_with_another_torrent_is_offered_to_go_on_with(tmp_path):
    run(tmp_path / "begun", FakeSwarm(V1, dict(FILES)))
    other = tmp_path / "other.torrent"
    other.write_bytes(encode_torrent(v1_torrent({"z": b"z" * 100}, 32768)))
    told = invoke(
        *("fetch", other, "--to", tmp_path / "begun", *LOOPBACK),
        code=errors.Contradiction.exit_code,
    ).stderr
    assert f"grokfetch fetch {tmp_path / 'begun'}" in told


def test_a_folder_one_level_off_is_told_the_right_one(tmp_path):
    run(tmp_path / "begun", FakeSwarm(V1, dict(FILES)))
    for wrong in (tmp_path, tmp_path / "begun/top"):
        told = invoke("run", wrong, "hi", code=errors.StateMissing.exit_code).stderr
        assert f"name {tmp_path / 'begun'} instead" in told


def test_a_torrent_given_as_a_folder_is_told_what_it_is_for(tmp_path):
    torrent = demo_folder() / "grok-demo.torrent"
    told = invoke("run", torrent, "hi", code=errors.StateMissing.exit_code).stderr
    assert f"grokfetch fetch {torrent} --to DIR" in told


def test_a_manifest_given_as_config_is_told_to_be_one(tmp_path):
    told = invoke(
        *("manifest", tmp_path, "--config", demo_folder() / "grok-demo.json"),
        code=errors.ManifestInvalid.exit_code,
    ).stderr
    assert "this is a manifest" in told
    assert '"model"' in told


# --- plan takes what fetch takes -----------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return fetch_demo(tmp_path_factory.mktemp("demo") / "grok")


def planned(*arguments, code=0):
    return json.loads(invoke("plan", *arguments, "--json", code=code).stdout)


def test_plan_takes_a_manifest_a_torrent_and_a_folder_begun_before(demo, tmp_path):
    published = demo_folder()
    for source in ("grok-demo.json", "grok-demo.torrent"):
        found = planned(published / source, "--to", tmp_path)
        assert (found["name"], found["missing"]) == ("grok-demo", 1_527_348)
    found = planned(demo)
    assert (found["folder"], found["missing"]) == (str(demo), 0)
    assert planned(demo, "--to", tmp_path)["missing"] == 1_527_348


@pytest.mark.parametrize("source", ["xai-org/grok-1", grok_1().magnet, grok_1().info_hash])
def test_plan_takes_whatever_stands_for_grok_1(tmp_path, source, monkeypatch):
    rich = dataclasses.replace(probe(tmp_path, 0), free=10**12)
    monkeypatch.setattr("grokfetch.commands.plan.probe", lambda *_: rich)
    found = planned(source, "--layers", "0-3", "--to", tmp_path)
    assert (found["name"], found["asked"]["what"]) == ("grok-1", "layers 0-3")
    assert found["missing"] == found["asked"]["bytes"] < found["bytes"] / 10


def test_plan_knows_the_part_that_was_asked_for_before(tmp_path):
    published, root = demo_folder(), tmp_path / "part"
    shutil.copytree(published / "grok-demo", root / "grok-demo")
    torrent = published / "grok-demo.torrent"
    manifest = ("--manifest", published / "grok-demo.json")
    grokfetch("fetch", torrent, *manifest, "--to", root, "--layers", "0", *LOOPBACK)
    assert planned(root)["asked"]["what"] == "layers 0"
    assert planned(root)["missing"] == 0
    assert planned(root, "--all")["asked"] is None
    assert "has layers" in grokfetch(
        "plan", root, "--layers", "99", code=errors.SelectionInvalid.exit_code
    )
    assert "--all cannot be combined" in grokfetch("plan", root, "--layers", "1", "--all", code=2)


def test_plan_of_a_link_that_only_peers_know_says_what_to_name(tmp_path):
    link = f"magnet:?xt=urn:btih:{'1' * 40}"
    told = invoke("plan", link, "--to", tmp_path, code=errors.SourceInvalid.exit_code).stderr
    assert "only its peers know" in told
    assert ".torrent" in told


# --- what the system refuses ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("plan", "--to", TOO_LONG), ("demo", "--keep", TOO_LONG)], ids=["plan", "demo"]
)
def test_a_name_that_no_disk_takes_is_told_in_two_lines(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    told = invoke(*arguments, code=errors.StorageFailed.exit_code).stderr.splitlines()
    assert "File name too long" in told[0]
    assert len(told) == 2


@pytest.mark.parametrize("command", [("plan", "--to"), ("demo", "--keep")], ids=["plan", "demo"])
def test_a_folder_that_may_not_be_entered_is_told_in_two_lines(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    tmp_path.joinpath("locked").mkdir()
    real = os.stat

    def refusing(path, **kwargs):
        if "locked/" in os.fsdecode(path):
            raise PermissionError(13, "Permission denied", os.fsdecode(path))
        return real(path, **kwargs)

    monkeypatch.setattr(os, "stat", refusing)
    told = invoke(*command, "locked/x", code=errors.StorageFailed.exit_code).stderr.splitlines()
    assert "Permission denied" in told[0]
    assert len(told) == 2


def test_a_full_disk_ends_the_demo_with_two_lines(tmp_path):
    with small_disk(tmp_path / "disk", "size=600k") as disk:
        told = invoke("demo", "--keep", disk / "x", code=errors.StorageFailed.exit_code).stderr
    assert "the disk is full" in told
    assert len(told.splitlines()) == 2
    assert len(told) < 400


@pytest.mark.slow
def test_a_shell_without_utf_8_gets_its_two_lines_too(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "grokfetch", "run", tmp_path / "gr\u00fc\u00dfe", "x"],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    )
    assert done.returncode == errors.StateMissing.exit_code
    assert len(done.stderr.splitlines()) == 2
    assert b"nothing here says what this folder must hold" in done.stderr
