"""`grokfetch manifest`: describe a checkpoint that is already on disk."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.options import (
    config_option,
    folder_argument,
    plain_option,
    state_option,
)
from grokfetch.errors import (
    CheckpointInvalid,
    Damaged,
    ManifestInvalid,
    StorageFailed,
    storage_errors,
)
from grokfetch.folder.atomic import put
from grokfetch.folder.record import FileProof
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, ManifestFile, TokenizerSource, encode
from grokfetch.manifest.shipped import grok_1
from grokfetch.output.progress import Bar
from grokfetch.output.reporting import held
from grokfetch.output.terminal import plain
from grokfetch.torrent.read_back import CHUNK, FileResult, Hashers, sha256_of
from grokfetch.units import bytes_text
from loader.weights.schema import GrokConfig

if TYPE_CHECKING:
    from loader.weights.checkpoint import Checkpoint

FIRST_SHARD = "tensor00000_000"
TOKENIZER = PurePosixPath("tokenizer.model")
CONFIG = (
    '--config takes a JSON object like "model" in a manifest: {"vocab_size": 131072, ...}; '
    "leave it out for Grok-1"
)


@click.command(
    cls=Explained,
    examples=(
        "grokfetch manifest /data/grok-1",
        "grokfetch manifest my-model --config config.json --output my-model.json",
    ),
)
@folder_argument
@config_option
@click.option("--output", type=click.Path(path_type=Path), help="Write the manifest here as well.")
@plain_option
@state_option
def manifest(folder: Path, config: Path | None, output: Path | None, state: Path | None) -> None:
    """Write the manifest of the checkpoint in DIR, with the sha256 of every file.

    For files that `grokfetch fetch` did not download: afterwards they can be verified and run. The
    digests prove only that a file has not changed since.
    """
    store = Store(folder, state)
    checkpoint = find_checkpoint(folder, read_config(config))
    with held(store, exclusive=True):
        measured, proofs = _measure(store, _describe(store, checkpoint))
        store.save_manifest(measured)
        store.save_record(dataclasses.replace(store.record(), files=proofs))
    if output is not None:
        write_file(output, encode(measured))
    click.echo(
        f"{store.state / 'manifest.json'}: {len(measured.files)} files, "
        f"{len(measured.tensors)} tensors, {bytes_text(measured.size)}"
    )


def read_config(path: Path | None) -> GrokConfig:
    """The hyperparameters in a file; without a file, the official ones.

    Raises:
        ManifestInvalid: they are malformed.
    """
    if path is None:
        return GrokConfig()
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ManifestInvalid(f"is not valid JSON: {error}", path=path, hint=CONFIG) from None
    if not isinstance(fields, dict):
        raise ManifestInvalid("must be an object", path=path, hint=CONFIG)
    if "files" in fields:
        raise ManifestInvalid(
            "this is a manifest, but --config takes only hyperparameters",
            path=path,
            hint='save the object under "model" in it to a file, and name that file',
        )
    try:
        return GrokConfig.from_mapping(fields)
    except ManifestInvalid as error:
        raise ManifestInvalid(error.what, path=path, hint=CONFIG) from None


def find_checkpoint(folder: Path, config: GrokConfig) -> Checkpoint:
    """The checkpoint below a folder.

    Raises:
        CheckpointInvalid: there is none, or it does not match the config.
    """
    from loader.weights.checkpoint import open_folder

    homes = sorted({shard.parent for shard in folder.rglob(FIRST_SHARD)})
    if len(homes) != 1:
        listed = ", ".join(map(str, homes)) or "none"
        raise CheckpointInvalid(
            f"exactly one folder must contain {FIRST_SHARD}, but these do: {listed}",
            path=folder,
            hint="name the folder of one checkpoint",
        )
    try:
        return open_folder(homes[0], config)
    except CheckpointInvalid as error:
        raise CheckpointInvalid(
            error.what, path=error.path, hint="is --config the config of this checkpoint?"
        ) from None


def _describe(store: Store, checkpoint: Checkpoint) -> Manifest:
    """The manifest of the checkpoint, without the digests that need reading the files."""
    from loader.weights.inventory import found

    official = grok_1()
    files, tensors = found(checkpoint, store.root)
    model = checkpoint.config.to_mapping()
    base = official if model == official.model else Manifest(store.root.resolve().name, ())
    fetched = _fetched(store)
    names = {file.path for file in files}
    extra = () if fetched is None else [file for file in fetched.files if file.path not in names]
    return dataclasses.replace(
        base,
        files=(*_with_known_digests(files, base), *extra),
        tensors=tensors,
        model=model,
        tokenizer=base.tokenizer or _tokenizer(store.root),
        info_hash=None if fetched is None else fetched.info_hash,
        magnet=None if fetched is None else fetched.magnet,
        measured=None if fetched is not None else f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
    )


def _fetched(store: Store) -> Manifest | None:
    """The manifest of a folder fetched by torrent, of which everything must be proven.

    Otherwise its info hash must not be combined with digests measured here.
    """
    if store.torrent() is None:
        return None
    store.require_all()
    return store.manifest()


def _with_known_digests(files: Sequence[ManifestFile], base: Manifest) -> list[ManifestFile]:
    digests = {file.path.name: file.sha256 for file in base.files}
    return [dataclasses.replace(file, sha256=digests.get(file.path.name)) for file in files]


def _tokenizer(root: Path) -> TokenizerSource | None:
    path = root / TOKENIZER
    if not path.is_file():
        return None

    digest = sha256_of(path, memoryview(bytearray(CHUNK)))
    if digest.sha256 is None:
        raise StorageFailed(f"cannot be read: {digest.detail}", path=path)
    return TokenizerSource(TOKENIZER, path.stat().st_size, digest.sha256)


def _measure(
    store: Store, described: Manifest
) -> tuple[Manifest, Mapping[PurePosixPath, FileProof]]:
    """The manifest with the digest of every file, and the proofs that follow from it.

    Raises:
        Damaged: the sha256 of a file is not the published one.
        StorageFailed: a file cannot be read, or changed while it was read.
    """

    def hashed(file: ManifestFile, buffer: memoryview) -> tuple[ManifestFile, FileProof]:
        path = store.payload(file.path)
        before = store.stamp(file.path)
        result: FileResult = sha256_of(path, buffer)
        if result.sha256 is None or before is None:
            raise StorageFailed(f"cannot be read: {result.detail}", path=path)
        if store.stamp(file.path) != before:
            raise StorageFailed("it changed while it was read", path=path)
        if file.sha256 not in (None, result.sha256):
            raise Damaged(
                f"its sha256 is {result.sha256}, but the published one is {file.sha256}",
                path=path,
                hint="get this file again",
            )
        return dataclasses.replace(file, sha256=result.sha256), FileProof(before, result.sha256)

    measured: dict[PurePosixPath, tuple[ManifestFile, FileProof]] = {}
    done = 0
    hashers: Hashers[tuple[ManifestFile, FileProof]] = Hashers()
    with Bar("hash", plain=plain()) as bar, hashers:
        for file, proof in hashers.run(partial(hashed, file) for file in described.files):
            measured[file.path] = (file, proof)
            done += file.size
            bar.show(done, described.size)
    files = tuple(measured[file.path][0] for file in described.files)
    proofs = {path: proof for path, (_, proof) in measured.items()}
    return dataclasses.replace(described, files=files), proofs


def write_file(path: Path, text: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        StorageFailed: it cannot be written.
    """
    with storage_errors(path):
        put(path, text)
