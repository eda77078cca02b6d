"""A synthetic checkpoint with every name and size of the official one, on a disk too small for it.

Run: python benchmarks/full_size.py DIR. Random weights for the embedding, the final norm and N
layers are written in full: 8.1 GB with one layer, and 4.9 GB for each further one. Any other layer
l consists of hard links to the files of layer l mod N. Every file is hashed and recorded as by
`grokfetch manifest`, linked ones once, so that `grokfetch run DIR` finds everything proven and
`grokfetch verify DIR` can read all of it back.

Everything measured with it is synthetic. Hard links share the page cache: one layer fits in the
memory of a laptop, the 318 GB of the real files do not. Weights are read from the disk, as the real
ones would be, only if there are more distinct layers than memory holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath

from grokfetch.errors import GrokfetchError, StorageFailed
from grokfetch.folder.record import FileProof, Record
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest
from grokfetch.manifest.shipped import grok_1
from grokfetch.output.progress import Bar
from grokfetch.torrent.read_back import Hashers, sha256_of
from grokfetch.units import bytes_text, seconds_text
from loader.weights.checkpoint import open_checkpoint
from loader.weights.inventory import expected
from loader.weights.schema import GrokConfig, ParamSpec, parameters
from loader.weights.synthetic import write_tensor

NAME = "grok-1-synthetic"
SHARDS = PurePosixPath("ckpt-0")
LAYER = "decoder_layer_"


def main() -> None:
    """Write the checkpoint, or say that it is there."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", metavar="DIR", type=Path)
    options.add_argument("--distinct-layers", metavar="N", type=int, default=1)
    chosen = options.parse_args()
    config = GrokConfig()
    if not 1 <= chosen.distinct_layers <= config.num_layers:
        options.error(f"--distinct-layers must be 1 to {config.num_layers}")
    start = time.perf_counter()
    try:
        manifest, distinct = make(
            Store(chosen.folder), describe(config), config, chosen.distinct_layers
        )
    except GrokfetchError as error:
        sys.exit(str(error))
    print(
        f"{chosen.folder}: {len(manifest.files)} files, {bytes_text(manifest.size)}, "
        f"{bytes_text(distinct)} of them distinct, in {seconds_text(time.perf_counter() - start)}"
    )


def describe(config: GrokConfig) -> Manifest:
    """The manifest of the checkpoint, without digests. Names and sizes are the official ones."""
    official = grok_1()
    files, tensors = expected(config, SHARDS)
    assert tensors == official.tensors
    assert [(file.path, file.size) for file in files] == [
        (file.path, file.size) for file in official.files
    ]
    # No magnet link, no mirror and no info hash: nobody else has these files.
    return Manifest(
        NAME,
        files,
        tensors=tensors,
        model=config.to_mapping(),
        tokenizer=official.tokenizer,
        measured=f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
    )


def make(store: Store, wanted: Manifest, config: GrokConfig, layers: int) -> tuple[Manifest, int]:
    """Write what is not there yet, link the rest, record all.

    Args:
        store: an empty folder, or one that this function has begun or finished.
        wanted: the manifest without digests.
        config: the model.
        layers: how many have files of their own.

    Returns:
        The manifest with digests, and the bytes that the files take on the disk.

    Raises:
        StorageFailed: the folder holds something else, or the disk has not the room.
    """
    specs = parameters(config)
    origin = origins(specs, layers)
    sources = [spec for spec in specs if origin[spec.index] == spec.index]
    sizes = [file.size for file in wanted.files]
    distinct = sum(sizes[spec.index] for spec in sources)
    present = store.manifest_or_none()
    if present is None and store.root.exists() and any(store.root.iterdir()):
        raise StorageFailed("not a new or empty folder", path=store.root, hint="choose another one")
    if present is not None and present.name != NAME:
        raise StorageFailed(f"holds {present.name}", path=store.root, hint="choose another folder")
    with store.lock():
        if finished(store, specs, origin):
            print("it is there already")
            return store.manifest(), distinct
        store.save_record(Record())
        # From here on the name identifies this folder, in case writing is interrupted.
        store.save_manifest(wanted)
        store.root.joinpath(SHARDS).mkdir(exist_ok=True)
        missing = list(unwritten(store, sources, sizes))
        check_room(store.root, sum(sizes[spec.index] for spec in missing))
        proofs = write(store, config, sources, {spec.index for spec in missing}, sizes)
        link(store, specs, origin)
        files = tuple(
            dataclasses.replace(file, sha256=proofs[origin[index]].sha256)
            for index, file in enumerate(wanted.files)
        )
        made = dataclasses.replace(wanted, files=files)
        store.save_manifest(made)
        recorded = {file.path: proofs[origin[index]] for index, file in enumerate(files)}
        store.save_record(Record(files=recorded))
        open_checkpoint(store)
    return made, distinct


def origins(specs: Sequence[ParamSpec], layers: int) -> list[int]:
    """For each tensor the index of the one whose file it shares; its own if it has one."""
    index = {spec.name: spec.index for spec in specs}
    return [index[_origin(spec.name, layers)] for spec in specs]


def _origin(name: str, layers: int) -> str:
    before, found, after = name.partition(LAYER)
    if not found:
        return name
    layer, _, rest = after.partition("/")
    return f"{before}{LAYER}{int(layer) % layers}/{rest}"


def finished(store: Store, specs: Sequence[ParamSpec], origin: Sequence[int]) -> bool:
    """Whether everything is proven, and exactly the right files are links of each other."""
    if store.manifest_or_none() is None:
        return False
    try:
        open_checkpoint(store)
    except GrokfetchError:
        return False
    nodes = [shard(store, spec).stat().st_ino for spec in specs]
    own = {nodes[index] for index in origin}
    return len(own) == len(set(origin)) and nodes == [nodes[index] for index in origin]


def unwritten(
    store: Store, sources: Sequence[ParamSpec], sizes: Sequence[int]
) -> Iterator[ParamSpec]:
    """The tensors that have no file of their own yet. A file is renamed into place when whole."""
    nodes: set[int] = set()
    for spec in sources:
        path = shard(store, spec)
        if not path.exists() or path.stat().st_size != sizes[spec.index]:
            yield spec
            continue
        node = path.stat().st_ino
        # If the folder had fewer distinct layers before, it may be a link to an earlier one.
        if node in nodes:
            yield spec
        nodes.add(node)


def check_room(folder: Path, needed: int) -> None:
    """Refuse to begin if there is not enough room.

    Raises:
        StorageFailed: the disk has less than `needed` bytes free.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise StorageFailed(
            f"{bytes_text(needed)} must be written, {bytes_text(free)} are free",
            path=folder,
            hint="choose fewer --distinct-layers",
        )


def write(
    store: Store,
    config: GrokConfig,
    sources: Sequence[ParamSpec],
    missing: set[int],
    sizes: Sequence[int],
) -> Mapping[int, FileProof]:
    """Write the missing files and hash all, on all cores; the proof of each by its index."""

    def work(spec: ParamSpec, buffer: memoryview) -> tuple[int, FileProof]:
        path = shard(store, spec)
        if spec.index in missing:
            partial_path = path.with_name(f"{path.name}.partial")
            assert write_tensor(partial_path, spec, config) == sizes[spec.index]
            with partial_path.open("rb") as file:
                os.fsync(file.fileno())
            partial_path.replace(path)
        stamp = store.stamp(SHARDS / spec.file)
        result = sha256_of(path, buffer)
        if stamp is None or result.sha256 is None:
            raise StorageFailed(f"cannot be read: {result.detail}", path=path)
        return spec.index, FileProof(stamp, result.sha256)

    proofs: dict[int, FileProof] = {}
    total = sum(sizes[spec.index] for spec in sources)
    done = 0
    hashers: Hashers[tuple[int, FileProof]] = Hashers()
    with Bar("write") as bar, hashers:
        for index, proof in hashers.run(partial(work, spec) for spec in sources):
            proofs[index] = proof
            done += sizes[index]
            bar.show(done, total)
    return proofs


def link(store: Store, specs: Sequence[ParamSpec], origin: Sequence[int]) -> None:
    """Hard links for all tensors without a file of their own."""
    for spec in specs:
        path, source = shard(store, spec), shard(store, specs[origin[spec.index]])
        if spec.index != origin[spec.index] and not (path.exists() and path.samefile(source)):
            path.unlink(missing_ok=True)
            path.hardlink_to(source)


def shard(store: Store, spec: ParamSpec) -> Path:
    """Where the file of a tensor lies."""
    return store.payload(SHARDS / spec.file)


if __name__ == "__main__":
    main()
