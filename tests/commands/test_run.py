"""What `run` prints: the text, and why it is not longer."""

from __future__ import annotations

import json

import pytest
from support.demo import fetch_demo
from support.program import invoke

from grokfetch.commands.run_figures import why_stopped

ALONE = ("--mesh", "model=1", "--dtype", "float32")
PROMPT = "Until then, have"
REST = " patience and enough room on the disk."


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return fetch_demo(tmp_path_factory.mktemp("demo") / "grok")


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


def test_run_says_that_the_text_ended_or_that_no_more_was_asked_for(demo):
    whole = invoke("run", demo, PROMPT, *ALONE)
    assert whole.stdout == REST + "\n"
    assert whole.stderr.endswith("; the text ended\n")
    part = invoke("run", demo, PROMPT, "--max-tokens", 3, *ALONE)
    assert REST.startswith(part.stdout.rstrip("\n"))
    assert part.stderr.endswith("; stopped at --max-tokens 3\n")


def test_statistics_and_events_say_why_a_text_stopped(demo):
    told = invoke("run", demo, PROMPT, "--max-tokens", 3, "--stats", *ALONE).stderr
    assert "end      stopped at --max-tokens 3\n" in told
    *_, last = invoke("run", demo, PROMPT, "--json", *ALONE).stdout.splitlines()
    assert json.loads(last)["stopped"] == "end"
