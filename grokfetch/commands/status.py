"""`grokfetch status`: how far a folder is, while a fetch runs or when none does."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from grokfetch.commands.state_option import state_option
from grokfetch.errors import StateMissing
from grokfetch.progress import bytes_text, seconds_text

if TYPE_CHECKING:
    from grokfetch.history import Sample
    from grokfetch.storage import Owner
    from grokfetch.survey import Group, Survey

SCHEMA = 1
MAP_ROWS = 6
SHADES = "·░▒▓█"
PLAIN_SHADES = ".:-+#"
"""For terminals that know ASCII only. The first is nothing, the last is all; no colour is used."""


@click.command()
@click.argument(
    "folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path)
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
@state_option
def status(folder: Path, *, as_json: bool, state: Path | None) -> None:
    """Show what of DIR is proven and what is missing.

    Reads the record and the files' sizes and times, hashes nothing and takes no lock: it may run
    beside a fetch.
    """
    from grokfetch import history
    from grokfetch.storage import read_owner
    from grokfetch.store import Store
    from grokfetch.survey import survey

    store = Store(folder, state)
    owner = read_owner(store.state)
    if owner is not None and store.manifest_or_none() is None:
        raise StateMissing(
            f"{owner} is at work here and has not got the torrent's metadata yet",
            path=folder,
            hint="look again in a while",
        )
    found, samples = survey(store), history.read(store)
    for warning in store.warnings:
        click.echo(f"warning: {warning}", err=True)
    if as_json:
        click.echo(json.dumps(as_fields(folder, found, owner, samples)))
        return
    width = shutil.get_terminal_size().columns
    for line in lines(folder, found, owner, samples, width=width, now=time.time()):
        click.echo(line)


def as_fields(
    folder: Path, found: Survey, owner: Owner | None, samples: Sequence[Sample]
) -> dict[str, Any]:
    """The JSON object that `--json` prints; docs/events.md describes it."""
    return {
        "schema": SCHEMA,
        "folder": str(folder),
        "name": found.name,
        "info_hash": found.info_hash,
        "owner": None if owner is None else {"pid": owner.pid, "host": owner.host},
        "bytes": {
            "total": found.total,
            "proven": found.proven,
            "by_pieces": found.by_pieces,
            "by_sha256": found.by_sha256,
        },
        "pieces": {
            "total": len(found.pieces),
            "proven": sum(found.pieces),
            "missing": list(_runs(found.pieces)),
        },
        "asked": None if found.asked is None else dataclasses.asdict(found.asked),
        "files": Counter(found.files.values()),
        "not_proven": {str(p): state for p, state in found.files.items() if state != "proven"},
        "layers": [
            {"name": group.name, "proven": group.proven, "total": group.total}
            for group in found.groups
        ],
        "history": [
            {
                "time": sample.time,
                "proven": sample.proven,
                "peers": sample.peers,
                "rate": sample.rate,
                "phase": sample.phase,
            }
            for sample in samples
        ],
    }


def _runs(pieces: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """First and last piece of each run that is not proven."""
    first = None
    for piece, proven in enumerate(pieces):
        if not proven and first is None:
            first = piece
        elif proven and first is not None:
            yield first, piece - 1
            first = None
    if first is not None:
        yield first, len(pieces) - 1


def lines(
    folder: Path,
    found: Survey,
    owner: Owner | None,
    samples: Sequence[Sample],
    *,
    width: int,
    now: float,
) -> Iterator[str]:
    """What a person sees, no line longer than `width` but for names."""
    yield f"{folder}: {found.name}, {bytes_text(found.total)}"
    share = 100 * found.proven / found.total if found.total else 100.0
    yield f"proven   {_floor(share)} %, {found.proven:,} of {found.total:,} bytes{_by(found)}"
    if found.proven < found.total:
        yield f"missing  {bytes_text(found.total - found.proven)}{_missing_pieces(found)}"
    if found.asked is not None:
        asked = found.asked
        share = 100 * asked.proven / asked.total if asked.total else 100.0
        yield f"asked    {asked.what}"
        yield f"         {_floor(share)} % of {asked.total:,} bytes are proven"
    yield f"files    {_files(found)}"
    yield f"at work  {'nobody' if owner is None else owner}"
    if samples:
        yield from _history(samples, width, now)
    if found.pieces:
        yield ""
        yield from _map(found.pieces, width)
    if found.groups:
        yield ""
        yield from _layers(found.groups, width)


def _floor(share: float) -> str:
    """A percentage that says 100 only of all: 99.9 otherwise."""
    return f"{int(share * 10) / 10:.1f}"


def _by(found: Survey) -> str:
    ways = []
    if found.by_pieces:
        ways.append("piece hashes")
    if found.by_sha256:
        ways.append(
            "sha256"
            if found.measured is None
            else f"sha256 measured on {found.measured} (unchanged since)"
        )
    return f", by {' and '.join(ways)}" if ways else ""


def _missing_pieces(found: Survey) -> str:
    missing = len(found.pieces) - sum(found.pieces)
    return f", {missing:,} of {len(found.pieces):,} pieces" if found.pieces else ""


def _files(found: Survey) -> str:
    counts = Counter(found.files.values())
    changed = [str(path) for path, state in found.files.items() if state == "changed"]
    said = {"changed": f" since they were verified: {', '.join(changed[:3])}"}
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return ", ".join(
        f"{count} {state}{said.get(state, '')}{more if state == 'changed' else ''}"
        for state, count in sorted(counts.items())
    )


def _shades() -> str:
    try:
        SHADES.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_SHADES
    return SHADES


def _shade(share: float, shades: str) -> str:
    """The first only for nothing, the last only for all."""
    if share >= 1:
        return shades[-1]
    return shades[0] if share <= 0 else shades[1 + int(share * (len(shades) - 2))]


def _map(pieces: Sequence[bool], width: int) -> Iterator[str]:
    from grokfetch.survey import piece_map

    shades = _shades()
    shares = piece_map(pieces, width * MAP_ROWS)
    each = len(pieces) / len(shares)
    per_cell = "1 piece" if each == 1 else f"{each:.1f} pieces"
    yield f"each cell {per_cell}: {shades[0]} none proven, {shades[-1]} all"
    for start in range(0, len(shares), width):
        yield "".join(_shade(share, shades) for share in shares[start : start + width])


def _layers(groups: Sequence[Group], width: int) -> Iterator[str]:
    """Layers in columns, what lies outside them on lines of their own."""
    shares = [(g.name, 100 * g.proven / g.total if g.total else 100.0) for g in groups]
    cells = [f"{name:>8} {_floor(share):>5} %" for name, share in shares if name[:6] == "layer "]
    columns = max(1, (width + 2) // 18)
    for start in range(0, len(cells), columns):
        yield "  ".join(cells[start : start + columns])
    for name, share in shares:
        if name[:6] != "layer ":
            yield f"{name} {_floor(share)} %"


def _history(samples: Sequence[Sample], width: int, now: float) -> Iterator[str]:
    last = samples[-1]
    ago = seconds_text(max(0.0, now - last.time))
    peers = f"{last.peers} {'peer' if last.peers == 1 else 'peers'}"
    speed = "" if last.phase == "done" else f", {bytes_text(last.rate)}/s from {peers}"
    yield f"fetch    {last.phase} {ago} ago{speed}"
    top = max(sample.rate for sample in samples)
    if top > 0 and len(samples) > 1:
        shades = _shades()
        count = min(len(samples), max(1, width - 30))
        step = len(samples) / count
        bars = [samples[int(cell * step)].rate / top for cell in range(count)]
        row = "".join(_shade(share, shades) for share in bars)
        yield f"rate     {row} up to {bytes_text(top)}/s"
