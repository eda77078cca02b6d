"""The bar fits every width: it shows all facts, and truncates nothing."""

from __future__ import annotations

import pytest

from grokfetch.output.gauge import Gauge, Speed
from grokfetch.output.terminal import ASCII_SHADES, Screen

WHOLE = 318_239_886_140
LATE = Gauge("fetch", 2 * WHOLE // 3, WHOLE, 9_314_000, 12, 1)
ALONE = Gauge("fetch", WHOLE // 4, WHOLE, 123_456, 1)
WORST = Gauge("downloading", WHOLE - 1, WHOLE, 1000, 123, 12)


@pytest.mark.parametrize("gauge", [LATE, ALONE, WORST], ids=["late", "alone", "worst"])
@pytest.mark.parametrize("width", [38, 40, 60, 79, 80, 120, 200])
def test_the_line_fits_and_has_every_fact(gauge, width):
    line = gauge.line(Screen(width))
    assert len(line) <= width
    assert "\u2588" in line
    assert f" {int(100 * gauge.done / gauge.total)}" in f" {line}"
    assert "B/s" in line
    assert f"{gauge.peers} peer" in line or f"{gauge.peers}p" in line
    assert not gauge.mirrors or f"{gauge.mirrors} mirror" in line or f"{gauge.mirrors}m" in line


def test_at_80_columns_the_words_are_whole():
    assert LATE.line(Screen(79)) == (
        "fetch  \u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2588\u2593"
        "\u00b7\u00b7\u00b7\u00b7\u00b7\u00b7  66.6 %  9.3 MB/s  3 h 9 min left  12 peers, 1 mirror"
    )


def test_at_40_columns_it_is_shorter():
    assert LATE.line(Screen(39, ASCII_SHADES)) == "#########:.... 66 % 9.3 MB/s 3 h 12p 1m"
    assert ALONE.line(Screen(39, ASCII_SHADES)) == "#:... 25.0 % 123.5 kB/s 22 d 9 h 1 peer"


def test_without_a_total_only_who_is_there_is_said():
    assert Gauge("metadata", 0, 0, None, 1).line(Screen(80)) == "metadata  1 peer"
    assert Gauge("metadata", 0, 0, None, 0).sentence() == "metadata waiting, 0 peers"


def test_in_words_it_is_the_same():
    assert LATE.sentence() == (
        "fetch 66.6 %, 212.2 GB of 318.2 GB, 9.3 MB/s, 3 h 9 min left, 12 peers, 1 mirror"
    )
    assert Gauge("verify", 5, 10, 1.0).sentence() == "verify 50.0 %, 5 B of 10 B, 1 B/s, 5 s left"


def test_what_is_waited_for_is_said_where_there_is_room():
    gauge = Gauge("fetch", 5, 10, 1.0, 2, waiting="layer 3 moe/linear and 2 more")
    assert "waiting for layer 3 moe/linear and 2 more" in gauge.line(Screen(120))
    assert gauge.sentence().endswith("2 peers, waiting for layer 3 moe/linear and 2 more")
    narrow = gauge.line(Screen(40))
    assert narrow == Gauge("fetch", 5, 10, 1.0, 2).line(Screen(40))


def test_what_stands_still_is_foretold_nothing():
    assert Gauge("fetch", 5, 10, 0.0, 2).sentence() == "fetch 50.0 %, 5 B of 10 B, 0 B/s, 2 peers"
    assert "left" not in Gauge("fetch", 10, 10, 5.0, 2).sentence()
    assert "left" not in Gauge("fetch", 1, WHOLE, 1.0, 2).sentence()


def test_a_rate_is_known_after_a_second_and_follows_the_last_ones():
    speed = Speed()
    assert speed.of(0, 0.0) is None
    assert speed.of(50, 0.5) is None
    assert speed.of(100, 1.0) == 100
    rates = [speed.of(100 + 200 * second, 1.0 + second) for second in range(1, 31)]
    assert rates == sorted(rates)
    assert rates[0] < 130
    assert rates[-1] == pytest.approx(200, rel=0.02)


def test_a_step_that_begins_anew_has_no_rate_yet():
    speed = Speed()
    speed.of(0, 0.0)
    assert speed.of(1000, 1.0) == 1000
    assert speed.of(10, 2.0) is None
