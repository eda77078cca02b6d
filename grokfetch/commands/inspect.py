"""`grokfetch inspect`: what tensors a shard, or a checkpoint folder, holds."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.options import plain_option, state_option
from grokfetch.errors import CheckpointInvalid, GrokfetchError
from grokfetch.folder.store import Store
from grokfetch.output.terminal import screen
from loader.weights.schema import GrokConfig, parameters

if TYPE_CHECKING:
    from loader.weights.shard_reader import Shard

SHARDS = "tensor[0-9][0-9][0-9][0-9][0-9]_[0-9][0-9][0-9]"


@click.command(
    cls=Explained,
    examples=(
        "grokfetch inspect /data/grok-1",
        "grokfetch inspect tensor00000_000 --json",
    ),
)
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="JSON lines, one object for each tensor.")
@plain_option
@state_option
def inspect(path: Path, *, as_json: bool, state: Path | None) -> None:
    """List the tensors of a shard FILE or a checkpoint DIR.

    Prints name, dtype, shape, shape of the scales, bytes, byte offset and file of each tensor.
    Nothing is unpickled and only a few hundred bytes of each file are read.
    """
    rows = []
    refused: list[GrokfetchError] = []
    for name, file in _tensors(path, state):
        try:
            rows.append(_row(name, file, path))
        except GrokfetchError as error:
            refused.append(_with_meaning(error, file) if file == path else error)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
    elif rows:
        _print_table(rows)
    for refusal in refused[:-1]:
        click.echo(f"error: {refusal}", err=True)
    if refused:
        raise refused[-1]


def _with_meaning(error: GrokfetchError, file: Path) -> GrokfetchError:
    """The same of a file that a person has named, which may be meant for another command."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        if opened.read(1) in {b"d", b"{"}:
            error.hint = f"a torrent or a manifest: what it names is told by: grokfetch plan {file}"
    return error


def _tensors(path: Path, state: Path | None) -> Iterator[tuple[str | None, Path]]:
    """(name, shard) of every tensor; a name only where a manifest says it."""
    if not path.is_dir():
        yield None, path
        return
    store = Store(path, state)
    manifest = store.manifest_or_none()
    if manifest is not None and manifest.tensors:
        yield from ((tensor.name, store.payload(tensor.file)) for tensor in manifest.tensors)
        return
    shards = sorted(path.rglob(SHARDS))
    if not shards:
        raise CheckpointInvalid(
            "no shard named like tensor00000_000 lies here",
            path=path,
            hint="name a shard or the folder of a checkpoint; of other files: grokfetch status DIR",
        )
    yield from ((None, shard) for shard in shards)


def _row(name: str | None, file: Path, root: Path) -> dict[str, object]:

    from loader.weights.shard_reader import read_shard

    shard = read_shard(file)
    return {
        "name": name or _official_name(file, shard) or "-",
        "dtype": shard.array.dtype,
        "shape": shard.array.shape,
        "scales": None if shard.scales is None else shard.scales.shape,
        "bytes": shard.array.nbytes,
        "offset": shard.array.offset,
        "file": str(file.relative_to(root) if root.is_dir() else file.name),
    }


def _official_name(file: Path, shard: Shard) -> str | None:
    """The name that the official model gives a tensor of this number, if the shapes are its."""
    for spec in parameters(GrokConfig()):
        scales = None if shard.scales is None else shard.scales.shape
        if (spec.file, spec.shape, spec.scale_shape) == (file.name, shard.array.shape, scales):
            return spec.name
    return None


def _print_table(rows: list[dict[str, object]]) -> None:
    titles = list(rows[0])
    cells = [[_cell(value) for value in row.values()] for row in rows]
    figures = (titles.index("bytes"), titles.index("offset"))
    for line in screen(listing=True).table(titles, cells, figures):
        click.echo(line)


def _cell(value: object) -> str:
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None else str(value)
