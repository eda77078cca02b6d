"""A checkpoint's entries in a manifest: derived from the schema alone, or read from a folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from grokfetch.manifest.schema import ManifestFile, ManifestTensor
from loader.weights.checkpoint import Checkpoint
from loader.weights.headers import entry
from loader.weights.schema import GrokConfig, parameters
from loader.weights.shard_reader import Shard
from loader.weights.shard_writer import frame_layout

__all__ = ["expected", "found"]


def expected(
    config: GrokConfig, folder: PurePosixPath
) -> tuple[tuple[ManifestFile, ...], tuple[ManifestTensor, ...]]:
    """Files and tensors of a checkpoint as the official pickler writes it, without any data.

    Args:
        config: the model.
        folder: where the shards are, relative to the checkpoint folder.
    """
    files, tensors = [], []
    for spec in parameters(config):
        layout = frame_layout(spec.dtype, spec.shape, spec.scale_shape)
        files.append(ManifestFile(folder / spec.file, layout.size))
        tensors.append(entry(spec.name, folder / spec.file, layout.shard))
    return tuple(files), tuple(tensors)


def found(
    checkpoint: Checkpoint, root: Path
) -> tuple[tuple[ManifestFile, ...], tuple[ManifestTensor, ...]]:
    """Files and tensors of a checkpoint on disk, with paths relative to `root`; no digests yet.

    Raises:
        OSError: a file has gone since the checkpoint was opened.
    """
    files, tensors = [], []
    for tensor in checkpoint.values():
        path = PurePosixPath(tensor.path.relative_to(root).as_posix())
        files.append(ManifestFile(path, tensor.path.stat().st_size))
        tensors.append(entry(tensor.spec.name, path, Shard(tensor.array, tensor.scale_span)))
    return tuple(files), tuple(tensors)
