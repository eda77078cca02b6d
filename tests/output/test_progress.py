"""Progress: bars for terminals, sparse lines elsewhere, figures that people can read."""

from __future__ import annotations

import io

import pytest

from grokfetch.output import progress
from grokfetch.output.progress import Bar
from grokfetch.units import bytes_text, seconds_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_only_sparse_lines_are_written(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    out = io.StringIO()
    with Bar("fetch", out) as bar:
        for second in range(35):
            now = float(second)
            bar.show(second, 100, "2 peers")
    lines = out.getvalue().splitlines()
    assert lines[0] == "fetch 10.0 %, 10 B of 100 B, 2 peers"
    assert len(lines) == 3


def test_on_a_terminal_a_bar_is_drawn_and_taken_away():
    out = Terminal()
    with Bar("fetch", out) as bar:
        bar.show(250, 1000, "2 peers")
        bar.say("a finding")
    text = out.getvalue()
    assert "fetch" in text
    assert "25%" in text
    assert "a finding\n" in text
    assert text.endswith("\r")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (24727, "24.7 kB"), (318239886140, "318.2 GB"), (2e12, "2.0 TB")],
)
def test_sizes_are_written_for_people(count, text):
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.034, "0.03 s"),
        (12.4, "12 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (18720, "5 h 12 min"),
        (183600, "2 d 3 h"),
    ],
)
def test_durations_are_written_for_people(seconds, text):
    assert seconds_text(seconds) == text
