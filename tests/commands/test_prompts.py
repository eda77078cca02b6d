"""Where `run` gets prompts, and why their texts end."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.demo import fetch_demo
from support.program import SIMPLEST, invoke

from grokfetch import errors
from grokfetch.commands.prompt_list import Settings, already_done
from grokfetch.commands.prompt_options import Entry, read_entries
from grokfetch.commands.run_figures import why_stopped
from grokfetch.interruption import noted
from loader.inference.sampling import Sampling

PROMPT = "Until then, have"
TEXT = " patience and enough room on the disk."
DEADLINE_S = 120.0
HERE = Path("p.jsonl")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return fetch_demo(tmp_path_factory.mktemp("demo") / "grok")


# --- one prompt ----------------------------------------------------------------------------------


def test_a_prompt_comes_from_stdin_without_the_end_of_its_line(demo):
    whole = invoke("run", demo, *SIMPLEST, input=f"{PROMPT}\n")
    assert whole.stdout == TEXT + "\n"
    assert whole.stderr.endswith("; the text ended\n")


def test_a_prompt_comes_from_a_file_and_a_limit_is_said_to_be_reached(demo, tmp_path):
    tmp_path.joinpath("prompt").write_text(f"{PROMPT}\n")
    part = invoke(
        *(
            "run",
            demo,
            "--prompt-file",
            tmp_path / "prompt",
            "--max-tokens",
            3,
            "--stats",
            *SIMPLEST,
        )
    )
    assert TEXT.startswith(part.stdout.rstrip("\n"))
    assert "end      stopped at --max-tokens 3\n" in part.stderr


def test_events_say_why_a_text_stopped(demo):
    *_, last = invoke("run", demo, PROMPT, "--json", *SIMPLEST).stdout.splitlines()
    assert (json.loads(last)["text"], json.loads(last)["stopped"]) == (TEXT, "end")


@pytest.mark.parametrize(
    ("tokens", "most", "room", "why"),
    [
        (5, 5, 100, "max_tokens"),
        (5, 5, 5, "max_tokens"),
        (5, 9, 5, "context"),
        (4, 9, 5, "end"),
        (0, 9, 5, "end"),
    ],
)
def test_a_text_stops_for_one_of_three_reasons(tokens, most, room, why):
    assert why_stopped(tokens, most, room) == why


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "or a text on stdin"),
        (("x", "--tokens", "1"), "give either"),
        (("--prompts", __file__), "--prompts and --output must be given together"),
        (("x", "--output", "y"), "--prompts and --output must be given together"),
        (("x", "--slots", "2"), "--slots requires --prompts"),
    ],
)
def test_ways_that_do_not_go_together_are_refused(tmp_path, arguments, said):
    assert said in invoke("run", tmp_path, *arguments, code=2).stderr


def test_what_is_not_utf_8_is_refused_before_the_folder_is_looked_at(tmp_path):
    told = invoke("run", tmp_path, "-", input=b"caf\xe9", code=errors.PromptInvalid.exit_code)
    assert "stdin: is not UTF-8 (byte 3)" in told.stderr
    assert "iconv" in told.stderr


# --- a terminal ----------------------------------------------------------------------------------


class Typist:
    """A user at the terminal of a program."""

    def __init__(self, *arguments):
        self._terminal, theirs = pty.openpty()
        command = [sys.executable, "-m", "grokfetch", *map(str, arguments)]
        self._program = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._program.kill()
        self._program.wait()
        os.close(self._terminal)

    def waits_for(self, text):
        """Read what the terminal shows up to a text, at least one character."""
        shown, deadline = b"", time.monotonic() + DEADLINE_S
        while not shown or text.encode() not in shown:
            assert time.monotonic() < deadline, shown
            if select.select([self._terminal], [], [], 1.0)[0]:
                shown += os.read(self._terminal, 1)
        return shown.decode(errors="replace")

    def types(self, text):
        os.write(self._terminal, text.encode())

    def presses_ctrl_c(self):
        # As the terminal would, if it were the controlling terminal.
        self._program.send_signal(signal.SIGINT)

    def leaves(self):
        """The exit code, once the program has ended."""
        return self._program.wait(DEADLINE_S)


@pytest.mark.slow
def test_on_a_terminal_each_line_is_continued_until_the_end_of_the_input(demo):
    with Typist("run", demo, *SIMPLEST, "--max-tokens", 2000) as typist:
        typist.waits_for("> ")
        typist.types(f"{PROMPT}\n")
        assert TEXT in typist.waits_for("; the text ended")
        typist.waits_for("> ")
        typist.types("zzz\n")
        # The echo of the terminal, then the beginning of a text that takes long.
        typist.waits_for("zzz\r\n")
        typist.waits_for("")
        typist.presses_ctrl_c()
        typist.waits_for("stopped by Ctrl-C")
        typist.waits_for("> ")
        typist.types("\x04")
        assert typist.leaves() == 0


def test_ctrl_c_is_noted_once_and_then_as_ever():
    usual = signal.getsignal(signal.SIGINT)
    with noted() as pressed:
        assert not pressed()
        signal.raise_signal(signal.SIGINT)
        assert pressed()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is usual


# --- a list --------------------------------------------------------------------------------------


def test_a_list_has_an_object_or_a_string_in_each_line():
    text = '{"prompt": "a", "id": 7}\n\n"b"\n{"prompt": [1, 2]}\r\n'
    assert read_entries(text.encode(), HERE) == (
        Entry(0, "a", 7),
        Entry(1, "b"),
        Entry(2, (1, 2)),
    )


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "contains no prompt"),
        ('"a"\n{"prompt"', "line 2 is not valid JSON"),
        ('{"text": "a"}', "line 1 has no prompt"),
        ('{"prompt": [1, "a"]}', "line 1 has a prompt that is not a string"),
        ("7", "line 1 has a prompt that is not a string"),
    ],
)
def test_a_line_that_is_no_prompt_is_named_with_the_form(text, said):
    with pytest.raises(errors.PromptInvalid, match=said) as refused:
        read_entries(text.encode(), HERE)
    assert '{"prompt"' in refused.value.hint


def line(index, key):
    return json.dumps({"index": index, "text": "x", "key": key}).encode() + b"\n"


KEYS = ("k0", "k1", "k2")


@pytest.mark.parametrize(
    ("data", "done", "whole"),
    [
        (b"", set(), 0),
        (line(2, "k2") + line(0, "k0"), {0, 2}, -1),
        (line(1, "k1") + b'{"index": 0, "te', {1}, len(line(1, "k1"))),
        (b'{"ind', set(), 0),
    ],
    ids=["empty", "whole", "cut", "begun"],
)
def test_lines_of_an_earlier_run_count_and_a_piece_of_one_does_not(data, done, whole):
    assert already_done(data, KEYS, HERE) == (done, len(data) if whole < 0 else whole)


@pytest.mark.parametrize(
    "data",
    [line(0, "k1"), line(3, "k2"), b"{}\n", b"dear diary\n", b"dear diary", b'[1]\n{"index": 0, '],
)
def test_what_is_not_of_these_prompts_is_never_written_to(data):
    with pytest.raises(errors.Contradiction) as refused:
        already_done(data, KEYS, HERE)
    assert "--output" in refused.value.hint


def test_a_text_belongs_to_its_prompt_its_model_and_its_settings():
    settings = Settings("grok", 5, Sampling())
    keys = {
        settings.key(Entry(0, "a")),
        settings.key(Entry(0, "b")),
        Settings("grok", 6, Sampling()).key(Entry(0, "a")),
        Settings("grok", 5, Sampling(seed=1)).key(Entry(0, "a")),
        Settings("other", 5, Sampling()).key(Entry(0, "a")),
    }
    assert len(keys) == 5
    assert settings.key(Entry(7, "a", "name")) in keys


PROMPTS = (PROMPT, "First it asks", "In the demo")


@pytest.fixture
def listed(tmp_path):
    """A list of prompts, and the options that have them continued."""
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": text, "id": f"n{number}"} for number, text in enumerate(PROMPTS)]
    file.write_text("".join(json.dumps(entry) + "\n" for entry in [*lines, {"prompt": [5, 6]}]))
    output = tmp_path / "texts.jsonl"
    options = ("--prompts", file, "--output", output, "--max-tokens", 20, "--slots", 2, *SIMPLEST)
    return output, options


def texts_in(output):
    return {fields["index"]: fields for fields in map(json.loads, output.read_text().splitlines())}


def test_many_prompts_give_the_texts_that_each_gives_alone(demo, listed):
    output, options = listed
    told = invoke("run", demo, *options, "--json").stdout.splitlines()
    texts = texts_in(output)
    assert sorted(texts) == [0, 1, 2, 3]
    alone = invoke("run", demo, PROMPTS[1], "--max-tokens", 20, *SIMPLEST).stdout
    assert [texts[number]["text"] + "\n" for number in (0, 1)] == [TEXT + "\n", alone]
    assert [(it["prompt"], it["id"]) for it in map(texts.get, (0, 1))] == [
        (PROMPTS[0], "n0"),
        (PROMPTS[1], "n1"),
    ]
    assert (texts[0]["finish_reason"], texts[0]["tokens"]) == ("stop", 17)
    assert (texts[1]["finish_reason"], texts[1]["tokens"]) == ("length", 20)
    last = json.loads(told[-1])
    assert (last["texts"], last["before"]) == (4, 0)
    assert last["tokens"] == sum(text["tokens"] for text in texts.values())
    progress = [it for it in map(json.loads, told) if it.get("phase") == "prompts"]
    assert {it["unit"] for it in progress} == {"text"}
    assert (progress[-1]["done"], progress[-1]["total"]) == (4, 4)


def test_a_list_that_was_interrupted_is_gone_on_with(demo, listed):
    output, options = listed
    invoke("run", demo, *options)
    whole = output.read_text().splitlines(keepends=True)
    # Killed while the third line was being written.
    output.write_text("".join(whole[:2]) + whole[2][:30])
    assert "2 texts" in invoke("run", demo, *options).stdout
    again = output.read_text().splitlines(keepends=True)
    assert again[:2] == whole[:2]
    assert sorted(again) == sorted(whole)
    told = invoke("run", demo, *options)
    assert "4 done before" in told.stdout
    assert "mapped" not in told.stderr
    refused = invoke(
        *("run", demo, *options, "--temperature", 1), code=errors.Contradiction.exit_code
    )
    assert "not made from these prompts and settings" in refused.stderr
    assert output.read_text().splitlines(keepends=True) == again


def test_one_process_writes_the_texts(demo, listed):
    output, options = listed
    with output.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        told = invoke("run", demo, *options, code=errors.StateLocked.exit_code).stderr
    assert "another process is writing this file" in told


def test_a_prompt_that_no_model_can_read_is_named_before_anything_is_loaded(demo, tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('"fine"\n{"prompt": [99999999]}\n')
    told = invoke(
        *("run", demo, "--prompts", file, "--output", tmp_path / "o", *SIMPLEST),
        code=errors.PromptInvalid.exit_code,
    ).stderr
    assert "prompt 2: token 99999999 is outside" in told
    assert "mapped" not in told
