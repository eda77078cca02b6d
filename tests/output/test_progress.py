"""Progress: bars for terminals, few lines elsewhere, and figures that people can read."""

from __future__ import annotations

import io

import pytest

from grokfetch.events import Status
from grokfetch.output import progress
from grokfetch.output.progress import Bar
from grokfetch.units import bytes_text, count_text, seconds_text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 0.0

    monkeypatch.setattr(progress.time, "monotonic", lambda: Clock.now)
    return Clock


def downloading(second, **changes):
    return Status("downloading", second, 100, **{"rate": 1.0, "peers": 1} | changes)


def test_without_a_terminal_only_sparse_lines_are_written(clock):
    out = io.StringIO()
    with Bar("fetch", out) as bar:
        for clock.now in map(float, range(35)):
            bar.take(downloading(int(clock.now), peers=2, mirrors=1))
    lines = out.getvalue().splitlines()
    assert lines[0] == "fetch 10.0 %, 10 B of 100 B, 1 B/s, 1 min 30 s left, 2 peers, 1 mirror"
    assert len(lines) == 3


def shown(text):
    """The final content of each line of a terminal."""
    return [line.split("\r")[-1].rstrip() for line in text.split("\n")]


def test_on_a_terminal_a_bar_is_drawn_and_taken_away(monkeypatch, clock):
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with Bar("fetch", out) as bar:
        bar.take(downloading(25))
        [drawn] = shown(out.getvalue())
        bar.say("a finding")
        assert shown(out.getvalue()) == ["a finding", drawn]
        clock.now = 1.0
        bar.take(downloading(100))
        assert "100.0 %" in shown(out.getvalue())[-1]
    assert drawn.startswith("fetch")
    assert drawn.endswith("25.0 %  1 B/s  1 min 15 s left  1 peer")
    assert shown(out.getvalue()) == ["a finding", ""]


@pytest.mark.parametrize("columns", [40, 80])
def test_a_shorter_line_leaves_nothing_of_a_longer_one(monkeypatch, clock, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    out = Terminal()
    with Bar("fetch", out) as bar:
        bar.take(downloading(25, rate=1e6, peers=123, mirrors=10))
        clock.now = 1.0
        bar.take(Status("metadata", peers=1))
        clock.now = 9.0
        bar.take(Status("metadata", peers=1))
        assert shown(out.getvalue()) == ["metadata  1 peer"]
    assert all(len(line) < columns for line in out.getvalue().split("\r"))


def test_a_bar_is_drawn_ten_times_a_second_at_most(monkeypatch, clock):
    monkeypatch.setenv("COLUMNS", "80")
    out = Terminal()
    with Bar("fetch", out) as bar:
        for step in range(1000):
            clock.now = step / 1000
            bar.take(downloading(step // 10))
    assert out.getvalue().count("%") <= 10


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


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 peers"), (1, "1 peer"), (2, "2 peers"), (1234, "1,234 peers")]
)
def test_one_thing_is_not_several(count, text):
    assert count_text(count, "peer") == text
