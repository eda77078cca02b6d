"""What `publish` writes: the torrent, its link and the manifest; not a command of its own."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import quote

import click

from grokfetch.commands.manifest import (
    FIRST_SHARD,
    TOKENIZER,
    find_checkpoint,
    read_config,
    write_file,
)
from grokfetch.errors import storage_errors
from grokfetch.manifest.schema import Manifest, ManifestFile, TokenizerSource, encode
from grokfetch.torrent.create import Made
from grokfetch.torrent.metainfo import TorrentFile, encode_torrent
from grokfetch.torrent.names import look_alikes, with_ending
from grokfetch.units import bytes_text, seconds_text

__all__ = ["describe", "put_out", "warn_of_look_alikes"]


def describe(folder: Path, config: Path | None) -> Manifest:
    """The manifest without files and digests: name, and tensors if it is a checkpoint."""
    if config is None and next(folder.rglob(FIRST_SHARD), None) is None:
        return Manifest(folder.name, ())
    from loader.weights.inventory import found

    checkpoint = find_checkpoint(folder, read_config(config))
    _, tensors = found(checkpoint, folder.parent)
    return Manifest(folder.name, (), tensors=tensors, model=checkpoint.config.to_mapping())


def warn_of_look_alikes(paths: Iterable[PurePosixPath]) -> None:
    """Warn of names that are the same on many file systems."""
    for one, other, *_ in look_alikes(paths):
        click.echo(
            f"warning: {str(one)!r} and {str(other)!r} are the same name on many file systems, "
            "such as those of macOS and Windows; nobody can fetch this there",
            err=True,
        )


def put_out(described: Manifest, made: Made, target: Path, start: float) -> tuple[str, Manifest]:
    """Write NAME.torrent and NAME.json, and print that.

    Args:
        described: the manifest without files and digests.
        made: the torrent.
        target: the folder to write to.
        start: when the work began, as of `time.perf_counter`.

    Returns:
        The magnet link and the manifest.

    Raises:
        StorageFailed: a file cannot be written.
    """
    magnet = _magnet_of(made.torrent, described.name, sum(file.size for file in made.files))
    manifest = _complete(described, made, magnet)
    torrent_path, manifest_path = (
        target / with_ending(described.name, ending) for ending in (".torrent", ".json")
    )
    _write(made.torrent, torrent_path, manifest, manifest_path)
    click.echo(
        f"{torrent_path} and {manifest_path}: {len(manifest.files)} files, "
        f"{len(manifest.tensors)} tensors, {bytes_text(manifest.size)} "
        f"in {seconds_text(time.perf_counter() - start)}",
        err=True,
    )
    return magnet, manifest


def _magnet_of(torrent: TorrentFile, name: str, size: int) -> str:
    """The link with all info hashes, name, size in bytes, trackers and web seeds."""
    pairs = [("dn", name), ("xl", str(size))]
    pairs += [("tr", url) for url in torrent.trackers]
    pairs += [("ws", url) for url in torrent.web_seeds]
    topics = f"xt=urn:btih:{torrent.v1}"
    if torrent.v2 is not None:
        topics += f"&xt=urn:btmh:1220{torrent.v2}"
    return f"magnet:?{topics}" + "".join(f"&{key}={quote(value, safe='')}" for key, value in pairs)


def _complete(described: Manifest, made: Made, magnet: str) -> Manifest:
    """The manifest with the files of a torrent and their digests."""
    files = tuple(ManifestFile(file.path, file.size, file.sha256) for file in made.files)
    return dataclasses.replace(
        described,
        files=files,
        info_hash=made.torrent.info_hash,
        magnet=magnet,
        tokenizer=_tokenizer(PurePosixPath(described.name) / TOKENIZER, files)
        or described.tokenizer,
    )


def _tokenizer(path: PurePosixPath, files: Sequence[ManifestFile]) -> TokenizerSource | None:
    """The tokenizer among the files, which the torrent brings like any other."""
    file = next((file for file in files if file.path == path), None)
    if file is None or file.sha256 is None:
        return None
    return TokenizerSource(path, file.size, file.sha256)


def _write(torrent: TorrentFile, torrent_path: Path, manifest: Manifest, path: Path) -> None:
    """Write both files whole or not at all.

    Raises:
        StorageFailed: one cannot be written.
    """
    with storage_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_file(torrent_path, encode_torrent(torrent))
    write_file(path, encode(manifest))
