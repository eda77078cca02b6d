"""What programs read: one stream of JSON lines with a schema, from `started` to the end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from support import golden
from support.fake_swarm import FakeSwarm
from support.program import grokfetch, invoke
from support.torrents import content, v1_torrent

from grokfetch import __version__, errors
from grokfetch.events import (
    Ended,
    Finding,
    Loaded,
    Metadata,
    Notice,
    Outcome,
    PiecesProven,
    Progress,
    Started,
    Status,
    Summary,
    Token,
)
from grokfetch.fetch import fetch, wanted
from grokfetch.folder.store import Store
from grokfetch.output.json_lines import as_fields, error_fields
from grokfetch.output.progress import Lines

ROOT = Path(__file__).parents[2]
PIECE = 32768
FILES = {"a": content(3 * PIECE - 100), "b": content(1000), "c": content(5 * PIECE)}
TORRENT = v1_torrent(FILES, PIECE)
SIZE = sum(map(len, FILES.values()))
PIECES = -(-SIZE // PIECE)


@pytest.fixture
def begun(tmp_path):
    """A fetched folder in which one byte of piece 4 has been damaged since."""
    list(fetch(Store(tmp_path), FakeSwarm(TORRENT, dict(FILES))))
    path = tmp_path / "top/c"
    data = bytearray(path.read_bytes())
    data[PIECE + 200] ^= 1
    path.write_bytes(data)
    return tmp_path


def events(*arguments, code=0):
    """The events that the program prints, checked for what must hold in every stream."""
    result = invoke(*arguments, "--json", code=code)
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert found[0]["event"] == "started"
    assert found[0]["schema"] == 1
    assert found[0]["command"] == arguments[0]
    assert found[0]["version"] == __version__
    assert all(isinstance(event["time"], float) for event in found)
    assert found[-1]["event"] == ("error" if code else "finished")
    if code:
        assert found[-1]["exit_code"] == code
    return found


def of(found, name):
    return [event for event in found if event["event"] == name]


def test_a_fetch_tells_metadata_progress_pieces_and_how_it_ended(begun, monkeypatch):
    monkeypatch.setattr(wanted, "Swarm", lambda *_: FakeSwarm(TORRENT, dict(FILES)))
    found = events("fetch", begun)
    (metadata,) = of(found, "metadata")
    assert metadata["name"] == "top"
    assert (metadata["files"], metadata["bytes"], metadata["pieces"]) == (3, SIZE, PIECES)
    assert {event["phase"] for event in of(found, "progress")} == {
        "checking",
        "downloading",
        "done",
    }
    pieces = [event["piece"] for event in of(found, "piece")]
    assert len(pieces) == len(set(pieces))
    assert 4 in pieces
    assert found[-1]["total"] == SIZE
    assert found[-1]["fetched"] == 1
    assert found[-1]["folder"] == str(begun)


def test_verify_tells_every_piece_and_finding_and_then_the_error(begun):
    found = events("verify", begun, code=errors.Damaged.exit_code)
    assert {event["piece"] for event in of(found, "piece")} == set(range(PIECES)) - {4}
    (finding,) = of(found, "finding")
    assert (finding["kind"], finding["path"], finding["piece"]) == ("corrupt", "top/c", 4)
    (finished,) = of(found, "finished")
    assert finished["proven"] == SIZE - PIECE
    assert finished["failures"] == 1
    assert found[-1]["kind"] == "Damaged"
    assert f"grokfetch verify {begun} --repair" in found[-1]["hint"]


@pytest.mark.parametrize(
    ("arguments", "kind", "code"),
    [
        (("fetch", "nowhere.torrent", "--to", "x"), "SourceInvalid", 10),
        (("verify", "."), "StateMissing", 14),
        (("run", ".", "--tokens", "1"), "StateMissing", 14),
        (("run", "."), "UsageError", 2),
        (("run", ".", "--tokens", "1", "--max-tokens", "0"), "BadParameter", 2),
    ],
)
def test_whatever_ends_a_command_is_the_last_event(tmp_path, monkeypatch, arguments, kind, code):
    monkeypatch.chdir(tmp_path)
    assert events(*arguments, code=code)[-1]["kind"] == kind


def test_ctrl_c_and_the_unforeseen_are_errors_too(begun, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("grokfetch.folder.verify.verify", interrupted)
    assert events("verify", begun, code=130)[-1]["kind"] == "KeyboardInterrupt"

    def broken(*_args, **_kwargs):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr("grokfetch.folder.verify.verify", broken)
    assert events("verify", begun, code=1)[-1]["what"] == "oh"


def test_without_json_nothing_of_it_is_printed(begun):
    result = invoke("verify", begun, code=errors.Damaged.exit_code)
    assert result.stdout.startswith("corrupt piece 4 top/c")
    assert "{" not in result.output


def test_a_run_tells_loading_tokens_and_times(tmp_path):
    folder = shutil.copytree(golden.TINY, tmp_path / "tiny")
    grokfetch("manifest", folder, "--config", folder / "config.json")
    arguments = ["--tokens", "181", "--max-tokens", 3, "--dtype", "float32"]
    found = events("run", folder, *arguments, "--placement", "sharded", "--mesh", "model=1")
    tokens = [event["id"] for event in of(found, "token")]
    assert tokens == [int(token) for token in golden.arrays()["f32/p0_tokens"][:3]]
    (loaded,) = of(found, "loaded")
    assert loaded["bytes"] > 0
    assert loaded["placement"] == "sharded"
    assert of(found, "progress")[-1]["phase"] == "loading"
    assert found[-1]["tokens"] == 3
    assert found[-1]["text"] is None
    assert found[-1]["tokens_per_s"] > 0


# --- the stream itself ---------------------------------------------------------------------------


def test_progress_is_told_sparsely_and_everything_else_always():
    out, now = [], [0.0]
    lines = Lines(out.append, clock=lambda: now[0])
    for second in range(40):
        now[0] = second / 10
        lines.take(Status("downloading", second, 100))
        lines.take(PiecesProven((second,)))
    lines.take(Status("downloading", 100, 100))
    lines.take(Status("hashing", 0, 100))
    lines.take(Status("hashing", 1, 100))
    lines.take(Progress(100, 100))
    found = [json.loads(line) for line in out]
    assert [event["done"] for event in of(found, "progress")] == [0, 10, 20, 30, 100, 0, 100]
    assert [event["piece"] for event in of(found, "piece")] == list(range(40))


ALL = [
    Started("fetch", "1"),
    Metadata("n", "ab", 1, 2, 3),
    Status("checking"),
    Progress(1, 2),
    PiecesProven((1,)),
    Finding("corrupt", PurePosixPath("a/b")),
    Notice("text"),
    Loaded(1, 2, "CPU", "mapped", 0.1),
    Token(3, "x"),
    Ended(1.0, {}),
]


@pytest.mark.parametrize("event", ALL, ids=lambda event: type(event).__name__)
def test_every_event_and_every_field_stands_in_the_document(event):
    document = (ROOT / "docs/events.md").read_text()
    for fields in as_fields(event):
        name = fields.pop("event")
        (row,) = re.findall(rf"^\| `{name}` \|.*$", document, re.MULTILINE)
        assert all(f"`{field}`" in row for field in fields), row
        json.dumps(fields)


def test_what_ends_a_step_is_told_by_the_command():
    assert as_fields(Outcome(1, 2, 3)) == []
    assert as_fields(Summary(1, 1, 0, None, 0, recorded=True)) == []


def test_an_error_is_told_with_its_class_code_and_what_to_do():
    error = errors.StorageFailed("the disk is full", path="d", hint="make room")
    assert error_fields(error) == {
        "event": "error",
        "kind": "StorageFailed",
        "exit_code": 16,
        "what": "the disk is full",
        "path": "d",
        "hint": "make room",
    }


# --- shells --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script_for_the_shell(shell):
    # Under its own name, as the installed program has it.
    code = "import sys; sys.argv = ['grokfetch']; from grokfetch.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "_GROKFETCH_COMPLETE": f"{shell}_source"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "grokfetch" in done.stdout
    assert f"_GROKFETCH_COMPLETE={shell}_complete" in done.stdout


def test_nothing_is_coloured_on_a_terminal_or_off_it(begun, monkeypatch):
    for value in ("", "1"):
        monkeypatch.setenv("NO_COLOR", value)
        result = invoke("verify", begun, code=errors.Damaged.exit_code, color=True)
        assert "\x1b" not in result.output
