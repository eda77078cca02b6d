"""What is settled before the first piece: metadata, manifest, request, locations of files."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePosixPath

from grokfetch.errors import Contradiction, SelectionInvalid, Stalled
from grokfetch.events import Finding, Metadata, Notice, Status
from grokfetch.fetch.preflight import asked_bytes, check_early
from grokfetch.fetch.silence import Silence, other_ways
from grokfetch.fetch.source import PieceSource
from grokfetch.folder.adopt import adopt
from grokfetch.folder.payload import (
    cut_long_files,
    make_empty_files,
    name_asked_files,
    refuse_look_alikes,
)
from grokfetch.folder.store import Store
from grokfetch.folder.verify import TensorIndex
from grokfetch.manifest.match import in_force
from grokfetch.manifest.schema import Manifest
from grokfetch.manifest.selection import Request, Selection, extended, pieces_of, spans, urgency
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import Layout, LayoutFile
from grokfetch.torrent.metainfo import TorrentFile, check_info_hash
from grokfetch.units import count_text

__all__ = ["Asked", "Prepared", "prepare", "selected"]

Asked = Request | Callable[[Manifest, Layout], Request]
"""A request, or a function that makes one from the manifest in force and the piece length."""


@dataclasses.dataclass(frozen=True, slots=True)
class Prepared:
    """A fetch into a locked folder, with everything that it needs to bring pieces.

    Attributes:
        store: the folder.
        torrent: its metadata.
        layout: its files, with their places in this folder.
        tensors: where the tensors are in them.
        weights: payload bytes of each piece.
        asked: the pieces that are asked for, including those of earlier fetches.
        urgency: which of them are wanted earlier or later, as in `Order`.
    """

    store: Store
    torrent: TorrentFile
    layout: Layout
    tensors: TensorIndex
    weights: tuple[int, ...]
    asked: frozenset[int]
    urgency: Mapping[int, int]

    def names(self, pieces: Iterable[int]) -> tuple[str, ...]:
        """The tensors with bytes in these pieces, and the files that hold no tensor there."""
        parts = [it for piece in pieces for it in self.layout.segments(piece) if not it.file.pad]
        named = (
            self.tensors.names(it.file.path, it.offset, it.length) or str(it.file.path)
            for it in parts
        )
        return tuple(dict.fromkeys(name for names in named for name in names.split(", ")))

    def weight(self, pieces: Iterable[int]) -> int:
        """The payload bytes of these pieces."""
        return sum(self.weights[piece] for piece in pieces)

    def room(self, files: Iterable[LayoutFile]) -> list[tuple[PurePosixPath, int]]:
        """These files, with the bytes asked for from each."""
        room = dict.fromkeys((file.path for file in files), 0)
        for piece in self.asked:
            for part in self.layout.segments(piece):
                if part.file.path in room and not part.file.pad:
                    room[part.file.path] += part.length
        return list(room.items())


def prepare(  # noqa: PLR0913  # store and source, and what a fetch may choose
    store: Store,
    source: PieceSource,
    *,
    manifest: Manifest | None,
    request: Asked | None,
    metadata_s: float,
    clock: Callable[[], float],
) -> Iterator[Status | Notice | Metadata | Finding | Prepared]:
    """Settle what will be fetched into a folder; the last value is `Prepared`.

    Args:
        store: the folder, locked.
        source: where from.
        manifest: what the user says it must be.
        request: what is asked for in addition to earlier requests; None for nothing more.
        metadata_s: patience without metadata, in seconds.
        clock: monotonic seconds.

    Raises:
        TorrentInvalid: the metadata is not the one asked for, or unsafe.
        Contradiction: the torrent is not what the manifest says, or not the one begun here.
        SelectionInvalid: the request names what the checkpoint does not have.
        Stalled: the source gave no metadata in time.
        StorageFailed: the folder cannot be written.
    """
    expected = manifest or store.manifest_or_none()
    if store.torrent() is None and expected is not None:
        check_early(store.root, _expected_files(expected, request))
    lacking = partial(_without_hashes, store, expected, request)
    for event in _metadata(store, source, expected, metadata_s, clock, lacking=lacking):
        if isinstance(event, TorrentFile):
            torrent = event
        else:
            yield event
    begun = store.torrent()
    if begun is not None and begun.piece_layers != torrent.piece_layers:
        store.save_torrent(torrent)
    yield from _settle(store, torrent, source.magnet, manifest, request)
    prepared = _prepared(store, torrent)
    layout, weights = prepared.layout, prepared.weights
    counts = (len(layout.payload), sum(weights), layout.piece_count)
    yield Metadata(layout.name, torrent.info_hash, *counts)
    for file in cut_long_files(store, layout):
        yield Finding("long", file.path, detail=f"truncated to its {file.size:,} bytes")
    make_empty_files(store, layout)
    yield prepared


def _prepared(store: Store, torrent: TorrentFile) -> Prepared:
    """What follows from the manifest and the selection now in force."""
    layout = store.layout()
    assert layout is not None
    every = range(layout.piece_count)
    spans_asked = store.asked()
    asked = frozenset(every) if spans_asked is None else pieces_of(layout, spans_asked)
    return Prepared(
        store,
        torrent,
        layout,
        TensorIndex(store.manifest()),
        tuple(
            sum(part.length for part in layout.segments(piece) if not part.file.pad)
            for piece in every
        ),
        asked,
        urgency(store.manifest(), layout, asked),
    )


def _expected_files(
    manifest: Manifest, request: Asked | None
) -> Sequence[tuple[PurePosixPath, int]]:
    """The files that a new fetch of this will write, with their bytes, as far as known."""
    if callable(request):
        return ()
    if request is None or request == Request():
        return asked_bytes(manifest, None)
    try:
        return asked_bytes(manifest, spans(manifest, Selection((request,))))
    except SelectionInvalid:
        # A pattern may match names of files in other places, which only the metadata tells.
        return ()


def _metadata(  # noqa: PLR0913  # and how to tell what is enough of it
    store: Store,
    source: PieceSource,
    manifest: Manifest | None,
    within_s: float,
    clock: Callable[[], float],
    *,
    lacking: Callable[[TorrentFile], list[PurePosixPath]],
) -> Iterator[Status | Notice | TorrentFile]:
    """The torrent of the folder or, if it has none, of the source; it is the last value.

    A v2 torrent may still lack the hashes of files that are not asked for: `lacking` returns those
    that are asked for.
    """
    known = store.torrent()
    asked = source.info_hash
    if known is not None:
        _refuse_another(store, known, asked)
        if not lacking(known):
            yield known
            return
    elif source.magnet is not None and manifest is not None and manifest.mirrors:
        yield Notice(
            f"{manifest.name}: first its metadata, the hashes of all pieces, which only a "
            "BitTorrent peer can give; after that mirrors help"
        )
    deadline = clock() + within_s
    ways = other_ways(store.root, manifest, metadata=False)
    silence = Silence(ways, clock)
    with contextlib.closing(source.metadata()) as stream:
        for event in stream:
            if isinstance(event, TorrentFile):
                check_info_hash(event, asked)
                known = _with_layers(known or event, event)
                if not lacking(known):
                    yield known
                    return
            elif isinstance(event, Notice):
                yield event
            else:
                yield from silence.after(event)
                yield Status("metadata", peers=event.peers)
            if clock() > deadline:
                break
    if known is not None:
        raise _no_hashes(store, lacking(known), within_s)
    raise Stalled(
        f"no metadata for {asked} within {within_s:.0f} s",
        hint=f"is the network open to BitTorrent? what else works: {ways}",
    )


def _refuse_another(store: Store, known: TorrentFile, asked: str) -> None:
    if not known.known_as(asked):
        raise Contradiction(
            f"this folder was begun with torrent {known.info_hash}, this is {asked}",
            path=store.root,
            hint=f"go on with what was begun: grokfetch fetch {store.root}, or choose another "
            "folder: --to DIR",
        )


def _no_hashes(store: Store, files: Sequence[PurePosixPath], within_s: float) -> Stalled:
    more = f" and {count_text(len(files) - 1, 'other file')}" if files[1:] else ""
    return Stalled(
        f"no peer has given the hashes of {files[0]}{more} within {within_s:.0f} s: in a v2 "
        "torrent they come from peers that hold the file",
        path=store.root,
        hint="name a peer that has it: --peer HOST:PORT; or give the .torrent, as SOURCE; or ask "
        "for other files: --only GLOB",
    )


def _with_layers(torrent: TorrentFile, other: TorrentFile) -> TorrentFile:
    layers = {**torrent.piece_layers, **other.piece_layers}
    return dataclasses.replace(torrent, piece_layers=layers)


def _without_hashes(
    store: Store, manifest: Manifest | None, request: Asked | None, torrent: TorrentFile
) -> list[PurePosixPath]:
    """The files that are asked for and whose hashes are still missing."""
    layout = parse_info(torrent.info, torrent.piece_layers).moved(store.places())
    lacking = [file.path for file in layout.unprovable]
    if not lacking:
        return []
    bound = in_force(manifest, torrent, layout, None).moved(store.places())
    if callable(request):
        request = request(bound, layout)
    everything = store.torrent() is not None
    selection = extended(store.selection(), request, everything=everything)
    # What is read on demand is not known beforehand.
    if selection is None or selection.on_demand:
        return lacking
    asked = spans(bound, selection)
    return [path for path in lacking if path in asked]


def _settle(
    store: Store,
    torrent: TorrentFile,
    magnet: str | None,
    wanted: Manifest | None,
    request: Asked | None,
) -> Iterator[Status]:
    """Put the manifest in force, then keep the torrent; on a contradiction, keep neither."""
    begun = store.layout()
    layout = begun or parse_info(torrent.info, torrent.piece_layers)
    if begun is None:
        refuse_look_alikes(store.root, layout)
    earlier = store.manifest_or_none()
    manifest = None
    if wanted is not None or earlier is None or begun is None:
        manifest = in_force(wanted or earlier, torrent, layout, magnet)
    # Earlier requests name files by their places, so these must stay the same.
    if store.selection() is None:
        names = {place: name for name, place in store.places().items()}
        known = manifest or (earlier and earlier.moved(names))
        for progress in adopt(store, layout, known.digests if known else {}):
            yield Status("checking", progress.done, progress.total)
    if manifest is not None:
        manifest = manifest.moved(store.places())
        if manifest != store.manifest_or_none():
            store.save_manifest(manifest)
    if callable(request):
        request = request(store.manifest(), layout)
    selection = selected(store, request, everything=begun is not None)
    if begun is None:
        store.save_torrent(torrent)
    if selection != store.selection():
        store.save_selection(selection)
    _rename(store)


def selected(store: Store, request: Request | None, *, everything: bool) -> Selection | None:
    """What is asked for now: the request and all earlier ones.

    Args:
        store: the folder.
        request: of this fetch.
        everything: if no selection is kept, whether all was asked for.
    """
    earlier = store.selection()
    if request is not None and request != Request():
        # Refused before anything of it is kept.
        spans(store.manifest(), (earlier or Selection(())).extended(request))
    return extended(earlier, request, everything=everything)


def _rename(store: Store) -> None:
    """Rename the files that are asked for now to their real names, and carry over their proofs."""
    layout = store.layout()
    assert layout is not None
    renamed = name_asked_files(store, layout)
    if renamed:
        record = store.record()
        files = {renamed.get(path, path): proof for path, proof in record.files.items()}
        store.save_record(dataclasses.replace(record, files=files))
