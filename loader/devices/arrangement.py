"""Which devices hold a model and how, decided before anything is loaded, and whether they can.

Importing this module does not import jax.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Literal

from grokfetch.cache_folder import cache_folder
from grokfetch.errors import OutOfReach
from grokfetch.process_limits import address_space
from grokfetch.units import bytes_text
from loader.devices.jax_environment import open_devices, require_jax
from loader.devices.memory import free_memory
from loader.weights.capacity import Memory, Shortage, Use, left, shortage
from loader.weights.limits import WORK, cache_bytes_per_token, cache_length
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig, weight_bytes

if TYPE_CHECKING:
    from loader.devices.placement import Mesh

__all__ = ["Arrangement", "CacheType", "Dtype", "Loading", "Placement", "advice", "arrange"]

Dtype = Literal["bfloat16", "float32"]
CacheType = Literal["bfloat16", "float16", "float32"]
Placement = Literal["mapped", "sharded"]

ITEM_SIZES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclasses.dataclass(frozen=True, slots=True)
class Loading:
    """How a model will be held.

    dtype: of the products. cache: dtype of the KV cache, None for that of the products. placement:
    None for what suits the devices. mesh: None for all devices. memory: bytes that mapped weights,
    cache and work may take together, None for what is free. prefix_cache: the most bytes for the
    beginnings of prompts; it gets half of what the model leaves free if that is less.
    """

    dtype: Dtype = "bfloat16"
    placement: Placement | None = None
    mesh: MeshShape | None = None
    memory: int | None = None
    prefix_cache: int = 0
    cache: CacheType | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the cache."""
        return ITEM_SIZES[self.cache or self.dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class Arrangement:
    """Where a model goes: its devices, how they hold the weights, and the other settings.

    prefix_cache: bytes available for the beginnings of prompts.
    """

    mesh: Mesh
    placement: Placement
    loading: Loading
    prefix_cache: int = 0

    @property
    def platform(self) -> str:
        """The kinds of the devices."""
        return "/".join(sorted({device.platform for device in self.mesh.devices.flat})).upper()


def arrange(config: GrokConfig, loading: Loading, tokens: int = 1) -> Arrangement:
    """Set up the devices for a model, and make sure that they can hold it.

    Call it in the main thread: it may be the first use of jax in this process.

    Args:
        config: the hyperparameters.
        loading: how it will be held.
        tokens: the longest context that will be generated; there must be memory for it.

    Raises:
        MeshInvalid: the devices cannot be arranged so.
        OutOfReach: there are no such devices, or weights, cache and work need more memory than they
            have, or mapped weights were asked for on devices that are not CPUs.
    """
    require_jax()
    from loader.devices import xla_setup
    from loader.devices.placement import check_shared, make_mesh

    xla_setup.keep_programs(cache_folder())
    xla_setup.use_memory()
    placement, shape = loading.placement, loading.mesh
    if placement == "mapped" or (placement is None and (shape is None or shape.only_model)):
        xla_setup.use_cores(config)
    open_devices()
    mesh = make_mesh(config, shape)
    only_cpus = all(device.platform == "cpu" for device in mesh.devices.flat)
    if placement is None:
        placement = "mapped" if MeshShape(**mesh.shape).only_model and only_cpus else "sharded"
    arrangement = Arrangement(mesh, placement, loading)
    if placement == "mapped" and not only_cpus:
        raise OutOfReach(
            f"mapped weights are for CPUs, and the devices are {arrangement.platform}",
            hint="use --placement sharded, or set JAX_PLATFORMS=cpu",
        )
    if placement == "mapped":
        check_shared(MeshShape(**mesh.shape))
    spare = _check_fit(config, arrangement, tokens)
    # Hosts that kept different prompts would not run the same steps.
    several = len(mesh.local_devices) < mesh.size
    return dataclasses.replace(
        arrangement, prefix_cache=0 if several else min(loading.prefix_cache, spare // 2)
    )


def _check_fit(config: GrokConfig, arrangement: Arrangement, tokens: int) -> int:
    """Refuse what cannot fit; the kernel would kill it without a message once memory is full.

    Returns:
        Bytes left on all devices of this host, a very large number if they do not report it.

    Raises:
        OutOfReach: what is needed and what is free, and the smallest change that helps.
    """
    memory = free_memory(arrangement.mesh.local_devices)
    if memory is None:
        return sys.maxsize
    if memory.sharers:
        _check_address_space(config, arrangement, tokens)
    use = Use(
        config,
        MeshShape(**arrangement.mesh.shape),
        min(tokens, config.sequence_len),
        ITEM_SIZES[arrangement.loading.dtype],
        cache_itemsize=arrangement.loading.itemsize,
        mapped=arrangement.placement == "mapped",
    )
    short = shortage(use, memory)
    if short is not None:
        each = "" if memory.sharers else " of each device"
        raise OutOfReach(
            f"the model takes {bytes_text(short.needed)} of memory{each},"
            f" {bytes_text(memory.free)} are free",
            hint=advice(short, memory),
        )
    spare = left(use, memory)
    # The limit for mapped weights may be less than what is free.
    allowed = arrangement.loading.memory
    if allowed is None or not memory.sharers:
        return spare
    return max(0, spare - max(0, memory.free - allowed))


def _check_address_space(config: GrokConfig, arrangement: Arrangement, tokens: int) -> None:
    """Refuse what `ulimit -v` does not allow to be mapped; XLA would end the process.

    Raises:
        OutOfReach: how much is needed and how much is left.
    """
    limits = address_space()
    if limits is None:
        return
    limit, left = limits
    places = cache_length(config, min(tokens, config.sequence_len))
    cache = cache_bytes_per_token(config, arrangement.loading.itemsize) * places
    needed = weight_bytes(config) + cache + WORK
    if needed > left:
        raise OutOfReach(
            f"the model takes {bytes_text(needed)} of address space, and of the"
            f" {bytes_text(limit)} that ulimit -v allows {bytes_text(left)} are left",
            hint="allow more: ulimit -v unlimited",
        )


def advice(short: Shortage, memory: Memory) -> str:
    """The smallest change that makes a model fit, in words."""
    if short.tokens is not None:
        return f"a context of {short.tokens:,} tokens would fit: prompt and --max-tokens together"
    if short.mapped:
        return "leave the weights in their files: --placement mapped"
    if short.mesh is not None:
        return f"{short.mesh.devices} such devices would do: --mesh {short.mesh}"
    if memory.sharers:
        return "fewer tokens or devices would not do; make memory free, or use another machine"
    return "leave the weights in their files, on the CPU: JAX_PLATFORMS=cpu"
