"""How bars, tables, maps and colours are drawn."""

from __future__ import annotations

import dataclasses
import io

import pytest

from grokfetch.folder.survey import piece_map
from grokfetch.output.terminal import SHADES, Screen, screen
from grokfetch.units import share_text


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("environment", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False), ({"NO_COLOR": ""}, True)],
)
def test_colour_is_for_terminals_that_know_it_and_people_who_want_it(
    monkeypatch, environment, coloured
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert screen(Terminal()).colour is coloured
    assert screen(io.StringIO()).colour is False
    row = dataclasses.replace(screen(Terminal()), colour=coloured).painted([0, 2, 4, 4])
    assert row == ("·\x1b[33m▒\x1b[0m\x1b[32m██\x1b[0m" if coloured else "·▒██")


def test_bars_and_shares_say_all_and_nothing_only_where_it_is_so():
    view = Screen()
    assert [view.bar(share, 4) for share in (0, 0.001, 0.5, 0.999, 1)] == [
        "····",
        "░···",
        "██··",
        "███▓",
        "████",
    ]
    assert share_text(999_999, 1_000_000) == "99.9 %"
    assert (share_text(0, 5), share_text(5, 5), share_text(0, 0)) == ("0.0 %", "100.0 %", "100.0 %")


def test_a_table_that_does_not_fit_continues_below_aligned():
    titles, rows = ("name", "bytes", "file"), [("a" * 12, "1", "x"), ("b", "22,000", "y" * 9)]
    assert list(Screen(None).table(titles, rows, right=(1,))) == [
        "name           bytes  file",
        "aaaaaaaaaaaa       1  x",
        "b             22,000  yyyyyyyyy",
    ]
    assert list(Screen(22).table(titles, rows, right=(1,))) == [
        "name           bytes",
        "  file",
        "aaaaaaaaaaaa       1",
        "  x",
        "b             22,000",
        "  yyyyyyyyy",
    ]
    assert list(Screen(plain=True).table(titles, rows)) == [
        "aaaaaaaaaaaa: bytes 1, file x",
        "b: bytes 22,000, file yyyyyyyyy",
    ]


def test_wide_characters_take_two_columns():
    rows = [("重み", "1"), ("e\u0301", "2"), ("plain", "3")]
    assert [line[-1] for line in Screen(80).table(("n", "k"), rows)] == ["k", "1", "2", "3"]
    lines = list(Screen(80).table(("n", "k"), rows))
    assert lines[1:] == ["重み   1", "e\u0301      2", "plain  3"]


def test_the_map_says_all_and_nothing_only_where_it_is_so():
    assert piece_map([True] * 5, 80) == [1.0] * 5
    assert piece_map([False, True, True, True], 2) == [0.5, 1.0]
    assert SHADES[Screen().shade(0.999)] == "▓"
    assert SHADES[Screen().shade(0.001)] == "░"
    assert sum(piece_map([piece % 7 == 0 for piece in range(7000)], 10)) == pytest.approx(10 / 7)
