"""Sizes that more than one room must agree on: of the cache, of a step, of the work beside them."""

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
"""Tokens that a cache has room for at least, where the model's context is not shorter still."""

SMALLEST_STEP = 16
"""Tokens that a prompt is padded to at least."""

LONGEST_STEP = 2048
"""Most tokens of a prompt that are read in one step; bounds the memory of activations."""

SHARED_STEP = 512
"""Most tokens of a prompt that are read between two tokens of other texts, and what is kept of one
as a whole for prompts that begin alike."""

PREFIX_CACHE = 10**9
"""Bytes for the beginnings of prompts where many are read: 3,000 tokens of Grok-1 in bfloat16."""

QUERY_BLOCK = 128
"""Tokens whose attention scores are in memory at once: `[B, heads, 128, S]` float32."""

GPU_SHARE = 0.9
"""Of a GPU's memory, what JAX is told to take; the rest is for the driver and libraries."""

WORK = 1 << 30
"""Bytes for activations, compiled programs and the interpreter; 0.5 GB were seen at full size."""


def cache_length(config: GrokConfig, tokens: int) -> int:
    """Tokens that a cache has room for where it must hold so many; see `rounded`."""
    return rounded(config, tokens, SMALLEST_CACHE)


def rounded(config: GrokConfig, tokens: int, smallest: int) -> int:
    """A size for so many tokens: a power of two from `smallest` on, at most the whole context.

    There are few such sizes, and so there are few compiled programs.
    """
    power = 1 << (max(tokens, 1) - 1).bit_length()
    return min(max(power, smallest), config.sequence_len)


def cache_bytes_per_token(config: GrokConfig, itemsize: int) -> int:
    """Bytes of keys and values of one token in all layers, elements of `itemsize` bytes."""
    return 2 * config.num_layers * config.num_kv_heads * config.key_size * itemsize
