"""What is settled before the first piece: metadata, manifest, what is asked for, which places."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Generator, Iterator

from grokfetch.errors import Contradiction, Stalled
from grokfetch.events import Notice, Status
from grokfetch.fetch.source import PieceSource
from grokfetch.folder.adopt import adopt
from grokfetch.folder.payload import name_asked_files
from grokfetch.folder.store import Store
from grokfetch.manifest.match import in_force
from grokfetch.manifest.relocation import relocated
from grokfetch.manifest.schema import Manifest
from grokfetch.manifest.selection import Request, Selection, spans
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import TorrentFile, check_info_hash, parse_info

__all__ = ["Asked", "metadata", "settle"]

Asked = Request | Callable[[Manifest, int], Request]
"""A request, or what makes one of the manifest in force and the length of a piece in bytes."""


def metadata(
    store: Store, source: PieceSource, within_s: float, clock: Callable[[], float]
) -> Generator[Status | Notice, None, TorrentFile]:
    """The torrent's metadata: that which the folder was begun with, or what the source gives.

    Args:
        store: the folder, locked.
        source: where from.
        within_s: patience, in seconds.
        clock: monotonic seconds.

    Raises:
        TorrentInvalid: it is not what the info hash asks for.
        Contradiction: the folder was begun with another torrent.
        Stalled: the source gave none in that time.
    """
    known = store.torrent()
    asked = source.info_hash
    if known is not None:
        if not known.known_as(asked):
            raise Contradiction(
                f"this folder was begun with torrent {known.info_hash}, this is {asked}",
                path=store.root,
                hint="choose another folder: --to DIR",
            )
        return known
    deadline = clock() + within_s
    with contextlib.closing(source.metadata()) as stream:
        for event in stream:
            if isinstance(event, TorrentFile):
                check_info_hash(event, asked)
                return event
            yield event if isinstance(event, Notice) else Status("metadata", peers=event.peers)
            if clock() > deadline:
                break
    raise Stalled(
        f"no metadata of {asked} within {within_s:.0f} s",
        hint="is the network open to BitTorrent? a peer can be named: --peer HOST:PORT",
    )


def settle(
    store: Store,
    torrent: TorrentFile,
    magnet: str | None,
    wanted: Manifest | None,
    request: Asked | None,
) -> Generator[Status, None, Layout]:
    """Put the manifest in force, and only then keep the torrent: a contradiction keeps none.

    Args:
        store: the folder, locked.
        torrent: what is fetched.
        magnet: its link where there is one, for a manifest that has to be made.
        wanted: the manifest that a person named.
        request: what is asked for beside what was before; None for nothing more.

    Raises:
        TorrentInvalid: it has no sound layout.
        Contradiction: the torrent is not what the manifest says.
        SelectionInvalid: the request names what the checkpoint does not have.
        StorageFailed: the folder cannot be written.
    """
    begun = store.layout()
    layout = begun or parse_info(torrent.info, torrent.piece_layers)
    earlier = store.manifest_or_none()
    manifest = None
    if wanted is not None or earlier is None or begun is None:
        manifest = in_force(wanted or earlier, torrent, layout, magnet)
    yield from _adopt(store, layout)
    if manifest is not None:
        manifest = relocated(manifest, store.places())
        if manifest != store.manifest_or_none():
            store.save_manifest(manifest)
    if callable(request):
        request = request(store.manifest(), layout.piece_length)
    selection = _selection(store, request, everything=begun is not None)
    if begun is None:
        store.save_torrent(torrent)
    if selection != store.selection():
        store.save_selection(selection)
    settled = store.layout()
    assert settled is not None
    _rename(store, settled)
    return settled


def _adopt(store: Store, layout: Layout) -> Iterator[Status]:
    """Find files that lie in another layout than the torrent's, and remember where.

    What was asked for before names files by their places, which must then stay.
    """
    if store.selection() is not None:
        return
    search = adopt(store, layout)
    try:
        while True:
            progress = next(search)
            yield Status("checking", progress.done, progress.total)
    except StopIteration as end:
        if end.value:
            store.save_places({**store.places(), **end.value})


def _selection(store: Store, request: Request | None, *, everything: bool) -> Selection | None:
    """What is asked for now: the request beside what earlier ones have asked for.

    Args:
        store: the folder.
        request: of this fetch.
        everything: where no selection is kept, all was asked for.
    """
    earlier = store.selection()
    if request is None:
        return earlier
    if request == Request():
        return None
    selection = (earlier or Selection(())).extended(request)
    # Refused before anything of it is kept.
    spans(store.manifest(), selection)
    return None if earlier is None and everything else selection


def _rename(store: Store, layout: Layout) -> None:
    """Give files that are asked for now their names, and their proofs with them."""
    renamed = name_asked_files(store, layout)
    if renamed:
        record = store.record()
        files = {renamed.get(path, path): proof for path, proof in record.files.items()}
        store.save_record(dataclasses.replace(record, files=files))
