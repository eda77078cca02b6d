"""`grokfetch report`: the progress and history of a folder, as a page for a browser."""

from __future__ import annotations

import time
from pathlib import Path

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.options import folder_argument, state_option
from grokfetch.errors import StorageFailed, storage_errors
from grokfetch.folder.atomic import put
from grokfetch.folder.overview import overview
from grokfetch.folder.store import Store
from grokfetch.units import bytes_text


@click.command(
    cls=Explained,
    examples=(
        "grokfetch report /data/grok-1",
        "grokfetch report /data/grok-1 --output grok-1.html",
    ),
)
@folder_argument
@click.option(
    "--output",
    "-o",
    metavar="FILE",
    type=click.Path(dir_okay=False, allow_dash=True, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="Where to write the page; - is stdout.",
)
@state_option
def report(folder: Path, output: Path, *, state: Path | None) -> None:
    """Write a page about DIR: what is proven, where it came from, how it ran.

    The page is one file that loads nothing from elsewhere. It shows the same as `status --json`
    and, like it, hashes nothing and takes no lock. It names the peers and mirrors that sent data.
    """
    from grokfetch.output.report.page import render

    store = Store(folder, state)
    seen = overview(store)
    for warning in store.warnings:
        click.echo(f"warning: {warning}", err=True)
    # A file name need not be valid UTF-8; other bytes are shown as escapes.
    page = render(seen, now=time.time()).encode("utf-8", "backslashreplace")
    if str(output) == "-":
        click.echo(page, nl=False)
        return
    if not output.parent.is_dir():
        raise StorageFailed(
            "is not a folder", path=output.parent, hint="create it, or choose another: -o FILE"
        )
    with storage_errors(output):
        put(output, page)
    click.echo(f"{output}: {bytes_text(len(page))}, open it in a browser")
