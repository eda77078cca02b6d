"""What a Grok-1 checkpoint contains: one table, from which everything else is derived.

`GrokConfig` holds the hyperparameters (the defaults are the official model's). `OUTER` and `LAYER`
are the table: each kind of tensor with its name, its field in the model's parameters, the meaning
of each axis and how many rows of scales it has. `parameters(config)` makes every tensor of a
checkpoint from them, in file order. Index checks, manifests, placement and synthetic checkpoints
all read this table; shapes and names are written nowhere else.

Source of names, shapes and order: the official checkpoint, xai-org/grok-1 `model.py`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Literal

from grokfetch.errors import ManifestInvalid

__all__ = [
    "LAYER",
    "OUTER",
    "Axis",
    "GrokConfig",
    "Kind",
    "ParamSpec",
    "by_layer",
    "layer_prefix",
    "parameters",
    "shard_name",
    "weight_bytes",
]

Axis = Literal["vocab", "embed", "q_heads", "kv_heads", "expert", "ff", "router"]
"""The meaning of one dimension.

vocab: token ids. embed: the residual stream. q_heads, kv_heads: heads times head size.
expert: the expert a weight belongs to. ff: an expert's hidden width. router: the router's scores,
one per expert, which every device needs in full.
"""


SCALE_GROUPS = 8
"""Scale rows of a weight whose contracted axis was split over the 8 devices of training."""


@dataclasses.dataclass(frozen=True, slots=True)
class GrokConfig:
    """Hyperparameters under the names of the reference's configuration; defaults are Grok-1's.

    `key_size` is the size of one head; `sequence_len` the longest context in tokens;
    `widening_factor` gives the expert width through `ff_size`.
    """

    vocab_size: int = 128 * 1024
    pad_token: int = 0
    bos_token: int = 1
    eos_token: int = 2
    sequence_len: int = 8192
    output_multiplier_scale: float = 0.5773502691896257
    embedding_multiplier_scale: float = 78.38367176906169
    emb_size: int = 48 * 128
    widening_factor: float = 8
    key_size: int = 128
    num_q_heads: int = 48
    num_kv_heads: int = 8
    num_layers: int = 64
    attn_output_multiplier: float = 0.08838834764831845
    num_experts: int = 8
    num_selected_experts: int = 2

    def __post_init__(self) -> None:
        positive = (
            "vocab_size",
            "sequence_len",
            "emb_size",
            "key_size",
            "num_q_heads",
            "num_kv_heads",
            "num_layers",
            "num_experts",
            "num_selected_experts",
        )
        for name in positive:
            if getattr(self, name) < 1:
                raise ManifestInvalid(f"model.{name} must be at least 1")
        if not 0 < self.widening_factor < 1024:
            raise ManifestInvalid("model.widening_factor must lie between 0 and 1024")
        if self.num_q_heads % self.num_kv_heads:
            raise ManifestInvalid("model.num_q_heads must be a multiple of model.num_kv_heads")
        if self.num_selected_experts > self.num_experts:
            raise ManifestInvalid("model.num_selected_experts exceeds model.num_experts")
        if self.key_size % 2:
            raise ManifestInvalid("model.key_size must be even: rotary embeddings pair its halves")
        if self.num_q_heads * self.key_size % SCALE_GROUPS:
            raise ManifestInvalid(
                f"model.num_q_heads times model.key_size must be a multiple of {SCALE_GROUPS}"
            )
        for name in ("pad_token", "bos_token", "eos_token"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ManifestInvalid(f"model.{name} is not a token id of the vocabulary")

    @property
    def ff_size(self) -> int:
        """Hidden width of one expert: two thirds of the widened embedding, rounded up to 8."""
        width = int(self.widening_factor * self.emb_size) * 2 // 3
        return width + -width % 8

    @classmethod
    def from_mapping(cls, fields: Mapping[str, object]) -> GrokConfig:
        """The config with the given fields; keys that do not concern the forward pass are ignored.

        Every field but `bos_token` must be present, so that a misspelt one is noticed.

        Raises:
            ManifestInvalid: naming the field that is missing, of the wrong type, or out of range.
        """
        values: dict[str, int | float] = {}
        for field in dataclasses.fields(cls):
            if field.name not in fields:
                if field.name == "bos_token":
                    continue
                raise ManifestInvalid(f"model.{field.name} is missing")
            values[field.name] = _number(field.name, fields[field.name], whole=field.type == "int")
        return cls(**values)  # type: ignore[arg-type]  # each value was checked against its field

    def to_mapping(self) -> dict[str, int | float]:
        """The fields as a JSON object; `from_mapping` reads it back."""
        return dataclasses.asdict(self)


def _number(name: str, value: object, *, whole: bool) -> int | float:
    kinds = (int,) if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not math.isfinite(value):
        kind = "an integer" if whole else "a finite number"
        raise ManifestInvalid(f"model.{name} must be {kind}, not {value!r:.80}")
    return value


@dataclasses.dataclass(frozen=True, slots=True)
class ParamSpec:
    """One tensor of the checkpoint.

    A quantised tensor (`scale_groups` set) is int8 `[..., K, N]` with bfloat16 scales
    `[..., G, N]`: scale row g applies to the contiguous weight rows `g * K / G` to
    `(g + 1) * K / G`. G is 8 where training split the contracted axis over 8 devices, else 1.
    """

    name: str
    index: int
    shape: tuple[int, ...]
    dtype: Literal["float32", "int8"]
    axes: tuple[Axis, ...]
    scale_groups: int | None = None

    @property
    def file(self) -> str:
        """Name of the shard file, without its folder."""
        return shard_name(self.index)

    @property
    def layer(self) -> int | None:
        """The number of the decoder layer that it belongs to, None outside of all layers."""
        match = re.match(r"transformer/decoder_layer_(\d+)/", self.name)
        return None if match is None else int(match[1])

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """Shape of the bfloat16 scales, None where there are none."""
        if self.scale_groups is None:
            return None
        return (*self.shape[:-2], self.scale_groups, self.shape[-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the weight and its scales."""
        scales = 0 if self.scale_shape is None else 2 * math.prod(self.scale_shape)
        return math.prod(self.shape) * (1 if self.dtype == "int8" else 4) + scales


def weight_bytes(config: GrokConfig) -> int:
    """Bytes of all weights and scales of a model."""
    return sum(spec.nbytes for spec in parameters(config))


def shard_name(index: int) -> str:
    """The official name of the shard that holds tensor `index`."""
    return f"tensor{index:05d}_000"


@dataclasses.dataclass(frozen=True, slots=True)
class Kind:
    """A kind of tensor: one row of the table below.

    field: its name in `loader.devices.placement.Layer` or `Params`. name: its name in the official
    checkpoint, within its layer. axes: the meaning of each dimension, from which its size follows.
    scale_groups: as in `ParamSpec`, None for float32.
    """

    field: str
    name: str
    axes: tuple[Axis, ...]
    scale_groups: int | None = None

    def spec(self, config: GrokConfig, index: int, prefix: str = "") -> ParamSpec:
        """The tensor of this kind in a checkpoint of `config`."""
        shape = tuple(axis_size(config, axis) for axis in self.axes)
        dtype: Literal["float32", "int8"] = "float32" if self.scale_groups is None else "int8"
        return ParamSpec(prefix + self.name, index, shape, dtype, self.axes, self.scale_groups)


OUTER = (
    Kind("embedding", "language_model/in_out_embed/embeddings", ("vocab", "embed")),
    Kind("norm", "language_model/rms_norm/scale", ("embed",)),
)
"""The tensors outside of all layers, in file order."""

LAYER = (
    Kind("gate", "moe/linear/w", ("expert", "embed", "ff"), 1),
    Kind("down", "moe/linear_1/w", ("expert", "ff", "embed"), SCALE_GROUPS),
    Kind("up", "moe/linear_v/w", ("expert", "embed", "ff"), 1),
    Kind("key", "multi_head_attention/key/w", ("embed", "kv_heads"), 1),
    Kind("output", "multi_head_attention/linear/w", ("q_heads", "embed"), SCALE_GROUPS),
    Kind("query", "multi_head_attention/query/w", ("embed", "q_heads"), 1),
    Kind("value", "multi_head_attention/value/w", ("embed", "kv_heads"), 1),
    Kind("before_attention", "rms_norm/scale", ("embed",)),
    Kind("after_attention", "rms_norm_1/scale", ("embed",)),
    Kind("before_experts", "rms_norm_2/scale", ("embed",)),
    Kind("after_experts", "rms_norm_3/scale", ("embed",)),
    Kind("router", "router/w", ("embed", "router")),
)
"""The twelve tensors of a layer, in file order."""


def axis_size(config: GrokConfig, axis: Axis) -> int:
    """How many elements a dimension with that meaning has."""
    match axis:
        case "vocab":
            return config.vocab_size
        case "embed":
            return config.emb_size
        case "q_heads":
            return config.num_q_heads * config.key_size
        case "kv_heads":
            return config.num_kv_heads * config.key_size
        case "ff":
            return config.ff_size
        case "expert" | "router":
            return config.num_experts


def layer_prefix(number: int) -> str:
    """The prefix of the names of a layer's tensors."""
    return f"transformer/decoder_layer_{number}/"


@cache
def parameters(config: GrokConfig) -> tuple[ParamSpec, ...]:
    """Every tensor of a checkpoint of `config`, in file order.

    The order is that of JAX's sorted dictionary keys, hence layers sort as strings
    (0, 1, 10, 11, ..., 2, 20, ...) and names within a layer alphabetically.
    """
    prefixes = sorted(layer_prefix(number) for number in range(config.num_layers))
    kinds = [("", kind) for kind in OUTER]
    kinds += [(prefix, kind) for prefix in prefixes for kind in LAYER]
    return tuple(kind.spec(config, index, prefix) for index, (prefix, kind) in enumerate(kinds))


def by_layer(config: GrokConfig) -> list[ParamSpec]:
    """The same, those outside of all layers first, then layer by layer in number order."""
    return sorted(parameters(config), key=lambda spec: -1 if spec.layer is None else spec.layer)
