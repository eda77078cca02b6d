"""Chooses the manifest for a torrent. Pure: no I/O here."""

from __future__ import annotations

import dataclasses

from grokfetch.errors import Contradiction
from grokfetch.manifest.schema import Manifest, ManifestFile, bind, plain
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import TorrentFile

__all__ = ["in_force"]


def in_force(
    manifest: Manifest | None, torrent: TorrentFile, layout: Layout, magnet: str | None
) -> Manifest:
    """The manifest to put in force for a torrent.

    A manifest without digests adopts the torrent: its piece hashes are all there is.

    Args:
        manifest: what the payload must be; None if nothing is known.
        torrent: its metadata.
        layout: its files.
        magnet: the link it came by.

    Raises:
        Contradiction: the files are others, or the manifest is about another torrent and has no
            sha256 to tell that the content is the same.
    """
    files = [(file.name, file.size) for file in layout.payload]
    if manifest is None:
        entries = (ManifestFile(path, size) for path, size in files)
        return plain(layout.name, torrent.info_hash, magnet, entries)
    named = manifest.info_hash
    undigested = [file for file in manifest.files if file.sha256 is None]
    if named is not None and not torrent.known_as(named) and undigested:
        raise Contradiction(
            f"the manifest is for torrent {named}, but this is {torrent.info_hash}, and the "
            f"manifest has no sha256 of {undigested[0].path} to tell whether it is the same file"
        )
    bound = bind(manifest, files)
    if named is None and len(undigested) == len(manifest.files):
        bound = dataclasses.replace(bound, info_hash=torrent.info_hash)
    return bound if bound.magnet else dataclasses.replace(bound, magnet=magnet)
