"""One checkpoint directory as the commands see it: what it holds, and the one door to its bytes.

The package, `grokfetch.folder`, says what lies where. How state files are replaced, and what
becomes of a damaged one, is `state_files`' business.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from grokfetch.errors import NotProven, SelectionInvalid, StateMissing
from grokfetch.folder import record as records
from grokfetch.folder.nearby import hint_nearby
from grokfetch.folder.proven import Proven, of_torrent, piece_hashes_decide
from grokfetch.folder.record import Record, Stamp
from grokfetch.folder.state_files import StateFiles
from grokfetch.manifest import relocation as placing
from grokfetch.manifest import schema as manifests
from grokfetch.manifest import selection as selections
from grokfetch.manifest.relocation import Places, in_hub_cache
from grokfetch.manifest.schema import Manifest, ManifestFile, ManifestTensor
from grokfetch.manifest.selection import Selection, Spans
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import TorrentFile, encode_torrent, parse_info, parse_torrent
from grokfetch.torrent.names import STATE_FOLDER, with_ending

__all__ = ["Store", "part_name"]


def part_name(path: PurePosixPath) -> PurePosixPath:
    """Where the bytes of a file lie that is not asked for."""
    return path.with_name(with_ending(path.name, ".part"))


class Store:
    """One checkpoint directory.

    Opening it reads nothing and writes nothing. What is read is kept until the lock is taken.

    Args:
        root: the checkpoint folder; need not exist yet.
        state: where our own files are; `root/.grokfetch` by default.

    Attributes:
        root: the checkpoint folder.
        state: the folder of our own files.
        warnings: what a person should know about state that could not be used.
    """

    def __init__(self, root: Path, state: Path | None = None) -> None:
        self.root = root
        self.state = root / STATE_FOLDER if state is None else state
        self._files = StateFiles(self.state)
        self.warnings = self._files.warnings
        self._forget()

    def _forget(self) -> None:
        self._manifest: Manifest | None = None
        self._places: Places | None = None
        self._selection: Selection | None = None
        self._asked: Spans | None = None
        self._torrent: TorrentFile | None = None
        self._layout: Layout | None = None
        self._settled = False
        self._record: Record | None = None
        self._entries: dict[PurePosixPath, ManifestFile] = {}

    def payload(self, path: PurePosixPath) -> Path:
        """Where a payload file lies on this machine."""
        return self.root / path

    def stamp(self, path: PurePosixPath) -> Stamp | None:
        """How a payload file looks now, links followed; None if it is not there."""
        try:
            status = os.stat(self.payload(path))  # noqa: PTH116 - half the time of Path.stat
        except OSError:
            return None
        return Stamp(status.st_size, status.st_mtime_ns)

    @property
    def _beside_payload(self) -> bool:
        """Whether our own files lie where they do by default."""
        return self.state == self.root / STATE_FOLDER

    # --- the lock ---------------------------------------------------------------------------

    @contextlib.contextmanager
    def lock(self, *, exclusive: bool = True) -> Iterator[None]:
        """Hold the folder: alone in order to write it, or with other readers.

        A shared lock makes nothing, and is not a lock where that cannot be had: see `folder_lock`.

        Raises:
            StateLocked: another process holds it; names that process where it is known.
            StorageFailed: the folder cannot be written, or its file system has no locks.
        """
        begins = exclusive and not self.state.exists()
        with self._files.lock(exclusive=exclusive):
            if begins and self._beside_payload and in_hub_cache(self.root.absolute()):
                self._files.warn(
                    f"{self.root} lies in Hugging Face's cache, whose tools will count the files "
                    f"in {self.state}; --state DIR keeps them elsewhere"
                )
            self._forget()
            yield

    # --- reading ----------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """The manifest in force.

        Raises:
            StateMissing: there is none.
        """
        found = self.manifest_or_none()
        if found is None:
            raise StateMissing(
                "nothing here says what this folder must hold",
                path=self.root,
                hint=self.hint_nearby()
                or f"run: grokfetch fetch SOURCE --to {self.root}, "
                f"or for files that came another way: grokfetch manifest {self.root}",
            )
        return found

    def hint_nearby(self) -> str:
        """What to name instead of this folder, in which nothing was begun; nothing if unknown."""
        return hint_nearby(self.root) if self._beside_payload else ""

    def manifest_or_none(self) -> Manifest | None:
        """The manifest in force, its paths those where files lie here; None if there is none."""
        if self._manifest is None:
            name = "manifest.json"
            known = self._files.read(name, lambda it: manifests.parse(it, str(self.state / name)))
            if known is not None:
                self._keep(known.moved(self.places()))
        return self._manifest

    def _keep(self, manifest: Manifest) -> None:
        self._manifest = manifest
        self._entries = {file.path: file for file in manifest.files}

    def places(self) -> Places:
        """Where files lie that do not lie where the torrent puts them."""
        if self._places is None:
            self._places = self._files.read("places.json", placing.decode) or {}
        return self._places

    def torrent(self) -> TorrentFile | None:
        """The torrent's metadata, None if there is none."""
        if self._torrent is None:
            found = self._files.read("metadata.torrent", _with_layout)
            if found is not None:
                self._torrent, self._layout = found
        return self._torrent

    def layout(self) -> Layout | None:
        """The torrent's layout, None if there is no torrent.

        Files that are not asked for lie under another name: they may hold bytes that share a piece
        with a file that is, and must not look whole.
        """
        self.torrent()
        if self._layout is not None and not self._settled:
            self._layout = self._layout.moved(self._moves(self._layout))
            self._settled = True
        return self._layout

    def _moves(self, layout: Layout) -> dict[PurePosixPath, PurePosixPath]:
        """From the torrent's paths to ours, for the files that lie elsewhere."""
        asked, moves = self.asked(), dict(self.places())
        selection = self.selection()
        # What is read next is not known, and a file that is being written cannot change its name.
        parts = asked is not None and selection is not None and not selection.on_demand
        for file in layout.payload:
            place = moves.get(file.name, file.name)
            if parts and asked is not None and place not in asked and file.size:
                moves[file.name] = part_name(place)
        return moves

    def selection(self) -> Selection | None:
        """What is asked for; None for everything."""
        if self._selection is None:
            self._selection = self._files.read("selection.json", selections.decode)
        return self._selection

    def asked(self) -> Spans | None:
        """The bytes that are asked for; None for everything.

        A file that only its sha256 can prove is asked for as a whole, or not at all.
        """
        selection, manifest = self.selection(), self.manifest_or_none()
        if selection is None or manifest is None:
            return None
        if self._asked is None:
            try:
                found = dict(selections.spans(manifest, selection))
            except SelectionInvalid as error:
                self._files.warn(f"{self.state / 'selection.json'} is ignored: {error.what}")
                self._selection = None
                return None
            for path in found:
                if not self.pieces_speak_for(path):
                    found[path] = ((0, self._entries[path].size),)
            self._asked = found
        return self._asked

    def record(self) -> Record:
        """What is proven; empty if nothing is.

        Pieces of another torrent than the one in `metadata.torrent` do not count.
        """
        if self._record is None:
            torrent, layout = self.torrent(), self.layout()
            info_hash = None if torrent is None else torrent.info_hash
            record = self._files.read("record.json", records.decode) or Record(info_hash)
            self._record = of_torrent(record, info_hash, layout)
            if record.info_hash == info_hash and record.pieces and not self._record.pieces:
                self.warnings.append(f"{self.state / 'record.json'}: it names pieces there are not")
        return self._record

    # --- writing, under the exclusive lock ----------------------------------------------------

    def save_manifest(self, manifest: Manifest) -> None:
        """Put a manifest in force, its paths those where files lie here.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        self._write_manifest(manifest)
        self._forget()
        self._keep(manifest)

    def save_tensors(self, tensors: tuple[ManifestTensor, ...]) -> None:
        """Keep which tensors the files hold, of which the manifest in force says nothing.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        manifest = dataclasses.replace(self.manifest(), tensors=tensors)
        self._write_manifest(manifest)
        # Readers go on meanwhile, and of the files nothing else is known now.
        self._keep(manifest)

    def _write_manifest(self, manifest: Manifest) -> None:
        names = {place: name for name, place in self.places().items()}
        self._files.write("manifest.json", manifests.encode(manifest.moved(names)))

    def save_places(self, places: Places) -> None:
        """Keep where files lie that do not lie where the torrent puts them.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        self._files.write("places.json", placing.encode(places))
        self._forget()

    def save_torrent(self, torrent: TorrentFile) -> None:
        """Keep a torrent's metadata.

        Raises:
            TorrentInvalid: it has no sound layout.
            StorageFailed: the state folder cannot be written.
        """
        layout = parse_info(torrent.info, torrent.piece_layers)
        self._files.write("metadata.torrent", encode_torrent(torrent))
        self._torrent, self._layout, self._record = torrent, layout, None
        self._settled = False

    def save_selection(self, selection: Selection | None) -> None:
        """Keep what is asked for; None asks for everything.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        if selection is None:
            self._files.remove("selection.json")
        else:
            self._files.write("selection.json", selections.encode(selection))
        self._forget()

    def extend_selection(self, more: Spans) -> None:
        """Keep that more bytes were read of a folder that is read on demand.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        earlier = self.selection()
        assert earlier is not None
        selection = earlier.grown(more)
        self._files.write("selection.json", selections.encode(selection))
        # Readers go on meanwhile, and no file has another name now.
        self._selection, self._asked = selection, None

    def save_record(self, record: Record) -> None:
        """Keep what is proven. The data it speaks of must be on the disk by now.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        self._files.write("record.json", records.encode(record))
        self._record = record

    # --- what is proven -----------------------------------------------------------------------

    def pieces_speak_for(self, path: PurePosixPath) -> bool:
        """Whether piece hashes prove this file of the manifest in force: `piece_hashes_decide`.

        Raises:
            StateMissing: there is no manifest.
        """
        named = self._named()
        return self.torrent() is not None and piece_hashes_decide(
            self._entries.get(path), named=named
        )

    def _named(self) -> bool:
        """Whether the manifest in force names the torrent."""
        torrent, manifest = self.torrent(), self.manifest()
        return torrent is not None and torrent.known_as(manifest.info_hash)

    def proven(self, fresh: frozenset[int] = frozenset()) -> Proven:
        """What is proven now. Each file is looked at once, when it is first asked about.

        Args:
            fresh: pieces that are proven and do not stand in the record yet.

        Raises:
            StateMissing: there is no manifest.
        """
        record = self.record()
        if fresh:
            record = dataclasses.replace(record, pieces=record.pieces | fresh)
        return Proven(record, _Stamps(self), self.layout(), named=self._named())

    def require(self, path: PurePosixPath, start: int = 0, length: int | None = None) -> None:
        """Return if a span of a payload file, all of it by default, is proven.

        Args:
            path: as in the manifest.
            start: the first byte.
            length: how many bytes.

        Raises:
            NotProven: a byte of it is not, or the file has changed since.
            StateMissing: there is no manifest.
        """
        self._refuse(self.proven(), path, start, length)

    def arrived(self, path: PurePosixPath) -> bool:
        """Whether a payload file is proven, without waiting for it; False where it may yet come.

        Raises:
            NotProven: it is not, and will not come.
            StateMissing: there is no manifest.
        """
        self.require(path)
        return True

    @property
    def news(self) -> int:
        """A number that rises when more may be proven."""
        return 0

    def await_news(self, seen: int) -> None:
        """Return when `news` is beyond what was seen, or nothing will come any more."""

    def expect(
        self, path: PurePosixPath, start: int, length: int, *, at_once: bool = False
    ) -> None:
        """Say that a span of a payload file will be required, `at_once` or some time soon.

        Nothing follows from it here: a folder that is being filled brings such bytes first.
        """

    def require_all(self) -> None:
        """Return if every file that the manifest names is proven.

        Raises:
            NotProven: one is not.
            StateMissing: there is no manifest.
        """
        proven = self.proven()
        for file in self.manifest().files:
            self._refuse(proven, file.path, 0, None)

    def _refuse(self, proven: Proven, path: PurePosixPath, start: int, length: int | None) -> None:
        entry = self._entries.get(path)
        if entry is None:
            reason: str | None = "the manifest in force does not name it"
        else:
            stop = entry.size if length is None else start + length
            reason = proven.doubt(entry, start, stop)
        if reason is not None:
            selection = self.selection()
            rest = f"grokfetch fetch {self.root}"
            if selection is not None:
                rest += f" --all (only this was asked for: {selection})"
            raise NotProven(
                reason,
                path=self.payload(path),
                hint=f"run: grokfetch verify {self.root}, "
                f"and where it finds something missing or bad: {rest}",
            )


class _Stamps(dict[PurePosixPath, Stamp | None]):
    """How files look, each at the time when it is first asked about."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def __missing__(self, path: PurePosixPath) -> Stamp | None:
        self[path] = stamp = self._store.stamp(path)
        return stamp


def _with_layout(data: bytes) -> tuple[TorrentFile, Layout]:
    """A torrent file and its layout.

    Raises:
        TorrentInvalid: it is none, or has no sound layout.
    """
    torrent = parse_torrent(data)
    return torrent, parse_info(torrent.info, torrent.piece_layers)
