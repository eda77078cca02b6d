"""`report`: one page that loads nothing, whose numbers are those of `status --json`."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.damage import forget
from support.fake_swarm import FakeSwarm
from support.program import HEAVY, grokfetch, imported_by
from support.torrents import content, manifest_of, v1_torrent

from grokfetch.fetch import fetch
from grokfetch.folder import journal
from grokfetch.folder.history import Sample
from grokfetch.folder.journal import Found, Run, add_run, checked, note_more
from grokfetch.folder.overview import overview
from grokfetch.folder.store import Store
from grokfetch.folder.verify import verify
from grokfetch.manifest.schema import ManifestTensor
from grokfetch.output.report import charts
from grokfetch.output.report.page import render
from loader.devices.meter import Meter

PIECE = 32768
EVIL = "<script>alert(1)</script>\"'&\u202e"
FILES = {
    **{f"t{layer}": content(3 * PIECE, layer) for layer in range(3)},
    EVIL.replace("/", "\u2215"): content(PIECE),
}
TORRENT = v1_torrent(FILES, PIECE, name="<img src=x onerror=alert(2)>")
RUN = Run(
    1.8e9, "mapped", "CPU", 1, 5_000, 0.5, 3, 16, 2.5, 4.25, 10**8, 7_000, ((3, 0, 1), (2, 2, 0))
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


class Cell(str):
    """The text of a cell that has ended."""

    __slots__ = ()


class Page(HTMLParser):
    """What a page holds: `data` by id, rows of cells by the class of the row, tags, the text."""

    def __init__(self, text):
        super().__init__()
        self.data, self.rows, self.tags, self.attributes, self.text = {}, {}, Counter(), [], ""
        self._row = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        named = dict(attrs)
        self.tags[tag] += 1
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag == "tr":
            self._row = self.rows.setdefault(named.get("class"), [])
            self._row.append([])
        elif tag in {"td", "th"} and self._row:
            self._row[-1].append("")
        elif tag == "data":
            if "id" in named:
                self.data[named["id"]] = int(named["value"])
            elif self._row:
                self._row[-1][-1] = int(named["value"])

    def handle_endtag(self, tag):
        if tag == "tr":
            self._row = None
        elif tag in {"td", "th"} and self._row and isinstance(self._row[-1][-1], str):
            # Closed: what follows is white space between cells.
            self._row[-1][-1] = Cell(self._row[-1][-1])

    def handle_data(self, text):
        self.text += text
        if self._row and self._row[-1] and type(self._row[-1][-1]) is str:
            self._row[-1][-1] += text


def check_numbers(text, told):
    """Check that all numbers that both show are equal."""
    page = Page(text)
    assert page.data["bytes-total"] == told["bytes"]["total"]
    assert page.data["bytes-proven"] == told["bytes"]["proven"]
    assert page.data["by-pieces"] == told["bytes"]["by_pieces"]
    assert page.data["pieces-total"] == told["pieces"]["total"]
    assert page.data["pieces-proven"] == told["pieces"]["proven"]
    assert [list(map(int, row[:2])) for row in page.rows["missing"]] == told["pieces"]["missing"]
    assert {row[0]: row[1] for row in page.rows["not-proven"]} == told["not_proven"]
    assert [(row[0], *row[2:]) for row in page.rows["layer"]] == [
        (layer["name"], layer["proven"], layer["total"]) for layer in told["layers"]
    ]
    assert [(row[0], row[1], row[2]) for row in page.rows["sender"]] == [
        (sender["name"], sender["kind"], sender["bytes"]) for sender in told["sent"]
    ]
    assert page.data["received"] == told["history"][-1]["received"]
    for command, check in told["checks"].items():
        assert page.data[f"findings-{command}"] == check["count"]
    assert [(row[0], row[2], row[3]) for row in page.rows["finding"]] == [
        (found["kind"], found["path"], found["detail"])
        for _, check in sorted(told["checks"].items())
        for found in check["findings"]
    ]
    assert [int(row[6]) for row in page.rows["run"]] == [
        run["tokens"] for run in reversed(told["runs"])
    ]
    chosen = [[int(count) for count in row[1:]] for row in page.rows["experts"]]
    assert chosen == told["runs"][-1]["experts"]
    assert page.data["choices"] == sum(map(sum, chosen))


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with something of every kind to report, including names from strangers."""
    root = tmp_path_factory.mktemp("filled")
    store = Store(root)
    made = manifest_of(FILES, TORRENT.info_hash, name="<img src=x onerror=alert(2)>")
    names = [f"transformer/decoder_layer_{n}/moe/w" for n in range(3)]
    files = [file.path for file in made.files]
    tensors = tuple(
        ManifestTensor(name, path, "int8", (3 * PIECE,), 0)
        for name, path in zip(names, files, strict=False)
    )
    made = dataclasses.replace(made, tensors=tensors)
    list(fetch(store, FakeSwarm(TORRENT, dict(FILES)), manifest=made))
    with (root / files[0]).open("r+b") as file:
        file.write(b"x")
    list(checked(Store(root), "verify", verify(Store(root))))
    note_more(Store(root), "verify", [Found("wrong", EVIL, None, None, "no <b>tensor</b>")])
    forget(root, 4, 5, 6, 9)
    add_run(Store(root), RUN)
    return root


def page_of(folder, *arguments):
    return grokfetch("report", folder, "-o", "-", *arguments)


def told_of(folder):
    return json.loads(grokfetch("status", folder, "--json"))


def test_the_numbers_on_the_page_are_those_that_status_tells(filled):
    told = told_of(filled)
    assert told["pieces"]["missing"] == [[0, 0], [4, 6], [9, 9]]
    assert [found["kind"] for found in told["checks"]["verify"]["findings"]] == ["corrupt", "wrong"]
    check_numbers(page_of(filled), told)


def test_names_from_strangers_are_text_and_nothing_else(filled):
    page = Page(page_of(filled))
    assert not {"script", "img", "b", "iframe", "object", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "<img src=x onerror=alert(2)>" in page.text
    assert EVIL.replace("/", "\u2215") in page.text


def test_the_page_asks_nobody_for_anything(filled):
    text = page_of(filled)
    page = Page(text)
    addresses = [
        value
        for _, name, value in page.attributes
        if name in {"src", "href", "srcset", "action", "data", "xlink:href", "ping"}
    ]
    assert addresses == ["data:,"]
    assert "url(" not in text
    assert "@import" not in text
    (policy,) = (
        value for _, name, value in page.attributes if name == "content" and "src" in value
    )
    assert policy.startswith("default-src 'none'; ")
    assert "prefers-color-scheme: dark" in text


def test_pictures_have_names_and_tables_beside_them(filled):
    page = Page(page_of(filled))
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "role")]
    named = [value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-label")]
    hidden = [
        value for tag, name, value in page.attributes if (tag, name) == ("svg", "aria-hidden")
    ]
    assert len(pictures) == len(named) == 5
    assert len(pictures) + len(hidden) == page.tags["svg"]
    assert page.tags["details"] == 5


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")
def test_a_browser_opens_the_page_without_a_complaint(filled, tmp_path):
    target = tmp_path / "report.html"
    target.write_text(page_of(filled))
    dom, complaints = opened(target, tmp_path / "one")
    assert not complaints
    check_numbers(dom, told_of(filled))
    # The same check finds errors in a page: here its own policy forbids the script.
    target.write_text(target.read_text().replace("</body>", "<script>1</script></body>"))
    assert "Content Security Policy" in opened(target, tmp_path / "two")[1][0]


def opened(page, profile):
    """The page as the browser has understood it, and the messages in its console."""
    options = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync "
        "--enable-logging=stderr --dump-dom"
    )
    done = subprocess.run(
        [CHROMIUM, *options.split(), f"--user-data-dir={profile}", page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout, re.findall(r".*CONSOLE.*", done.stderr)


def test_a_folder_about_which_little_is_known_has_a_page_that_says_so(tmp_path):
    list(fetch(Store(tmp_path), FakeSwarm(TORRENT, dict(FILES))))
    for name in ("progress.json", "findings.json"):
        (tmp_path / ".grokfetch" / name).unlink()
    text = Page(page_of(tmp_path)).text
    for words in (
        "No fetch into",
        "Nobody has sent",
        "No verification and",
        "No run is",
        "No run on",
    ):
        assert words in text


def test_a_file_name_that_is_no_text_is_shown_by_its_bytes(filled):
    seen = overview(Store(filled))
    odd = dataclasses.replace(seen.survey, files={PurePosixPath(os.fsdecode(b"a\xff")): "absent"})
    page = render(dataclasses.replace(seen, survey=odd), now=0.0)
    assert "a\\udcff" in page.encode("utf-8", "backslashreplace").decode()


def test_the_page_is_written_whole_or_not_at_all(filled, tmp_path):
    target = tmp_path / "report.html"
    assert grokfetch("report", filled, "-o", target).startswith(f"{target}: ")
    assert target.read_text().endswith("</html>\n")
    grokfetch("report", filled, "-o", tmp_path / "no/where", code=16)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_report_needs_neither_jax_nor_numpy(filled):
    call = f"main(['report', {str(filled)!r}, '-o', '/dev/null'])"
    code = f"from grokfetch.cli import main\ntry: {call}\nexcept SystemExit: pass"
    assert not imported_by(code.replace("/dev/null", "-") + "\nprint()") & HEAVY


# --- charts --------------------------------------------------------------------------------------


@given(st.lists(st.booleans(), max_size=3000))
def test_the_map_shows_every_piece_once(pieces):
    cells = charts.piece_cells(pieces)
    assert [n for cell in cells for n in range(cell.first, cell.last + 1)] == [*range(len(pieces))]
    assert sum(cell.proven for cell in cells) == sum(pieces)
    assert len({(cell.column, cell.row) for cell in cells}) == len(cells)
    for cell in cells:
        assert (1 - 2 * cell.inset) ** 2 == pytest.approx(cell.proven / cell.pieces)


@given(st.floats(1e-3, 1e15))
def test_an_axis_ends_at_or_little_above_its_largest_value(value):
    top = charts.ceiling(value)
    assert value <= top * (1 + 1e-6)
    assert top <= 2 * value * (1 + 1e-6)


def test_steps_and_curves_lie_in_their_box():
    assert charts.steps([1.0, 0.5], 2.0) == "M0 100V50H500V75H1000V100Z"
    assert charts.curve([(0, 0), (0.5, 0.25), (1, 1)]) == "M0 100L500 75L1000 0"
    assert charts.steps([], 1.0) == ""


def test_a_pause_is_time_on_the_wall_that_nobody_worked():
    def sample(when, worked):
        return Sample(when, worked, 0, 0, 0, 0.0, "downloading")

    samples = [sample(0, 0), sample(10, 10), sample(10_010, 10), sample(10_020, 20)]
    assert list(charts.pauses(samples)) == [charts.Pause("500", 10_000)]


def test_the_heat_of_a_cell_is_its_share_of_the_layer():
    cells = charts.heat(((3, 0, 1), (2, 2, 0), (0, 0, 0)))
    assert [(cell.count, cell.of) for cell in cells[:3]] == [(3, 4), (0, 4), (1, 4)]
    assert [round(cell.level, 3) for cell in cells] == [1, 0, 0.333, 0.667, 0.667, 0, 0, 0, 0]


# --- the journal ---------------------------------------------------------------------------------


def test_the_journal_keeps_the_last_runs_and_gives_them_back(filled):
    store = Store(filled)
    assert journal.runs(store) == (RUN,)


def test_of_many_runs_and_findings_the_files_stay_small(tmp_path):
    store = Store(tmp_path)
    store.state.mkdir()
    unknown = dataclasses.replace(RUN, tokens_per_s=None, peak_memory=None, read=None, experts=None)
    for number in range(journal.RUNS + 5):
        add_run(store, dataclasses.replace(unknown, tokens=number))
    assert [run.tokens for run in journal.runs(store)] == [*range(5, journal.RUNS + 5)]
    many = [Found("wrong", "x", number, None, "") for number in range(journal.FINDINGS + 7)]
    list(checked(store, "verify", (event for event in ["an event"])))
    note_more(store, "verify", many)
    (check,) = journal.checks(store).values()
    assert (check.count, len(check.findings)) == (len(many), journal.FINDINGS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda _text: b"",
        lambda text: text[: len(text) // 2],
        lambda text: text.replace(b'"schema": 1', b'"schema": 2'),
        lambda text: re.sub(rb"\d+", b"-1", text.replace(b'"schema": 1', b'"schema": true')),
        lambda text: text.replace(b"{", b"[").replace(b"}", b"]").replace(b":", b","),
        lambda text: re.sub(rb'"time": [\d.e+]+', b'"time": 1e999', text),
    ],
)
def test_a_damaged_journal_is_ignored(filled, tmp_path, damage):
    root = shutil.copytree(filled, tmp_path / "copy")
    for name in (journal.RUNS_FILE, journal.CHECKS_FILE):
        path = root / ".grokfetch" / name
        path.write_bytes(damage(path.read_bytes()))
    told = told_of(root)
    assert (told["runs"], told["checks"]) == ([], {})
    assert "No run is on record" in page_of(root)


def test_a_journal_that_cannot_be_written_costs_nothing_but_itself(tmp_path):
    tmp_path.joinpath("file").touch()
    store = Store(tmp_path, tmp_path / "file" / "state")
    add_run(store, RUN)
    assert list(checked(store, "verify", (event for event in [1, 2]))) == [1, 2]
    assert journal.runs(store) == ()


def test_a_check_that_could_not_begin_leaves_the_last_one(filled, tmp_path):
    root = shutil.copytree(filled, tmp_path / "copy")
    before = journal.checks(Store(root))

    def refused():
        raise RuntimeError
        yield

    with pytest.raises(RuntimeError):
        list(checked(Store(root), "verify", refused()))
    assert journal.checks(Store(root)) == before


def test_the_meter_sees_memory_that_belongs_to_nobody_else():
    with Meter() as meter:
        before = meter.peak_memory
        if before is None:
            pytest.skip("this system does not tell anonymous memory")
        block = bytearray(b"x") * (64 << 20)
        assert meter.peak_memory - before > 60 << 20
        del block
        assert meter.peak_memory - before > 60 << 20
