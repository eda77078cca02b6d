"""Sizes that several packages must agree on: of the cache, of a step, of other work."""

from __future__ import annotations

from loader.weights.schema import GrokConfig

__all__ = [
    "GPU_SHARE",
    "LONGEST_STEP",
    "PREFIX_CACHE",
    "QUERY_BLOCK",
    "SHARED_STEP",
    "SMALLEST_CACHE",
    "SMALLEST_STEP",
    "WORK",
    "cache_bytes_per_token",
    "cache_length",
    "rounded",
]

SMALLEST_CACHE = 256
"""The fewest tokens that a cache has room for, unless the model's context is shorter."""

SMALLEST_STEP = 16
"""The fewest tokens that a prompt is padded to."""

LONGEST_STEP = 2048
"""The most tokens of a prompt read in one step; limits the memory of activations."""

SHARED_STEP = 512
"""The most tokens of a prompt read between two tokens of other texts, and the unit kept for prompts
with the same beginning."""

PREFIX_CACHE = 10**9
"""Bytes for the beginnings of prompts when many are read: 3,000 tokens of Grok-1 in bfloat16."""

QUERY_BLOCK = 128
"""Tokens whose attention scores are in memory at once: `[B, heads, 128, S]` float32."""

GPU_SHARE = 0.9
"""The share of a GPU's memory that JAX takes; the rest is for the driver and libraries."""

WORK = 1 << 30
"""Bytes for activations, compiled programs and the interpreter; 0.5 GB was seen at full size."""


def cache_length(config: GrokConfig, tokens: int) -> int:
    """Tokens that a cache has room for if it must hold so many; see `rounded`."""
    return rounded(config, tokens, SMALLEST_CACHE)


def rounded(config: GrokConfig, tokens: int, smallest: int) -> int:
    """A size for so many tokens: a power of two from `smallest` on, at most the whole context.

    There are few such sizes, so few programs are compiled.
    """
    power = 1 << (max(tokens, 1) - 1).bit_length()
    return min(max(power, smallest), config.sequence_len)


def cache_bytes_per_token(config: GrokConfig, itemsize: int) -> int:
    """Bytes of keys and values of one token in all layers, elements of `itemsize` bytes."""
    return 2 * config.num_layers * config.num_kv_heads * config.key_size * itemsize
