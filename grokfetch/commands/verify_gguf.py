"""`grokfetch verify FILE.gguf`: whether an export is the official checkpoint; no command."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

import click

from grokfetch.errors import Contradiction, Damaged, StorageFailed
from grokfetch.events import Finding, Progress
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, ManifestFile, parse
from grokfetch.manifest.shipped import shipped
from grokfetch.output.reporting import ended, reporter
from grokfetch.units import seconds_text
from loader.weights.schema import GrokConfig

__all__ = ["verify_gguf"]


def verify_gguf(path: Path, against: Path | None) -> None:
    """Rebuild every shard from a GGUF in memory and compare its sha256 with a manifest's.

    Prints a line for each finding.

    Args:
        path: the GGUF, the first file of a split one.
        against: a manifest, or a folder that has one; None for one that comes with grokfetch.

    Raises:
        Damaged: a shard is another one, or the manifest does not know its sha256.
        Contradiction: the manifest is of another model.
        CheckpointInvalid, Inexact, StorageFailed: as `loader.export.restoring.open_exported`.
    """
    from loader.export.restoring import digests, open_exported

    start = time.perf_counter()
    exported = open_exported(path)
    manifest = _manifest(exported.config, against)
    files = _files_by_tensor(manifest)
    total, done, proven, failures = manifest_bytes(files), 0, 0, 0
    with reporter("verify", findings_to_stdout=True) as sink:
        for rebuilt in digests(exported):
            file = files[rebuilt.spec.name]
            done += file.size
            if rebuilt.sha256 is not None and rebuilt.sha256 == file.sha256:
                proven += file.size
            else:
                failures += 1
                sink.take(_finding(file, rebuilt.spec.name, rebuilt.sha256, rebuilt.detail))
            sink.take(Progress(done, total))
    seconds = time.perf_counter() - start
    what = "" if manifest.measured is None else f" (measured on {manifest.measured})"
    ended(
        f"{proven:,} of {total:,} bytes of the shards of {manifest.name} proven, by the "
        f"manifest's sha256{what} in {seconds_text(seconds)}"
        + ("" if failures else ": these are its bytes"),
        seconds,
        total=total,
        proven=proven,
        failures=failures,
    )
    if failures:
        raise Damaged(
            f"findings: {failures}, bytes not proven: {total - proven:,}",
            path=path,
            hint="for what is unproven, name a manifest with every sha256: --against MANIFEST; "
            "grokfetch manifest DIR writes one for a folder",
        )


def manifest_bytes(files: Mapping[str, ManifestFile]) -> int:
    """Bytes of all shards."""
    return sum(file.size for file in files.values())


def _manifest(config: GrokConfig, against: Path | None) -> Manifest:
    model = config.to_mapping()
    if against is None:
        known = next((it for it in shipped() if it.model == model), None)
        if known is None:
            raise click.UsageError("no manifest of this model comes along: name one by --against")
        return known
    if against.is_dir():
        manifest = Store(against).manifest()
    else:
        try:
            manifest = parse(against.read_bytes(), str(against))
        except OSError as error:
            raise StorageFailed(f"cannot be read: {error.strerror}", path=against) from error
    if manifest.model is None or GrokConfig.from_mapping(manifest.model) != config:
        raise Contradiction(
            "this manifest is of another model", path=against, hint="name that of the GGUF's source"
        )
    return manifest


def _files_by_tensor(manifest: Manifest) -> dict[str, ManifestFile]:
    by_path: dict[PurePosixPath, ManifestFile] = {file.path: file for file in manifest.files}
    return {tensor.name: by_path[tensor.file] for tensor in manifest.tensors}


def _finding(file: ManifestFile, tensor: str, sha256: str | None, detail: str) -> Finding:
    if sha256 is None:
        return Finding("corrupt", file.path, None, tensor, detail)
    if file.sha256 is None:
        return Finding("unproven", file.path, None, tensor, "the manifest has no sha256 of it")
    return Finding(
        "corrupt", file.path, None, tensor, "the shard in the GGUF has not the manifest's sha256"
    )
