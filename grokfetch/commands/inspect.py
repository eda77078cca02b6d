"""`grokfetch inspect`: which tensors a shard or a checkpoint holds, on disk or in a swarm."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.options import NETWORK_NAMES, network_options, plain_option, state_option
from grokfetch.errors import CheckpointInvalid, GrokfetchError, NoModel
from grokfetch.events import FetchEvent
from grokfetch.fetch.wanted import Network, read_manifest, resolve
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, ManifestTensor
from grokfetch.output.progress import Bar
from grokfetch.output.reporting import notice
from grokfetch.output.terminal import plain, screen

if TYPE_CHECKING:
    from loader.weights.shard_values import Shard

    Shards = Mapping[PurePosixPath, Shard | GrokfetchError]

Row = dict[str, object]

Found = tuple[Sequence[Row], Sequence[GrokfetchError]]
"""A row for each tensor, and the errors of the other shards."""


@click.command(
    cls=Explained,
    examples=(
        "grokfetch inspect /data/grok-1",
        "grokfetch inspect 'magnet:?xt=urn:btih:...'",
    ),
    groups={
        "Without the files": ("folder",),
        "Peers and mirrors": NETWORK_NAMES,
        "Rates": ("up", "down"),
        "Output and state": ("as_json", "plain", "state"),
    },
)
@click.argument("source", required=False)
@click.option(
    "--to",
    "folder",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Keep downloaded parts of the files here; by default in a temporary folder.",
)
@network_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, one object per tensor.")
@plain_option
@state_option
def inspect(
    source: str | None, folder: Path | None, network: Network, *, as_json: bool, state: Path | None
) -> None:
    """List the tensors of a shard FILE, a checkpoint DIR or the SOURCE of a fetch.

    Prints name, dtype, shape, shape of the scales, bytes, byte offset and file of each tensor.
    Nothing is unpickled, and only a few hundred bytes of each file are read.

    SOURCE is a magnet link, a torrent or a manifest, as for fetch; by default it is Grok-1. If a
    manifest names the tensors, nothing is fetched. Otherwise only the pieces that hold the headers
    of the shards are fetched, from peers or mirrors, and proven.
    """
    # A link may be too long for a file name, in which case pathlib raises.
    there = source is not None and os.path.exists(source)  # noqa: PTH110
    if source is not None and there and _first_byte(source) not in {b"d", b"{"}:
        rows, refused = _on_disk(Path(source), state)
    else:
        rows, refused = _elsewhere(source, folder, state, network)
    if as_json:
        for row in rows:
            click.echo(json.dumps(row))
    elif rows:
        _print_table(rows)
    for refusal in refused[:-1]:
        click.echo(f"error: {refusal}", err=True)
    if refused:
        raise refused[-1]


def _first_byte(source: str) -> bytes:
    """The first byte of a file, which tells a torrent and a manifest from a shard."""
    with contextlib.suppress(OSError), Path(source).open("rb") as opened:
        return opened.read(1)
    return b""


def _on_disk(path: Path, state: Path | None) -> Found:
    """The tensors of a shard, or of those in a folder."""
    from loader.weights.headers import is_shard
    from loader.weights.shard_reader import read_shard

    names: dict[PurePosixPath, str] = {}
    root = path if path.is_dir() else path.parent
    files = [path]
    if path.is_dir():
        store = Store(path, state)
        manifest = store.manifest_or_none()
        if manifest is not None and manifest.tensors:
            names = {tensor.file: tensor.name for tensor in manifest.tensors}
            files = [store.payload(tensor.file) for tensor in manifest.tensors]
        else:
            files = sorted(it for it in path.rglob("tensor*") if is_shard(it.name))
    if not files:
        raise CheckpointInvalid(
            "contains no shard with a name like tensor00000_000",
            path=path,
            hint="name a shard or a checkpoint's folder; for other files: grokfetch status DIR",
        )
    shards: dict[PurePosixPath, Shard | GrokfetchError] = {}
    for file in files:
        place = PurePosixPath(file.relative_to(root).as_posix())
        try:
            shards[place] = read_shard(file)
        except GrokfetchError as error:
            shards[place] = error
    return _found(shards, names)


def _elsewhere(
    source: str | None, folder: Path | None, state: Path | None, network: Network
) -> Found:
    """The tensors that a fetch would bring; as little as possible is downloaded."""
    from grokfetch.fetch.waiting_store import Arriving
    from loader.on_demand import filled_on_demand
    from loader.weights.headers import is_shard, named, read_headers

    if source is not None and _first_byte(source) == b"{":
        listed = read_manifest(Path(source))
        if listed.tensors:
            return _listed(listed), ()
    wanted = resolve(source, None, state, network)
    for warning in wanted.warnings:
        notice(f"warning: {warning}")
    if wanted.manifest is not None and wanted.manifest.tensors:
        return _listed(wanted.manifest), ()
    with contextlib.ExitStack() as held:
        if folder is None:
            made = tempfile.TemporaryDirectory(prefix="grokfetch-inspect-")
            folder = Path(held.enter_context(made))
        store = Arriving(folder, state, on_demand=True)
        held.enter_context(filled_on_demand(store, wanted, network, _shown))
        if not store.manifest().tensors:
            files = [file for file in store.manifest().files if is_shard(file.path.name)]
            if not files:
                raise CheckpointInvalid(
                    "contains no shard: none of its files has a name like tensor00000_000",
                    path=store.manifest().name,
                    hint="to see what it holds: grokfetch plan SOURCE",
                )
            shards = dict(read_headers(store, files))
            found = _found(shards, {})
            with contextlib.suppress(NoModel):
                store.save_tensors(named(_sound(shards)))
            return found
        return _listed(store.manifest()), ()


def _shown(events: Generator[FetchEvent, None, None]) -> Generator[FetchEvent, None, None]:
    """The same events, with a progress bar."""
    with contextlib.closing(events), Bar("fetch", plain=plain()) as bar:
        for event in events:
            bar.take(event)
            yield event


def _found(shards: Shards, names: Mapping[PurePosixPath, str]) -> Found:
    """The rows of shards, named by a manifest, or else by what the shards contain."""
    from loader.weights.headers import entry, named

    sound = _sound(shards)
    if not names:
        try:
            names = {tensor.file: tensor.name for tensor in named(sound)}
        except NoModel:
            names = {path: _official_name(path, shard) for path, shard in sound.items()}
    rows = [
        _row(entry(names[path], path, shard), shard.array.nbytes) for path, shard in sound.items()
    ]
    return rows, [error for error in shards.values() if isinstance(error, GrokfetchError)]


def _sound(shards: Shards) -> dict[PurePosixPath, Shard]:
    return {path: it for path, it in shards.items() if not isinstance(it, GrokfetchError)}


def _official_name(path: PurePosixPath, shard: Shard) -> str:
    """The official model's name for the tensor in this file, if the shapes are equal; or "-"."""
    from loader.weights.schema import GrokConfig, parameters

    for spec in parameters(GrokConfig()):
        scales = None if shard.scales is None else shard.scales.shape
        if (spec.file, spec.shape, spec.scale_shape) == (path.name, shard.array.shape, scales):
            return spec.name
    return "-"


def _listed(manifest: Manifest) -> list[Row]:
    """What a manifest says about its tensors."""
    return [_row(tensor, next(tensor.spans())[1]) for tensor in manifest.tensors]


def _row(tensor: ManifestTensor, nbytes: int) -> Row:
    return {
        "name": tensor.name,
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "scales": None if tensor.scales is None else tensor.scales.shape,
        "bytes": nbytes,
        "offset": tensor.offset,
        "file": str(tensor.file),
    }


def _print_table(rows: Sequence[Row]) -> None:
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
