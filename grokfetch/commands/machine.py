"""Whether this machine can run a model, by its memory, devices and limits; not a command."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from grokfetch.errors import MeshInvalid
from grokfetch.manifest.schema import Manifest
from grokfetch.open_files import most_open_files, open_files_for
from grokfetch.process_limits import address_space, most_memory
from grokfetch.units import bytes_text
from loader.devices.present import Device, devices
from loader.weights import capacity
from loader.weights.limits import WORK
from loader.weights.partition import choose_mesh
from loader.weights.schema import GrokConfig

__all__ = ["Machine", "Share", "mapped", "shares", "this_machine", "verdict"]

DEVICE_COUNTS = (1, 2, 4, 8, 16, 32, 64)


@dataclasses.dataclass(frozen=True, slots=True)
class Share:
    """Bytes that each of a number of devices holds, and whether that works here, or why not.

    `cache` is the KV cache of one full context in bfloat16, `work` the temporary memory of a step.
    `mesh` is empty if no mesh divides the model.
    """

    devices: int
    mesh: str
    weights: int
    cache: int
    work: int
    fits: bool | None
    why: str


@dataclasses.dataclass(frozen=True, slots=True)
class Machine:
    """Bytes of memory that this process may use, the devices of this machine, and limits.

    open_files: how many files may be open at once. address_space: bytes that `ulimit -v` lets the
    process map, None for no limit.
    """

    memory: int
    devices: tuple[Device, ...]
    open_files: int
    address_space: int | None = None


def this_machine() -> Machine:
    """The machine on which this process runs."""
    space = address_space()
    limit = None if space is None else space[0]
    return Machine(most_memory(), devices(), most_open_files(), limit)


def shares(manifest: Manifest, machine: Machine) -> Iterator[Share]:
    """What each device holds, for each number of devices; nothing without a model.

    Raises:
        ManifestInvalid: the manifest's hyperparameters are not valid.
    """
    if manifest.model is None:
        return
    config = GrokConfig.from_mapping(manifest.model)
    for count in DEVICE_COUNTS:
        try:
            mesh = choose_mesh(config, count)
        except MeshInvalid as error:
            yield Share(count, "", 0, 0, 0, fits=False, why=error.what)
            continue
        each = capacity.need(capacity.Use(config, mesh, config.sequence_len))
        fits, why = verdict(count, each.total, machine)
        yield Share(count, str(mesh), each.weights, each.cache, each.work, fits, why)


def verdict(count: int, each: int, machine: Machine) -> tuple[bool | None, str]:
    """Whether `count` devices can hold `each` bytes here; None if that is unknown. Pure."""
    devices = machine.devices
    if not devices:
        if count > 1:
            return False, "no GPU or TPU here"
        if _limited(machine, each):
            return False, _limit_text(machine)
        fits = each <= machine.memory
        return fits, f"CPU, {bytes_text(machine.memory)} of memory"
    if count > len(devices):
        return False, f"{len(devices)} here"
    memory = [device.memory for device in devices[:count] if device.memory is not None]
    if len(memory) < count:
        return None, f"{devices[0].name}, memory unknown"
    return each <= min(memory), f"{devices[0].name}, {bytes_text(min(memory))}"


def mapped(shares: Sequence[Share], machine: Machine, shards: int) -> Share | None:
    """The share of a CPU that maps the weights' files, so that only the cache takes memory. Pure.

    Args:
        shares: as returned by `shares`.
        machine: this one.
        shards: the number of files that are mapped at once.
    """
    if not shares:
        return None
    single = shares[0]
    files = open_files_for(shards)
    if files > machine.open_files:
        why = f"needs {files:,} open files, {machine.open_files:,} are allowed: ulimit -Hn"
        return dataclasses.replace(single, fits=False, why=why)
    # A mapped file counts with all its bytes.
    if _limited(machine, single.weights + single.cache + WORK):
        return dataclasses.replace(single, fits=False, why=_limit_text(machine))
    fits = single.cache + WORK <= machine.memory
    memory = bytes_text(machine.memory)
    why = (
        f"{memory} of memory; weights beyond it are read from disk for each token"
        if single.weights > machine.memory
        else f"{memory} of memory, enough for all weights"
    )
    return dataclasses.replace(single, fits=fits, why=why if fits else f"{memory} of memory")


def _limited(machine: Machine, needed: int) -> bool:
    return machine.address_space is not None and needed > machine.address_space


def _limit_text(machine: Machine) -> str:
    return f"ulimit -v allows {bytes_text(machine.address_space or 0)}"
