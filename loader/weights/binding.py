"""Compares the content of a file with the table of parameters and the manifest."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from grokfetch.errors import CheckpointInvalid, GrokfetchError, StorageFailed
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, ManifestTensor, Scales
from loader.weights.schema import GrokConfig, ParamSpec, parameters
from loader.weights.shard_reader import read_shard
from loader.weights.shard_values import Shard

__all__ = ["entries", "faults", "parameter_in", "stored_parameter"]


def faults(store: Store) -> Iterator[GrokfetchError]:
    """Every tensor whose file is not what the parameters and the manifest say, as an error.

    Files that are missing or have another size are skipped: reading the bytes back finds those. If
    the manifest describes no model, nothing is wrong.

    Raises:
        StateMissing: the folder has no manifest.
    """
    manifest = store.manifest()
    if manifest.model is None:
        return
    try:
        known = entries(manifest, GrokConfig.from_mapping(manifest.model))
    except GrokfetchError as error:
        yield error
        return
    for spec, entry, size in known:
        stamp = store.stamp(entry.file)
        if stamp is None or stamp.size != size:
            continue
        try:
            stored_parameter(store, spec, entry, size)
        except GrokfetchError as error:
            yield error


def stored_parameter(store: Store, spec: ParamSpec, entry: ManifestTensor, size: int) -> Shard:
    """The content of a parameter's file in the store, checked against the manifest.

    Args:
        store: the checkpoint directory.
        spec: the parameter.
        entry: the manifest's entry for it.
        size: of its file in bytes.

    Raises:
        StorageFailed: the file is missing or unreadable.
        ShardInvalid: it is not a shard.
        CheckpointInvalid: it holds something else; the message names expected and found.
    """
    path = store.payload(entry.file)
    _check_size(spec, path, size)
    shard = parameter_in(path, spec)
    _check_entry(path, shard, entry)
    return shard


def entries(manifest: Manifest, config: GrokConfig) -> list[tuple[ParamSpec, ManifestTensor, int]]:
    """Every parameter with its manifest entry and the size of its file in bytes.

    Raises:
        CheckpointInvalid: one of the two names a tensor that the other does not.
    """
    specs = parameters(config)
    sizes = {file.path: file.size for file in manifest.files}
    named = {entry.name: entry for entry in manifest.tensors}
    unknown = named.keys() - {spec.name for spec in specs}
    if unknown:
        raise CheckpointInvalid(f"the model has no tensor {min(unknown)}, but the manifest has")
    missing = [spec.name for spec in specs if spec.name not in named]
    if missing:
        raise CheckpointInvalid(f"the model has a tensor {missing[0]}, but the manifest has not")
    bound = ((spec, named[spec.name]) for spec in specs)
    return [(spec, entry, sizes[entry.file]) for spec, entry in bound]


def _check_size(spec: ParamSpec, path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise StorageFailed(f"cannot be read: {error.strerror}", path=path) from error
    if found != expected:
        raise CheckpointInvalid(
            f"the file of {spec.name} must have {expected:,} bytes, found {found:,}", path=path
        )


def _check_entry(path: Path, shard: Shard, entry: ManifestTensor) -> None:
    """Compare what the file holds with what its manifest says."""
    array, scales = shard.array, shard.scales
    found = dataclasses.replace(
        entry,
        dtype=array.dtype,
        shape=array.shape,
        offset=array.offset,
        scales=None if scales is None else Scales(scales.shape, scales.offset),
    )
    if found != entry:
        raise CheckpointInvalid(
            f"by the manifest {entry.name} must be {_describe_entry(entry)}, "
            f"found {_describe_entry(found)}",
            path=path,
        )


def _describe_entry(entry: ManifestTensor) -> str:
    shape = None if entry.scales is None else entry.scales.shape
    places = f"at {entry.offset:,}"
    if entry.scales is not None:
        places += f" and {entry.scales.offset:,}"
    return f"{_describe(entry.dtype, entry.shape, shape)} {places}"


def parameter_in(path: Path, spec: ParamSpec) -> Shard:
    """The content of a parameter's file.

    Raises:
        StorageFailed: the file is missing or unreadable.
        ShardInvalid: it is not a shard.
        CheckpointInvalid: it does not hold the parameter that it should.
    """
    shard = read_shard(path)
    expected = _describe(spec.dtype, spec.shape, spec.scale_shape)
    scale_shape = None if shard.scales is None else shard.scales.shape
    found = _describe(shard.array.dtype, shard.array.shape, scale_shape)
    spans = [shard.array] if shard.scales is None else [shard.array, shard.scales]
    if any(span.order == "F" for span in spans):
        found += " in Fortran order"
    if found != expected:
        raise CheckpointInvalid(f"{spec.name} must be {expected}, found {found}", path=path)
    return shard


def _describe(dtype: str, shape: tuple[int, ...], scale_shape: tuple[int, ...] | None) -> str:
    scales = "without scales" if scale_shape is None else f"with scales {scale_shape}"
    return f"{dtype} {shape} {scales}"
