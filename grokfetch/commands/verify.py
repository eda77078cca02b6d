"""`grokfetch verify`: read everything back, and report what is proven and what is wrong."""

from __future__ import annotations

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.options import (
    NETWORK_NAMES,
    json_option,
    network_options,
    plain_option,
    state_option,
    timeout_option,
)
from grokfetch.errors import Damaged, StorageFailed
from grokfetch.events import Summary
from grokfetch.folder import verify as verification
from grokfetch.folder.journal import Command, Found, checked, note_more
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest
from grokfetch.output.reporting import ended, lines, reporter
from grokfetch.units import count_text, seconds_text

if TYPE_CHECKING:
    from grokfetch.fetch.wanted import Network


@click.command(
    cls=Explained,
    examples=(
        "grokfetch verify /data/grok-1 --repair",
        "grokfetch verify grok-1-Q8_0.gguf --against /data/grok-1",
    ),
    groups={
        "What to do": ("against", "repair"),
        "Peers and mirrors for --repair": NETWORK_NAMES,
        "Rates and timeout": ("up", "down", "timeout"),
        "Output and state": ("json", "plain", "state"),
    },
)
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--against",
    metavar="MANIFEST",
    type=click.Path(exists=True, path_type=Path),
    help="If DIR is a GGUF: the manifest of the shards, their torrent, or a folder that has "
    "these; by default Grok-1's manifest.",
)
@click.option("--repair", is_flag=True, help="Fetch again what is bad, from peers and mirrors.")
@timeout_option
@partial(network_options, only_with="repair")
@plain_option
@state_option
@json_option
def verify(
    folder: Path,
    *,
    against: Path | None,
    repair: bool,
    timeout: float,
    network: Network | None,
    state: Path | None,
) -> None:
    """Read back every byte of DIR and compare it with the torrent or the manifest.

    Prints a line for each finding. The exit code is 0 only if every byte is proven and every tensor
    is as the manifest says. Files that the manifest does not name are listed and do not matter.

    DIR may be a GGUF of type q8_0 that export wrote. Each shard is rebuilt from it in memory, and
    must match its sha256 in the manifest of the shards, or the piece hashes of their torrent.
    """
    if not folder.is_dir():
        if repair:
            raise click.UsageError("--repair works on a folder, not on a file")
        from grokfetch.commands.verify_gguf import verify_gguf

        verify_gguf(folder, against)
        return
    if against is not None:
        raise click.UsageError("--against is only for a GGUF, and DIR is a folder")
    store = Store(folder, state)
    start = time.perf_counter()
    if network is not None:
        _repair(store, network, start, timeout)
        return
    summary = check_bytes(store)
    faults = check_tensors(store) if summary.proven else []
    wrong = sum(fault.kind == "wrong" for fault in faults)
    manifest = store.manifest()
    seconds = time.perf_counter() - start
    ended(
        f"{summary.proven:,} of {summary.total:,} bytes{_of(store)} proven"
        f"{_by_what(summary, manifest)} in {seconds_text(seconds)}",
        seconds,
        **dataclasses.asdict(summary),
        proven=summary.proven,
        wrong=wrong,
    )
    if not summary.recorded:
        click.echo(
            f"note: nothing is recorded: {store.state} is not writable, or another process is "
            "reading it",
            err=True,
        )
    if faults or not summary.complete:
        raise Damaged(
            f"findings: {summary.failures + len(faults)}, "
            f"bytes not proven: {summary.total - summary.proven:,}",
            path=folder,
            hint=_hint(folder, manifest)
            if wrong or summary.failures > summary.unreadable
            else "an unreadable file need not be wrong: check the disk and how it is mounted, then "
            "run the same command again",
        )


def _repair(store: Store, network: Network, start: float, timeout_s: float) -> None:
    """Do the same as `grokfetch fetch DIR --repair`, then check the tensors."""
    from grokfetch.commands.fetch import bring
    from grokfetch.fetch.wanted import begun_in

    begun = begun_in(store)
    outcome = bring(
        store, begun.pieces(store, network), begun.manifest, timeout_s=timeout_s, repair=True
    )
    faults = check_tensors(store, "fetch")
    seconds = time.perf_counter() - start
    ended(
        f"{outcome.total:,} of {outcome.total:,} bytes{_of(store)} proven, "
        f"{count_text(outcome.fetched, 'piece')} fetched again, in {seconds_text(seconds)}",
        seconds,
        **dataclasses.asdict(outcome),
        wrong=sum(fault.kind == "wrong" for fault in faults),
    )
    if faults:
        raise Damaged(
            f"findings: {len(faults)}",
            path=store.root,
            hint="the files match the torrent: is the manifest of another model?",
        )


def _of(store: Store) -> str:
    """The part of the checkpoint that is asked for, in words; empty if it is all."""
    selection = store.selection()
    return "" if selection is None else f" of {selection}"


def check_bytes(store: Store) -> Summary:
    """Read back a checkpoint with a progress bar, print the findings, return the summary."""
    with reporter("verify", findings_to_stdout=True) as sink:
        for event in checked(store, "verify", verification.verify(store)):
            sink.take(event)
            if isinstance(event, Summary):
                summary = event
        for warning in store.warnings:
            sink.say(f"warning: {warning}")
    return summary


def check_tensors(store: Store, command: Command = "verify") -> list[Found]:
    """Compare the headers of all shards with the manifest; print and return what differs.

    A shard that cannot be read is "unreadable" rather than "wrong".

    Args:
        store: the checkpoint folder.
        command: the command to whose findings these are added.
    """
    if store.manifest().model is None:
        return []  # The loader would say the same; this saves its import.

    from loader.weights.binding import faults

    damaged = []
    machine = lines()
    for fault in faults(store):
        kind = "unreadable" if isinstance(fault, StorageFailed) else "wrong"
        if machine is None:
            click.echo(f"{kind} {fault}")
        else:
            fields = {"kind": kind, "path": fault.path, "piece": None, "tensor": None}
            machine.put({"event": "finding", **fields, "detail": fault.what})
        damaged.append(Found(kind, fault.path or "", None, None, fault.what))
    note_more(store, command, damaged)
    return damaged


def _by_what(summary: Summary, manifest: Manifest) -> str:
    ways = []
    if summary.by_pieces:
        ways.append(f"by the piece hashes of {summary.info_hash}")
    if summary.by_sha256:
        ways.append(
            "by the manifest's sha256"
            if manifest.measured is None
            else f"by the manifest's sha256 (measured on {manifest.measured} from files on disk, "
            "so it only proves: unchanged since)"
        )
    return "".join(f", {way}" for way in ways)


def _hint(folder: Path, manifest: Manifest) -> str:
    if manifest.info_hash is not None:
        return f"to fetch again what is wrong: grokfetch verify {folder} --repair"
    if manifest.measured is not None:
        return f"download these files again; if the change is wanted: grokfetch manifest {folder}"
    return "download these files again"
