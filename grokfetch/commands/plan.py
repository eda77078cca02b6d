"""`grokfetch plan`: what a fetch and a run need, and whether this machine has it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from grokfetch.commands.elsewhere import show_elsewhere
from grokfetch.commands.help import Explained
from grokfetch.commands.machine import Machine, Share, mapped, shares, this_machine
from grokfetch.commands.options import (
    manifest_option,
    part_options,
    plain_option,
    state_option,
)
from grokfetch.commands.value_types import Devices
from grokfetch.fetch.preflight import (
    Check,
    Need,
    Place,
    asked_bytes,
    checks,
    need,
    probe,
    refuse,
)
from grokfetch.fetch.wanted import describe, read_manifest
from grokfetch.folder.store import Store
from grokfetch.folder.survey import survey
from grokfetch.manifest.schema import Manifest, bind
from grokfetch.manifest.selection import Request, extended, spans
from grokfetch.manifest.shipped import grok_1
from grokfetch.output.terminal import Screen, screen
from grokfetch.units import bytes_text, count_text, seconds_text
from loader.weights.accelerators import Slice

SCHEMA = 1
RATES = (10, 100, 1000)
"""Megabytes per second; the same figures in megabits take eight times as long."""

LIMITLESS = 2**62
"""A limit of this many bytes or more counts as no limit."""


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """The part of a checkpoint that is asked for, in words, and its bytes."""

    what: str
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """Everything that is printed; `part` is None if everything is asked for."""

    manifest: Manifest
    part: Part | None
    need: Need
    place: Place
    checks: tuple[Check, ...]
    machine: Machine
    shares: tuple[Share, ...]


@click.command(
    cls=Explained,
    examples=(
        "grokfetch plan --to /data/grok-1",
        "grokfetch plan my-model.torrent --to /data/my-model --layers 0-3",
    ),
)
@click.argument("source", required=False)
@click.option(
    "--to",
    "folder",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Folder to download into; by default SOURCE if that is a DIR, or the current folder.",
)
@manifest_option
@part_options
@click.option(
    "--on",
    "slices",
    multiple=True,
    type=Devices(),
    help="Check instead whether these devices, which need not be here, can run the model: h100x8 "
    "is eight H100s, v5p-8 a slice of TPUs by Google's name. May be repeated.",
)
@click.option(
    "--compile",
    "by_compiler",
    is_flag=True,
    help="With --on: ask the compiler for the devices; it comes with the extras `cuda` and `tpu`.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
@plain_option
@state_option
def plan(
    source: str | None,
    folder: Path | None,
    manifest_file: Path | None,
    *,
    part: Request | None,
    slices: tuple[Slice, ...],
    by_compiler: bool,
    as_json: bool,
    state: Path | None,
) -> None:
    """Check whether a fetch to DIR can work, how long it takes, and what can run the model.

    SOURCE and the options that select a part are as for fetch; by default SOURCE is what DIR was
    started with, or Grok-1. Files that are already in DIR count. The exit code is 0 if the fetch
    can work here or, with --on, if the model fits.
    """
    if by_compiler and not slices:
        raise click.UsageError("--compile requires --on")
    if folder is None:
        named = source is not None and Path(source).is_dir()
        folder = Path(source or "") if named else Path()
    store = Store(folder, state)
    manifest = _planned(source, manifest_file, state, store)
    if slices:
        show_elsewhere(manifest, slices, by_compiler=by_compiler, as_json=as_json)
        return
    planned = make(manifest, part, store)
    if as_json:
        click.echo(json.dumps(as_fields(planned)))
    else:
        for line in lines(planned, screen()):
            click.echo(line)
    refuse(planned.checks, folder)


def make(manifest: Manifest, part: Request | None, store: Store) -> Plan:
    """Look at the folder and the machine.

    Args:
        manifest: what is to be fetched.
        part: the part of it, in addition to what was asked for before; None for nothing more.
        store: where the payload is to go.

    Raises:
        SelectionInvalid: the part names something that the manifest does not contain.
    """
    folder, begun = store.root, store.manifest_or_none()
    selection = extended(store.selection(), part, everything=begun is not None)
    asked = None if selection is None else spans(manifest, selection)
    files = asked_bytes(manifest, asked)
    whole = set()
    if begun is not None:
        # A proven file need not be written, so it does not matter whether it may be.
        whole = {path for path, state in survey(store).files.items() if state == "proven"}
    needed = need(folder, [(path, size) for path, size in files if path not in whole])
    place = probe(folder, needed.longest)
    machine = this_machine()
    chosen = None if selection is None else Part(str(selection), sum(size for _, size in files))
    of_devices = tuple(shares(manifest, machine))
    return Plan(manifest, chosen, needed, place, checks(needed, place), machine, of_devices)


def _planned(
    source: str | None, manifest_file: Path | None, state: Path | None, store: Store
) -> Manifest:
    """The manifest to plan for: from SOURCE, or what the folder was started with, or Grok-1.

    Raises:
        GrokfetchError: as `describe`.
        Contradiction: the folder contains something else.
    """
    begun = store.manifest_or_none()
    manifest = None if manifest_file is None else read_manifest(manifest_file)
    if source is not None:
        manifest = describe(source, manifest, state)
    if manifest is None or begun is None:
        return manifest or begun or grok_1()
    return bind(manifest, [(file.path, file.size) for file in begun.files])


# --- what is printed -----------------------------------------------------------------------------


def as_fields(made: Plan) -> dict[str, Any]:
    """The JSON object that `--json` prints."""
    manifest, place = made.manifest, made.place
    in_files = mapped(made.shares, made.machine, len(made.manifest.tensors))
    return {
        "schema": SCHEMA,
        "name": manifest.name,
        "files": len(manifest.files),
        "bytes": manifest.size,
        "asked": None if made.part is None else dataclasses.asdict(made.part),
        "missing": made.need.bytes,
        "folder": str(place.folder),
        "file_system": place.file_system,
        "sparse_files": place.sparse,
        "possible": all(check.ok for check in made.checks),
        "checks": [
            {
                "name": check.name,
                "ok": check.ok,
                "needed": check.needed,
                "there": None if check.there is None else _limit(check.there),
                "what": None if check.ok else check.what,
                "hint": None if check.ok else check.hint,
            }
            for check in made.checks
        ],
        "seconds": {f"{rate} MB/s": made.need.bytes / rate / 1e6 for rate in RATES}
        | {f"{rate} Mbit/s": made.need.bytes * 8 / rate / 1e6 for rate in RATES},
        "machine": dataclasses.asdict(made.machine)
        | {"open_files": _limit(made.machine.open_files)},
        "modes": {
            "mapped": None if in_files is None else dataclasses.asdict(in_files),
            "sharded": [dataclasses.asdict(share) for share in made.shares],
        },
    }


def _limit(value: int) -> int | None:
    return None if value >= LIMITLESS else value


def lines(made: Plan, view: Screen) -> Iterator[str]:
    """Tables that fit the screen."""
    manifest, missing = made.manifest, made.need.bytes
    place = made.place
    yield from view.wrapped(
        f"{manifest.name}: {len(manifest.files)} files, {bytes_text(manifest.size)}"
    )
    if made.part is not None:
        yield from view.wrapped(f"of it {made.part.what}: {bytes_text(made.part.bytes)}")
    yield from view.wrapped(
        f"to {place.folder} ({place.file_system}), {bytes_text(missing)} still missing"
    )
    yield ""
    holes = "yes" if place.sparse else "no, each file takes its full size from the start"
    checks = [*map(_check_row, made.checks), ("sparse files", "", "", holes)]
    yield from view.table(("to fetch it", "needed", "there", ""), checks, right=(1, 2))
    yield ""
    yield from _durations(missing, view)
    if made.shares:
        yield ""
        in_files = mapped(made.shares, made.machine, len(made.manifest.tensors))
        rows = [] if in_files is None else [_mapped_row(in_files)]
        rows += map(_share_row, made.shares)
        titles = (
            "to run it, on",
            "weights each",
            "KV cache each",
            "mesh",
            "",
            "because" if view.plain else "",
        )
        yield from view.table(titles, rows, right=(1, 2))


def _check_row(check: Check) -> tuple[str, str, str, str]:
    # Bytes are scaled for people, counts are not; without a limit there is no figure.
    show = bytes_text if check.name in {"free disk", "longest file"} else "{:,}".format
    needed = "" if check.needed is None else show(check.needed)
    limitless = check.there is None or check.there >= LIMITLESS
    available = (
        ("" if check.needed is None else "no limit") if limitless else show(check.there or 0)
    )
    return check.name, needed, available, "yes" if check.ok else "NO"


def _durations(missing: int, view: Screen) -> Iterator[str]:
    """How long the fetch takes at some rates."""
    rows = [
        (unit, *(seconds_text(missing * factor / rate / 1e6) for rate in RATES))
        for unit, factor in (("MB/s", 1), ("Mbit/s", 8))
    ]
    if view.plain:
        for unit, *times in rows:
            for rate, duration in zip(RATES, times, strict=True):
                yield f"at {rate:,} {unit}: {duration}"
        return
    titles = ("at a rate of", *(f"{rate:,}" for rate in RATES))
    yield from view.table(titles, rows, right=range(1, len(titles)))


def _mapped_row(share: Share) -> tuple[str, ...]:
    verdict = "yes" if share.fits else "NO"
    return "CPU, mapped", "in files", bytes_text(share.cache), "", verdict, share.why


def _share_row(share: Share) -> tuple[str, ...]:
    devices = count_text(share.devices, "device")
    if not share.mesh:
        return devices, "", "", "", "NO", "no mesh divides the model"
    word = {True: "yes", False: "NO", None: "?"}[share.fits]
    figures = bytes_text(share.weights), bytes_text(share.cache)
    return devices, *figures, share.mesh, word, share.why
