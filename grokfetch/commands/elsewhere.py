"""The output of `plan --on`: whether accelerators, which need not be here, can run a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import click

from grokfetch.errors import GrokfetchError, MeshInvalid, NoModel, OutOfReach
from grokfetch.manifest.schema import Manifest
from grokfetch.output.terminal import Screen, screen
from grokfetch.units import bytes_text
from loader.devices.arrangement import advice
from loader.weights.accelerators import Prospect, Slice, prospect
from loader.weights.capacity import shortage
from loader.weights.schema import GrokConfig

__all__ = ["show_elsewhere"]

SCHEMA = 1


@dataclasses.dataclass(frozen=True, slots=True)
class _Verdict:
    """A slice with the memory that the model needs on it, or why it cannot be divided so."""

    slice: Slice
    prospect: Prospect | None
    misfit: GrokfetchError | None = None


def show_elsewhere(
    manifest: Manifest, slices: Sequence[Slice], *, by_compiler: bool, as_json: bool
) -> None:
    """Print for each slice whether the model fits.

    Args:
        manifest: of the model.
        slices: the devices.
        by_compiler: whether to ask their compilers, instead of only computing from shapes.
        as_json: one object instead of a table.

    Raises:
        NoModel: the manifest describes files only.
        ManifestInvalid: the manifest's hyperparameters are not valid.
        MeshInvalid: this number of devices cannot share the model.
        OutOfReach: the model does not fit one of the slices, or a compiler is not installed.
    """
    if manifest.model is None:
        raise NoModel(f"{manifest.name} does not describe a model, only files")
    config = GrokConfig.from_mapping(manifest.model)
    verdicts = [_verdict(config, devices) for devices in slices]
    if by_compiler:
        verdicts = _confirmed(verdicts)
    if as_json:
        click.echo(json.dumps(_as_fields(manifest, verdicts)))
    else:
        for line in _lines(manifest, config, verdicts, screen()):
            click.echo(line)
    misfit = next((it.misfit for it in verdicts if it.misfit), None)
    if misfit is not None:
        raise misfit


def _verdict(config: GrokConfig, devices: Slice) -> _Verdict:
    try:
        return _judged(prospect(config, devices, config.sequence_len))
    except MeshInvalid as error:
        return _Verdict(devices, None, error)


def _judged(made: Prospect) -> _Verdict:
    if made.fits:
        return _Verdict(made.slice, made)
    short = shortage(made.use, made.memory)
    misfit = OutOfReach(
        f"{made.slice.name}: each device needs {bytes_text(made.need.total)} of memory"
        f" and has {bytes_text(made.memory.free)}",
        hint="" if short is None else advice(short, made.memory),
    )
    return _Verdict(made.slice, made, misfit)


def _confirmed(verdicts: Sequence[_Verdict]) -> list[_Verdict]:
    """The same verdicts from the compilers, where the devices can share the model."""
    from loader.devices.absent import prepare
    from loader.inference.ahead import confirmed

    prepare({it.slice.kind for it in verdicts})
    judged = []
    for verdict in verdicts:
        if verdict.prospect is not None:
            click.echo(f"compiling for {verdict.slice.name}", err=True)
            judged.append(_judged(confirmed(verdict.prospect)))
        else:
            judged.append(verdict)
    return judged


def _as_fields(manifest: Manifest, verdicts: Sequence[_Verdict]) -> dict[str, Any]:
    """The JSON object that `--json` prints."""
    return {
        "schema": SCHEMA,
        "name": manifest.name,
        "possible": not any(it.misfit for it in verdicts),
        "on": [_slice_fields(it) for it in verdicts],
    }


def _slice_fields(verdict: _Verdict) -> dict[str, Any]:
    prospect, kind = verdict.prospect, verdict.slice.kind
    return {
        "name": verdict.slice.name,
        "kind": kind.name,
        "devices": verdict.slice.devices,
        "memory": kind.usable,
        "mesh": "" if prospect is None else str(prospect.use.shape),
        "weights": None if prospect is None else prospect.need.weights,
        "cache": None if prospect is None else prospect.need.cache,
        "work": None if prospect is None else prospect.need.work,
        "read": None if prospect is None else prospect.read,
        "token_s": None if prospect is None else prospect.token_s,
        "compiled": prospect is not None and prospect.compiled,
        "fits": verdict.misfit is None,
        "what": verdict.misfit.what if verdict.misfit else None,
        "hint": verdict.misfit.hint if verdict.misfit else None,
    }


def _lines(
    manifest: Manifest, config: GrokConfig, verdicts: Sequence[_Verdict], view: Screen
) -> Iterator[str]:
    """A table that fits the screen."""
    by = "by the compiler" if any(it.prospect and it.prospect.compiled for it in verdicts) else ""
    text = f"{manifest.name}, one text of up to {config.sequence_len:,} tokens in bfloat16 {by}"
    yield from view.wrapped(text.rstrip())
    yield ""
    titles = ("to run it, on", "needed each", "of", "mesh", "", "")
    yield from view.table(titles, [_row(it) for it in verdicts], right=(1, 2))


def _row(verdict: _Verdict) -> tuple[str, ...]:
    made, name = verdict.prospect, verdict.slice.name
    if made is None:
        return name, "", "", "", "NO", "no mesh divides the model"
    needed, free = bytes_text(made.need.total), bytes_text(made.memory.free)
    reading = f"{bytes_text(made.read)}, {made.token_s * 1e3:.1f} ms at memory bandwidth"
    word = "yes" if made.fits else "NO"
    return name, needed, free, str(made.use.shape), word, f"each token reads {reading}"
