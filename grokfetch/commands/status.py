"""`grokfetch status`: the progress of a folder, whether or not a fetch is running."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.options import folder_argument, plain_option, state_option
from grokfetch.folder.history import History, rates
from grokfetch.folder.journal import Check, Run
from grokfetch.folder.overview import Overview, as_fields, missing_runs, overview
from grokfetch.folder.store import Store
from grokfetch.folder.survey import Group, Survey, piece_map
from grokfetch.output.terminal import LABEL, Screen, screen
from grokfetch.units import ago_text, bytes_text, count_text, seconds_text, share_text, speed_text

MAP_ROWS = 6
GROUP_WIDTH = 25
"""Least columns of a layer's bar, including its name and figure."""

MOST_RUNS = 12
"""At most this many ranges of missing pieces are listed in plain text."""


@click.command(
    cls=Explained,
    examples=(
        "grokfetch status /data/grok-1",
        "grokfetch status /data/grok-1 --json",
    ),
)
@folder_argument
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")
@plain_option
@state_option
def status(folder: Path, *, as_json: bool, state: Path | None) -> None:
    """Show what is proven in DIR and what is missing.

    Reads the record and the sizes and times of the files. It hashes nothing and takes no lock, so
    it can run during a fetch.
    """
    store = Store(folder, state)
    seen = overview(store)
    for warning in store.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(as_fields(seen)))
        return
    for line in lines(seen, screen(), now=time.time()):
        click.echo(line)


def lines(seen: Overview, view: Screen, *, now: float) -> Iterator[str]:
    """The lines for a terminal, wrapped to its width."""
    survey = seen.survey
    yield from view.wrapped(f"{seen.folder}: {survey.name}, {bytes_text(survey.total)}")
    for label, text in _facts(seen, now):
        yield from view.fact(label, text)
    yield from _rates(seen.history, view)
    if survey.pieces:
        yield from _map(survey.pieces, view)
    if survey.groups:
        yield from _groups(survey.groups, view)


def _facts(seen: Overview, now: float) -> Iterator[tuple[str, str]]:
    """The facts that are shown as words: label and text."""
    survey = seen.survey
    share = share_text(survey.proven, survey.total)
    yield "proven", f"{share}, {survey.proven:,} of {survey.total:,} bytes{_by(survey)}"
    if survey.proven < survey.total:
        yield "missing", f"{bytes_text(survey.total - survey.proven)}{_missing_pieces(survey)}"
    if survey.asked is not None:
        asked = survey.asked
        share = share_text(asked.proven, asked.total)
        yield "asked", f"{asked.what}, {share} of {asked.total:,} bytes are proven"
    yield "files", _files(survey)
    yield "at work", _at_work(seen)
    if seen.owner is not None and seen.history.demanded:
        yield "demanded", _demanded(seen.history.demanded)
    if seen.history.samples:
        yield "fetch", _fetch(seen, now)
    if seen.history.sent:
        yield "sent", _senders(seen.history)
    for command, check in seen.checks.items():
        yield "found", f"by {command}, {ago_text(check.time, now)}: {_findings(check)}"
    if seen.runs:
        yield "run", _run(seen.runs[-1], now)


def _by(survey: Survey) -> str:
    ways = []
    if survey.by_pieces:
        ways.append("piece hashes")
    if survey.by_sha256:
        ways.append(
            "sha256"
            if survey.measured is None
            else f"sha256 measured on {survey.measured} (unchanged since)"
        )
    return f", by {' and '.join(ways)}" if ways else ""


def _missing_pieces(survey: Survey) -> str:
    missing = len(survey.pieces) - sum(survey.pieces)
    return f", {missing:,} of {len(survey.pieces):,} pieces" if survey.pieces else ""


def _files(survey: Survey) -> str:
    counts = Counter(survey.files.values())
    changed = [str(path) for path, state in survey.files.items() if state == "changed"]
    details = {"changed": f" since they were verified: {', '.join(changed[:3])}"}
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(
        f"{count} {state}{details.get(state, '')}{more if state == 'changed' else ''}"
        for state, count in sorted(counts.items())
    )


def _demanded(pieces: Collection[int]) -> str:
    there = [piece not in pieces for piece in range(max(pieces) + 1)]
    return f"readers are waiting for pieces {_runs(there)}"


def _runs(proven: Sequence[bool]) -> str:
    """The first ranges of pieces that are not proven."""
    runs = [f"{a}" if a == b else f"{a} to {b}" for a, b in missing_runs(proven)]
    more = f" and {len(runs) - MOST_RUNS:,} more ranges" if len(runs) > MOST_RUNS else ""
    return f"{', '.join(runs[:MOST_RUNS]) or 'none'}{more}"


def _at_work(seen: Overview) -> str:
    at_work = [] if seen.owner is None else [str(seen.owner)]
    if seen.seeder is not None:
        at_work.append(f"{seen.seeder}, which seeds")
    return "; ".join(at_work) or "nobody"


def _fetch(seen: Overview, now: float) -> str:
    last, ended = seen.history.samples[-1], seen.history.ended
    if ended is not None:
        why = f": {ended.why}" if ended.why else ""
        return f"{ended.how} {ago_text(ended.time, now)}{why}"
    if seen.owner is None and last.phase != "done":
        return f"{last.phase} {ago_text(last.time, now)}, then the process was killed"
    peers = count_text(last.peers, "peer")
    speed = "" if last.phase == "done" else f", {bytes_text(last.rate)}/s from {peers}"
    return f"{last.phase} {ago_text(last.time, now)}{speed}"


def _senders(history: History) -> str:
    shown = []
    for kind in ("peer", "mirror"):
        counts = [count for origin, count in history.sent.items() if origin.kind == kind]
        if counts:
            shown.append(f"{bytes_text(sum(counts))} by {count_text(len(counts), kind)}")
    return ", ".join(shown)


def _findings(check: Check) -> str:
    if not check.count:
        return "nothing wrong"
    kinds = Counter(finding.kind for finding in check.findings)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) + (
        f" of the first {len(check.findings)} of {check.count:,}"
        if check.count > len(check.findings)
        else ""
    )


def _run(run: Run, now: float) -> str:
    speed = "" if run.tokens_per_s is None else f", then {speed_text(run.tokens_per_s)}"
    return (
        f"{ago_text(run.time, now)}, {run.placement}: first token after "
        f"{seconds_text(run.first_token_s)}{speed}{_compiling(run)}"
    )


def _compiling(run: Run) -> str:
    if run.compile_s is None:
        return ", compiling included"
    return f", compiled in {seconds_text(run.compile_s)} before"


# --- pictures ------------------------------------------------------------------------------------


def _rates(history: History, view: Screen) -> Iterator[str]:
    """Bytes per second over the time of the fetch, of which each cell is an equal part."""
    rates_shown = rates(history.samples, max(10, view.columns - LABEL))
    if not rates_shown or not max(rates_shown):
        return
    yield from view.fact("rate", f"up to {bytes_text(max(rates_shown))}/s")
    if len(rates_shown) > 1 and not view.plain:
        yield " " * LABEL + view.painted(
            [view.shade(rate / max(rates_shown)) for rate in rates_shown]
        )


def _map(pieces: Sequence[bool], view: Screen) -> Iterator[str]:
    """Which pieces are proven, the same number in each cell; with --plain as words."""
    if view.plain:
        yield f"pieces missing: {_runs(pieces)}"
        return
    shares = piece_map(pieces, view.columns * MAP_ROWS)
    each = len(pieces) / len(shares)
    per_cell = "1 piece" if each == 1 else f"{each:.1f} pieces"
    yield ""
    yield from view.fact(
        "pieces", f"each cell {per_cell}: {view.shades[0]} none proven, {view.shades[-1]} all"
    )
    for start in range(0, len(shares), view.columns):
        cells = shares[start : start + view.columns]
        yield view.painted([view.shade(share) for share in cells])


def _groups(groups: Sequence[Group], view: Screen) -> Iterator[str]:
    """Layers in columns of bars, everything outside of layers on lines of its own."""
    if view.plain:
        for group in groups:
            share = share_text(group.proven, group.total)
            yield f"{group.name}: {share} proven, {group.proven:,} of {group.total:,} bytes"
        return
    yield ""
    layers = [group for group in groups if group.name[:6] == "layer "]
    columns = max(1, (view.columns + 2) // (GROUP_WIDTH + 2))
    width = (view.columns + 2) // columns - 2
    rows = -(-len(layers) // columns)
    for row in range(rows):
        yield "  ".join(_bar(group, width, view) for group in layers[row::rows]).rstrip()
    for group in groups:
        if group not in layers:
            yield f"{group.name} {share_text(group.proven, group.total)}"


def _bar(group: Group, width: int, view: Screen) -> str:
    share = group.proven / group.total if group.total else 1.0
    bar = view.bar(share, max(0, width - 17))
    return f"{group.name:<8} {bar} {share_text(group.proven, group.total):>7}"
