"""The state files of a checkpoint folder: manifest, torrent, what is asked for, the record."""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath

from grokfetch.errors import SelectionInvalid, StateMissing
from grokfetch.folder import record as records
from grokfetch.folder.nearby import hint_nearby
from grokfetch.folder.proven import of_torrent, piece_hashes_decide
from grokfetch.folder.record import Record
from grokfetch.folder.state_files import StateFiles
from grokfetch.manifest import relocation as placing
from grokfetch.manifest import schema as manifests
from grokfetch.manifest import selection as selections
from grokfetch.manifest.relocation import Places
from grokfetch.manifest.schema import Manifest, ManifestFile, ManifestTensor
from grokfetch.manifest.selection import Selection, Spans
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import TorrentFile, encode_torrent, parse_torrent
from grokfetch.torrent.names import STATE_FOLDER, with_ending

__all__ = ["Documents", "part_name"]


def part_name(path: PurePosixPath) -> PurePosixPath:
    """The path for the bytes of a file that is not asked for."""
    return path.with_name(with_ending(path.name, ".part"))


class Documents:
    """The state files of one checkpoint folder, each read when it is first needed.

    What was read is kept until it may have changed. Writing needs the exclusive lock.

    Args:
        root: the checkpoint folder; it need not exist yet.
        state: where our own files are; `root/.grokfetch` by default.

    Attributes:
        root: the checkpoint folder.
        state: the folder of our own files.
        warnings: for the user, about state that could not be used.
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

    @property
    def _beside_payload(self) -> bool:
        """Whether our own files are in the default place."""
        return self.state == self.root / STATE_FOLDER

    # --- reading ----------------------------------------------------------------------------

    def manifest(self) -> Manifest:
        """The manifest in force.

        Raises:
            StateMissing: there is none.
            StorageFailed: the disk cannot read it.
        """
        found = self.manifest_or_none()
        if found is None:
            self._files.refuse_unread("manifest.json")
            raise StateMissing(
                "nothing here says what this folder must hold",
                path=self.root,
                hint=self.hint_nearby()
                or f"run: grokfetch fetch SOURCE --to {self.root}, "
                f"or for files that came another way: grokfetch manifest {self.root}",
            )
        return found

    def hint_nearby(self) -> str:
        """A hint at a folder nearby, if nothing was begun in this one; empty if there is none."""
        return hint_nearby(self.root) if self._beside_payload else ""

    def manifest_or_none(self) -> Manifest | None:
        """The manifest in force, with the paths that files have here; None if there is none."""
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
        """Where files are that are not where the torrent puts them."""
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

        Files that are not asked for have another name: they may hold bytes that share a piece with
        a file that is, and must not look complete.
        """
        self.torrent()
        if self._layout is not None and not self._settled:
            self._layout = self._layout.moved(self._moves(self._layout))
            self._settled = True
        return self._layout

    def _moves(self, layout: Layout) -> dict[PurePosixPath, PurePosixPath]:
        """From the torrent's paths to ours, for the files that are elsewhere."""
        asked, moves = self.asked(), dict(self.places())
        selection = self.selection()
        # On demand, nobody knows what is read next, and a file cannot be renamed while it is
        # written.
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

        A file that only its sha256 can prove is asked for as a whole or not at all.
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

        Pieces of a torrent other than that in `metadata.torrent` do not count.
        """
        if self._record is None:
            torrent, layout = self.torrent(), self.layout()
            info_hash = None if torrent is None else torrent.info_hash
            record = self._files.read("record.json", records.decode) or Record(info_hash)
            self._record = of_torrent(record, info_hash, layout)
            if record.info_hash == info_hash and record.pieces and not self._record.pieces:
                self.warnings.append(f"{self.state / 'record.json'}: it names unknown pieces")
        return self._record

    # --- writing, under the exclusive lock ----------------------------------------------------

    def save_manifest(self, manifest: Manifest) -> None:
        """Put a manifest in force; its paths are those that files have here.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        self._write_manifest(manifest)
        self._forget()
        self._keep(manifest)

    def save_tensors(self, tensors: tuple[ManifestTensor, ...]) -> None:
        """Keep which tensors the files hold, if the manifest in force does not say so.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        manifest = dataclasses.replace(self.manifest(), tensors=tensors)
        self._write_manifest(manifest)
        # Readers continue meanwhile, and nothing else about the files has changed.
        self._keep(manifest)

    def _write_manifest(self, manifest: Manifest) -> None:
        names = {place: name for name, place in self.places().items()}
        self._files.write("manifest.json", manifests.encode(manifest.moved(names)))

    def save_places(self, places: Places) -> None:
        """Keep where files are that are not where the torrent puts them.

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
        self._files.write("metadata.torrent", encode_torrent(torrent, sealed=True))
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
        """Keep that more bytes were read, in a folder that is read on demand.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        earlier = self.selection()
        assert earlier is not None
        selection = earlier.grown(more)
        self._files.write("selection.json", selections.encode(selection))
        # Readers continue meanwhile, and no file has changed its name.
        self._selection, self._asked = selection, None

    def save_record(self, record: Record) -> None:
        """Keep what is proven. The proven data must be on the disk by now.

        Raises:
            StorageFailed: the state folder cannot be written.
        """
        self._files.write("record.json", records.encode(record))
        self._record = record

    # --- what can prove a file ----------------------------------------------------------------

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


def _with_layout(data: bytes) -> tuple[TorrentFile, Layout]:
    """A torrent file and its layout.

    Raises:
        TorrentInvalid: it is not one, has changed since it was written, or has no sound layout.
    """
    torrent = parse_torrent(data)
    return torrent, parse_info(torrent.info, torrent.piece_layers)
