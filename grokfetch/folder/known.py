"""Saves the state of a published folder, so that every command works on it.

The torrent's top folder is the folder itself, so each file has its path without the first part; the
proofs are the hashes that the torrent was made of. The state of a fetch is never replaced: a mark
in the state, `published.json`, says which torrents were made here. Without it a published folder
would be taken for a fetched one, and could not be published again after its files have changed.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from grokfetch.errors import Contradiction
from grokfetch.folder import advisory
from grokfetch.folder.record import FileProof, Record, Stamp
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest
from grokfetch.torrent.create import Made
from grokfetch.torrent.info_dictionary import parse_info

__all__ = ["EXPORT", "keep_published", "made_here"]

SCHEMA = 1

EXPORT = "export.json"
"""In the state of a folder that an export was written into: how far it is."""


def made_here(store: Store) -> bool:
    """Whether what is in the state is what an earlier `keep_published` put there."""
    torrent = store.torrent()
    made = advisory.read(_mark(store), SCHEMA, _info_hashes) or ()
    if torrent is not None:
        return any(map(torrent.known_as, made))
    # The torrent was damaged, and was set aside; the manifest tells which it was.
    manifest = store.manifest_or_none()
    return manifest is not None and manifest.info_hash in made


def keep_published(store: Store, made: Made, manifest: Manifest) -> None:
    """Keep a torrent that was just made of the folder, its manifest, and what is proven.

    Args:
        store: the folder, its exclusive lock held.
        made: the torrent and the files as they were when it was made.
        manifest: with paths that begin with the torrent's name.

    Raises:
        Contradiction: the state is that of a fetch, or of files that came another way.
        StorageFailed: the state folder cannot be written.
    """
    again = made_here(store)
    earlier = store.torrent() if again else None
    begun = store.torrent() is not None or store.manifest_or_none() is not None
    exported = (store.state / EXPORT).is_file()
    if begun and not exported and not again:
        raise Contradiction(
            "this folder holds the state of a fetch, which publish does not replace",
            path=store.root,
            hint="keep the state of what you publish in another folder, for seed too: --state DIR",
        )
    places = {file.path: PurePosixPath(*file.path.parts[1:]) for file in made.files}
    # Ended half-way, an earlier state must not pass for this one, and both torrents are from here.
    store.save_record(Record())
    mark = {
        "info_hash": made.torrent.info_hash,
        "before": None if earlier is None else earlier.info_hash,
    }
    advisory.write_first(_mark(store), SCHEMA, mark)
    store.save_selection(None)
    store.save_places(places)
    store.save_torrent(made.torrent)
    store.save_manifest(manifest.moved(places))
    # Of the torrent that was made: what the disk gives back of it may be another one.
    layout = parse_info(made.torrent.info, made.torrent.piece_layers)
    proofs = {
        places[file.path]: FileProof(Stamp(file.size, file.mtime_ns), file.sha256)
        for file in made.files
    }
    pieces = frozenset(range(layout.piece_count))
    store.save_record(Record(made.torrent.info_hash, pieces, proofs))


def _mark(store: Store) -> Path:
    return store.state / "published.json"


def _info_hashes(fields: dict[str, Any]) -> tuple[str, ...]:
    made = fields["info_hash"], fields.get("before")
    return tuple(str(info_hash) for info_hash in made if info_hash is not None)
