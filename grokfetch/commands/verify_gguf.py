"""`grokfetch verify FILE.gguf`: whether a GGUF holds the official checkpoint; not a command."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from grokfetch.errors import Contradiction, Damaged, StorageFailed
from grokfetch.events import Finding, Progress
from grokfetch.folder.store import Store
from grokfetch.folder.verify import TensorIndex, corrupt
from grokfetch.manifest.match import in_force
from grokfetch.manifest.schema import Manifest, ManifestFile, parse
from grokfetch.manifest.shipped import shipped
from grokfetch.output.reporting import ended, reporter
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import TorrentFile, parse_torrent
from grokfetch.units import seconds_text
from loader.weights.schema import GrokConfig, parameters

if TYPE_CHECKING:
    from loader.export.restoring import Exported

__all__ = ["verify_gguf"]


@dataclasses.dataclass(frozen=True, slots=True)
class _Official:
    """What the shards must match: their manifest, and perhaps a torrent with piece hashes."""

    manifest: Manifest
    torrent: TorrentFile | None = None
    layout: Layout | None = None

    @property
    def files(self) -> dict[str, ManifestFile]:
        """The shard of each tensor."""
        by_path = {file.path: file for file in self.manifest.files}
        return {tensor.name: by_path[tensor.file] for tensor in self.manifest.tensors}

    @property
    def proof(self) -> str:
        """The hashes that decide: of pieces, if they are known and the manifest lacks a sha256."""
        if self.torrent is not None and any(file.sha256 is None for file in self.files.values()):
            return f"the piece hashes of torrent {self.torrent.info_hash}"
        measured = self.manifest.measured
        return "the manifest's sha256" + ("" if measured is None else f" (measured on {measured})")


def verify_gguf(path: Path, against: Path | None) -> None:
    """Rebuild every shard from a GGUF in memory, and compare its hash with the known one.

    Prints a line for each finding.

    Args:
        path: the GGUF; if it is split, its first file.
        against: a manifest, a torrent, or a folder that has them; None for a manifest that comes
            with grokfetch.

    Raises:
        Damaged: a shard differs, or its hash is not known.
        Contradiction: the manifest or the torrent is of another model, or the GGUF is padded.
        CheckpointInvalid, Inexact, StorageFailed: as `loader.export.restoring.open_exported`.
    """
    from loader.export.restoring import open_exported

    start = time.perf_counter()
    exported = open_exported(path)
    official = _official(exported.config, against)
    name, total = official.manifest.name, sum(file.size for file in official.files.values())
    done, proven, failures = 0, 0, 0
    check = _by_sha256 if "sha256" in official.proof else _by_pieces
    with reporter("verify", findings_to_stdout=True) as sink:
        for nbytes, findings in check(exported, official):
            done += nbytes
            proven += 0 if findings else nbytes
            failures += len(findings)
            for finding in findings:
                sink.take(finding)
            sink.take(Progress(done, total))
    seconds = time.perf_counter() - start
    ended(
        f"{proven:,} of {total:,} bytes of the shards of {name} proven, by {official.proof} in "
        f"{seconds_text(seconds)}" + ("" if failures else ": it holds exactly these bytes"),
        seconds,
        total=total,
        proven=proven,
        failures=failures,
    )
    if failures:
        raise Damaged(
            f"findings: {failures}, bytes not proven: {total - proven:,}",
            path=path,
            hint="to prove the rest, give --against a fetched folder, its torrent, or a manifest "
            "with every sha256",
        )


def _by_sha256(exported: Exported, official: _Official) -> Iterator[tuple[int, Sequence[Finding]]]:
    """The size of each shard, and its findings."""
    from loader.export.restoring import digests

    files = official.files
    for rebuilt in digests(exported):
        file = files[rebuilt.spec.name]
        right = rebuilt.sha256 is not None and rebuilt.sha256 == file.sha256
        finding = _finding(file, rebuilt.spec.name, rebuilt.sha256, rebuilt.detail)
        yield file.size, () if right else (finding,)


def _by_pieces(exported: Exported, official: _Official) -> Iterator[tuple[int, Sequence[Finding]]]:
    """The number of bytes of shards in each piece, and its findings."""
    from loader.export.by_pieces import check_pieces, rebuildable

    layout, files = official.layout, official.files
    assert layout is not None
    shards = {files[spec.name].path: spec for spec in parameters(exported.config)}
    tensors = TensorIndex(official.manifest)
    own = {
        piece: [part for part in layout.segments(piece) if part.file.path in shards]
        for path in shards
        if (file := layout.file(path)) is not None
        for piece in layout.pieces_over(file)
    }
    sizes = {piece: sum(part.length for part in parts) for piece, parts in own.items()}
    whole = rebuildable(layout, shards)
    for result in check_pieces(exported, layout, shards, whole):
        good = result.verdict == "good"
        yield sizes[result.piece], () if good else tuple(corrupt(layout, result, tensors))
    for piece in own.keys() - set(whole):
        other = next(it for it in layout.files_over((piece,)) if it.path not in shards)
        why = f"piece {piece} also contains bytes of {other.path}, which a GGUF does not have"
        path = own[piece][0].file.path
        yield sizes[piece], (Finding("unproven", path, piece, detail=why),)


def _official(config: GrokConfig, against: Path | None) -> _Official:
    from loader.export.padding import padded_config

    if against is None:
        known = next((it for it in shipped() if it.model == config.to_mapping()), None)
        if known is None:
            raise click.UsageError("no manifest of this model is shipped: name one with --against")
        return _Official(known)
    if against.is_dir():
        store = Store(against)
        official = _Official(store.manifest(), store.torrent(), store.layout())
    else:
        official = _in_file(config, against)
    model = official.manifest.model
    of = None if model is None else GrokConfig.from_mapping(model)
    if of == config:
        return official
    if of is not None and padded_config(of) == config:
        raise Contradiction(
            "the GGUF was padded by --pad, so no shards can be rebuilt from it",
            path=against,
            hint="to check that it has not changed: grokfetch verify FOLDER, with its folder",
        )
    raise Contradiction(
        "this manifest is of another model",
        path=against,
        hint="name the manifest of the GGUF's source",
    )


def _in_file(config: GrokConfig, path: Path) -> _Official:
    """What a manifest or a torrent says, with the torrent beside a manifest if there is one."""
    from loader.weights.inventory import expected

    data = _read(path)
    beside = path.with_suffix(".torrent")
    if data.startswith(b"d"):
        files, tensors = expected(config, PurePosixPath("ckpt-0"))
        manifest = Manifest("this model", files, tensors=tensors, model=config.to_mapping())
        torrent = parse_torrent(data)
    else:
        manifest = parse(data, str(path))
        if not beside.is_file() or not (torrent := parse_torrent(_read(beside))).known_as(
            manifest.info_hash
        ):
            return _Official(manifest)
    layout = parse_info(torrent.info, torrent.piece_layers)
    return _Official(in_force(manifest, torrent, layout, None), torrent, layout)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StorageFailed(f"cannot be read: {error.strerror}", path=path) from error


def _finding(file: ManifestFile, tensor: str, sha256: str | None, detail: str) -> Finding:
    if sha256 is None:
        return Finding("corrupt", file.path, None, tensor, detail)
    if file.sha256 is None:
        return Finding("unproven", file.path, None, tensor, "the manifest has no sha256 for it")
    return Finding(
        "corrupt",
        file.path,
        None,
        tensor,
        "the shard in the GGUF differs from the manifest's sha256",
    )
