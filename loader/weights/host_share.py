"""Which bytes of a checkpoint some devices of a mesh need: arithmetic, no arrays and no I/O.

A device needs its block of every weight. The rest of each file, frame and scales, is small and
always comes. If columns are split over devices, every piece of a torrent holds bytes for every
device; only blocks of whole experts or whole rows let a host fetch less.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath

from grokfetch.errors import MeshInvalid
from grokfetch.manifest.schema import ITEM_SIZES, Manifest, ManifestTensor
from loader.weights.partition import (
    MeshShape,
    Position,
    check_mesh,
    mesh_axes,
    positions,
    weight_block,
)
from loader.weights.schema import GrokConfig, ParamSpec, parameters

__all__ = ["Share", "Span", "file_spans", "runs", "share_of_host", "tensor_spans"]

Span = tuple[int, int]
"""Start and stop: bytes in a file, or indices along an axis."""


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """What the devices at some positions of a mesh hold of every tensor."""

    mesh: MeshShape
    positions: tuple[Position, ...]

    def __str__(self) -> str:
        order = list(positions(self.mesh))
        numbers = [order.index(at) for at in self.positions]
        held = (
            f"device {numbers[0]}" if len(numbers) == 1 else f"devices {numbers[0]}-{numbers[-1]}"
        )
        return f"{held} of {self.mesh}"


def share_of_host(mesh: MeshShape, host: int, hosts: int) -> Share:
    """What one of several hosts holds: all have the same number of devices, in mesh order.

    Raises:
        MeshInvalid: the hosts cannot have equally many devices, or there is no such host.
    """
    if not 0 <= host < hosts:
        raise MeshInvalid(
            f"of {hosts} hosts there is none with the number {host}",
            hint=f"--host-id goes from 0 to {hosts - 1}",
        )
    if mesh.devices % hosts:
        raise MeshInvalid(
            f"a mesh of {mesh.devices} devices cannot be shared by {hosts} hosts alike",
            hint="choose a mesh whose number of devices --num-hosts divides",
        )
    each = mesh.devices // hosts
    return Share(mesh, tuple(positions(mesh))[host * each : (host + 1) * each])


def file_spans(
    manifest: Manifest, config: GrokConfig, share: Share, gap: int
) -> dict[PurePosixPath, tuple[Span, ...]]:
    """The bytes of each file that a share needs; see `tensor_spans`.

    Raises:
        MeshInvalid: the mesh does not divide the model.
    """
    check_mesh(config, share.mesh)
    sizes = {file.path: file.size for file in manifest.files}
    specs = {spec.name: spec for spec in parameters(config)}
    return {
        entry.file: tuple(tensor_spans(specs[entry.name], entry, sizes[entry.file], share, gap))
        for entry in manifest.tensors
        if entry.name in specs
    }


def tensor_spans(
    spec: ParamSpec, entry: ManifestTensor, size: int, share: Share, gap: int
) -> list[Span]:
    """The bytes of a tensor's file that a share needs, in order.

    Args:
        spec: the tensor.
        entry: where it is in its file.
        size: of the file in bytes.
        share: whose blocks.
        gap: in bytes, at least 1; spans closer than this are joined. If it is the length of a
            piece, that adds no further pieces.
    """
    item = ITEM_SIZES[entry.dtype]
    _, length = next(entry.spans())
    parts = [(0, entry.offset), (entry.offset + length, size)]
    for cuts in _cuts(spec, share):
        for start, stop in runs(spec.shape, cuts, item, gap):
            parts.append((entry.offset + start, entry.offset + stop))
    return _joined(parts, gap)


def _cuts(spec: ParamSpec, share: Share) -> Iterator[list[list[Span]]]:
    """The share's blocks, as spans along each axis; it holds every combination of these."""
    places: defaultdict[int, set[int]] = defaultdict(set)
    for place in share.positions:
        places[place.expert].add(place.model)
    alike: defaultdict[frozenset[int], list[int]] = defaultdict(list)
    for expert, models in places.items():
        alike[frozenset(models)].append(expert)
    for held, experts in alike.items():
        blocks = [
            weight_block(spec, share.mesh, Position(*place))
            for place in itertools.product(experts, held)
        ]
        yield [
            _joined(((block[axis].start, block[axis].stop) for block in blocks), 1)
            for axis in range(len(mesh_axes(spec)))
        ]


def runs(shape: Sequence[int], cuts: Sequence[list[Span]], item: int, gap: int) -> list[Span]:
    """The spans, in bytes, of an array of items that the cuts along its axes select."""
    found, width = [(0, item)], item
    for size, spans in zip(reversed(shape), reversed(cuts), strict=True):
        first, last = found[0][0], found[-1][1]
        if len(found) == 1 and width - (last - first) < gap:
            # The gap between two neighbours is too short to count, or empty: one run.
            found = [(a * width + first, (b - 1) * width + last) for a, b in spans]
        else:
            found = [
                (place * width + start, place * width + stop)
                for a, b in spans
                for place in range(a, b)
                for start, stop in found
            ]
        found, width = _joined(found, gap), width * size
    return found


def _joined(parts: Iterable[Span], gap: int) -> list[Span]:
    """The same spans in order; those less than `gap` apart are joined."""
    joined: list[Span] = []
    for start, stop in sorted(parts):
        if start == stop:
            continue
        if joined and start - joined[-1][1] < gap:
            joined[-1] = (joined[-1][0], max(joined[-1][1], stop))
        else:
            joined.append((start, stop))
    return joined
