"""`grokfetch publish` of files on a web server; not a command of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

import click

from grokfetch.commands.manifest import FIRST_SHARD, read_config
from grokfetch.commands.published import describe, put_out, warn_of_look_alikes
from grokfetch.errors import Contradiction, SourceInvalid
from grokfetch.fetch.hashed_mirror import FRAMES, Mirrored, Spans, hash_mirror
from grokfetch.fetch.mirror import Length, MirrorSettings, lengths
from grokfetch.fetch.mirror.addresses import PATH
from grokfetch.fetch.wanted import read_manifest
from grokfetch.folder.lock import folder_lock
from grokfetch.manifest.schema import Manifest
from grokfetch.output.progress import Bar
from grokfetch.output.terminal import plain
from grokfetch.torrent.create import suitable_piece_length
from grokfetch.torrent.listing import torrent_order
from grokfetch.torrent.names import unsafe_name, with_ending
from grokfetch.torrent.streamed import made_of

__all__ = ["MirrorSource", "publish_mirror"]

SLACK = 4096
"""Bytes by which the frame of a shard may be longer than the official pickler makes it."""


@dataclasses.dataclass(frozen=True, slots=True)
class MirrorSource:
    """Files on a web server, as described by the user.

    `address` is a URL with `{path}`. The files are listed in `listed`, a file of paths, or in
    `manifest`. `name` is the torrent's, `config` holds hyperparameters, `piece_length` is in bytes.
    """

    address: str
    listed: Path | None
    manifest: Path | None
    name: str | None
    config: Path | None
    piece_length: int | None


def publish_mirror(
    source: MirrorSource,
    target: Path,
    settings: MirrorSettings,
    *,
    trackers: Sequence[str],
    web_seeds: Sequence[str],
    start: float,
) -> None:
    """Hash the files on a web server, and write their torrent and manifest.

    Args:
        source: the files, and where they are.
        target: the folder to write to; an interrupted run keeps `.NAME.publishing` in it.
        settings: how to treat the server.
        trackers: URLs of trackers for the torrent.
        web_seeds: URLs of further copies.
        start: when the work began, as of `time.perf_counter`.

    Raises:
        SourceInvalid: no list of files is given, or a path is not valid.
        Contradiction: a file changes during the download, or its size is not the manifest's.
        Damaged: the sha256 of a file is not the manifest's.
        OutOfReach: the server does not have a file, or does not answer.
        Stalled: the server has limited our rate for too long.
        CheckpointInvalid: the shards do not match the hyperparameters.
        StateLocked: another process is doing the same.
        StorageFailed: something cannot be written.
    """
    known = None if source.manifest is None else read_manifest(source.manifest)
    name = source.name or _name(source.address, known)
    described = None if known is None else _below(known, name)
    paths = sorted(_listed(source, name, described), key=torrent_order)
    warn_of_look_alikes(paths)
    state = target / with_ending(f".{name}", ".publishing")
    with folder_lock(state, exclusive=True):
        bar = Bar("hash", plain=plain())
        found = lengths(source.address, paths, settings, bar.take)
        _check_sizes(found, described)
        sizes = {path: size for path, (size, _) in found.items()}
        if not any(sizes.values()) or paths == [PurePosixPath(name, name)]:
            raise SourceInvalid(
                "there are no bytes to publish, or only a file with the torrent's own name",
                path=source.address,
                hint="list more files, or choose another --name",
            )
        model = described is not None and described.tensors
        mirrored = Mirrored(
            source.address,
            source.piece_length or suitable_piece_length(list(sizes.values())),
            {path: found[path] for path in paths},
            {
                file.path: file.sha256
                for file in (() if described is None else described.files)
                if file.sha256 is not None
            },
            {} if model else _frames(sizes, source.config),
        )
        with bar:
            done = 0

            def progress(count: int) -> None:
                nonlocal done
                done += count
                bar.show(done, sum(sizes.values()))

            hashes = hash_mirror(mirrored, state, settings, progress, bar.take)
        if described is None or not model:
            shown = _shown(state, name, mirrored.frames, source.config)
            described = _together(described, shown)
        seeds = dict.fromkeys((_web_seed(source.address, name), *web_seeds))
        made = made_of(
            name,
            [(path.relative_to(name), sizes[path]) for path in paths],
            mirrored.piece_length,
            {path.relative_to(name): it for path, it in hashes.items()},
            trackers=trackers,
            web_seeds=list(seeds),
        )
        mirrors = tuple(dict.fromkeys((source.address, *described.mirrors)))
        described = dataclasses.replace(described, mirrors=mirrors, measured=None)
        magnet, _ = put_out(described, made, target, start)
        shutil.rmtree(state, ignore_errors=True)
    click.echo(magnet)


def _name(address: str, known: Manifest | None) -> str:
    """The torrent's name: the manifest's, or that of the folder or repository in the URL."""
    found = re.search(r"/([^/?#]+?)(?:/resolve/[^/]+)?/\{path\}", address.partition("://")[2])
    name = found[1] if known is None and found else "" if known is None else known.name
    if not name or unsafe_name(name) is not None:
        raise click.UsageError("cannot take a name from the URL: give --name NAME")
    return name


def _below(manifest: Manifest, name: str) -> Manifest:
    """The manifest with all files below the torrent's top folder, under that name."""

    def place(path: PurePosixPath) -> PurePosixPath:
        inside = path.parts[1:] if path.parts[0] in (manifest.name, name) else path.parts
        return PurePosixPath(name, *inside)

    moved = manifest.moved({file.path: place(file.path) for file in manifest.files})
    return dataclasses.replace(moved, name=name)


def _listed(source: MirrorSource, name: str, described: Manifest | None) -> list[PurePosixPath]:
    if (source.listed is None) == (described is None):
        raise click.UsageError("list the files: give either --files LIST or --manifest FILE")
    if described is not None:
        return [file.path for file in described.files]
    assert source.listed is not None
    try:
        lines = source.listed.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SourceInvalid(f"cannot be read: {error}", path=source.listed) from None
    paths = [line.strip().removeprefix("./") for line in lines if line.strip()]
    for path in paths:
        reason = unsafe_name(path)
        if reason is not None:
            raise SourceInvalid(
                f"{path!r:.100} is not a plain relative path: {reason}",
                path=source.listed,
                hint="write one path per line, such as: ckpt-0/tensor00000_000",
            )
    if not paths:
        raise SourceInvalid("lists no file", path=source.listed, hint="write one path per line")
    return [PurePosixPath(name, path) for path in dict.fromkeys(paths)]


def _check_sizes(found: Mapping[PurePosixPath, Length], described: Manifest | None) -> None:
    for file in () if described is None else described.files:
        size = found[file.path][0]
        if size != file.size:
            raise Contradiction(
                f"has {size:,} bytes on the mirror, but {file.size:,} in the manifest",
                path=str(file.path),
                hint="name another mirror, or another manifest",
            )


def _frames(sizes: Mapping[PurePosixPath, int], config: Path | None) -> dict[PurePosixPath, Spans]:
    """The bytes of shards around the payload, which describe the tensors; none without shards."""
    homes = [path.parent for path in sizes if path.name == FIRST_SHARD]
    if not homes and config is None:
        return {}
    from loader.weights.inventory import expected

    home = homes[0] if homes else PurePosixPath()
    files, tensors = expected(read_config(config), home)
    kept: dict[PurePosixPath, list[int]] = {file.path: [0] for file in files if file.path in sizes}
    for tensor in tensors:
        if tensor.file in kept:
            for offset, length in tensor.spans():
                if length > 2 * SLACK:
                    kept[tensor.file] += (offset + SLACK, offset + length - SLACK)
    bounds = {path: [*inner, sizes[path]] for path, inner in kept.items()}
    return {path: tuple(zip(it[::2], it[1::2], strict=True)) for path, it in bounds.items()}


def _shown(
    state: Path, name: str, frames: Mapping[PurePosixPath, Spans], config: Path | None
) -> Manifest:
    """The manifest that the frames describe; without frames, one of plain files."""
    if not frames and config is None:
        return Manifest(name, ())
    folder = state / FRAMES / name
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return describe(folder, config)


def _together(known: Manifest | None, shown: Manifest) -> Manifest:
    """The given manifest, with the tensors that the frames describe."""
    if known is None:
        return shown
    return dataclasses.replace(known, tensors=shown.tensors, model=shown.model or known.model)


def _web_seed(address: str, name: str) -> str:
    """The URL in a form that every client understands if there is one, else with `{path}`.

    A client appends the torrent's name and the path of a file (BEP 19).
    """
    folder = f"/{name}/{PATH}"
    return address.removesuffix(folder.removeprefix("/")) if address.endswith(folder) else address
