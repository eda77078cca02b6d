"""What is lost if activations are rounded to bfloat16 before they are multiplied.

Run: python benchmarks/precision.py, on any CPU: it multiplies as accelerators do. It uses two small
models: the golden checkpoint, on random tokens, and the demo's, which has learnt a text, on that
text. Each part of the model is rounded alone while everything else is multiplied in two halves; the
first line has no part rounded. All are compared with float32 as computed by prefill, where a
prompt's own keys and values are not rounded. The last lines are for decoding in float32 with a
rounded cache.

logits: mean distance, relative to their standard deviation. KL: mean divergence of the next token's
probabilities, in millinats. other token: positions with another most probable token. other experts:
of all tokens and layers, those that were sent to other experts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from loader.devices.arrangement import CacheType
from loader.devices.placement import load, make_mesh
from loader.devices.products import Quantized, dots, product
from loader.inference import experts, model
from loader.inference.engine import Engine
from loader.inference.model import KeyValues, Window
from loader.inference.steps import steps_for
from loader.inference.tokenizer import Tokenizer
from loader.weights.checkpoint import open_folder
from loader.weights.partition import MeshShape
from loader.weights.schema import GrokConfig

ROOT = Path(__file__).parents[1]
GOLDEN, DEMO = ROOT / "tests/data/tiny", ROOT / "demo/published"
ROWS, TOKENS = 16, 96


def rounded(x: Array) -> Array:
    """float32 values rounded to bfloat16."""
    return lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _rounded_product(x: Array, weights: Any, dtype: Any, **_: bool) -> Array:
    return product(x, weights, dtype, halves=False)


def _halved_product(x: Array, weights: Any, dtype: Any, **_: bool) -> Array:
    return product(x, weights, dtype)


def _dots(x: Array, table: Any) -> Array:
    return dots(rounded(x), rounded(table))


_attend: Any = model._attend  # noqa: SLF001


def _scores(queries: Array, held: KeyValues, window: Window, config: GrokConfig) -> Array:
    return _attend(queries, jax.tree.map(lambda it: it.astype(jnp.bfloat16), held), window, config)


PARTS: dict[str, tuple[Any, str, Callable[..., Array]]] = {
    "projections": (model, "product", _rounded_product),
    "scores": (model, "_attend", _scores),
    "experts": (experts, "product", _rounded_product),
    "logits": (model, "dots", _dots),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Logits `[N, V]`, and the experts chosen, `[layers, N, chosen]`, in order of their number."""

    logits: np.ndarray[Any, Any]
    chosen: np.ndarray[Any, Any]


class Chosen:
    """Collects the experts that each layer chose."""

    def __init__(self) -> None:
        self.layers: list[np.ndarray[Any, Any]] = []

    def add(self, _number: int, choices: Any, _real: Any) -> None:
        """Keep one layer's."""
        self.layers.append(np.sort(np.asarray(choices), axis=-1))


def ran(checkpoint: Any, tokens: np.ndarray[Any, Any], dtype: str, parts: tuple[str, ...]) -> Run:
    """All tokens of some rows at once, with some parts rounded."""
    config = checkpoint.config
    # In bfloat16 the multipliers are rounded as in training, which is not what is measured here.
    config = dataclasses.replace(
        config,
        embedding_multiplier_scale=float(jnp.bfloat16(config.embedding_multiplier_scale)),
        output_multiplier_scale=float(jnp.bfloat16(config.output_multiplier_scale)),
    )
    mesh = make_mesh(config, MeshShape(), jax.devices()[:1])
    params = jax.tree.map(
        lambda it: dataclasses.replace(it, tuning=None) if isinstance(it, Quantized) else it,
        load(checkpoint, mesh),
        is_leaf=lambda it: isinstance(it, Quantized),
    )
    rows, length = tokens.shape
    everywhere = np.ones(tokens.shape, bool)
    window = Window(
        np.tile(np.arange(length, dtype=np.int32), (rows, 1)), everywhere, everywhere, fresh=True
    )
    shape = (rows, length, config.num_kv_heads, config.key_size)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(experts, "product", _halved_product))
        for place, name, function in (PARTS[part] for part in parts):
            patches.enter_context(mock.patch.object(place, name, function))
        steps = steps_for(config, params, mesh, jnp.dtype(dtype), None)
        chosen = Chosen()
        steps.choices = chosen  # type: ignore[assignment]
        cache = [KeyValues(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in params.layers]
        x, _ = steps.layers(cache, steps.embed(tokens), window)
        logits = np.asarray(steps.logits(x), np.float64).reshape(-1, config.vocab_size)
    return Run(logits, np.stack(chosen.layers))


def decoded(checkpoint: Any, tokens: np.ndarray[Any, Any], cache: CacheType) -> Run:
    """Decode the second half of each row, token after token, in float32 with such a cache."""
    config = checkpoint.config
    mesh = make_mesh(config, MeshShape(), jax.devices()[:1])
    engine = Engine(config, load(checkpoint, mesh), mesh, "float32", cache=cache)
    half = tokens.shape[1] // 2
    _, state = engine.prefill(tokens[:, :half])
    chosen, logits = Chosen(), []
    engine._steps.choices = chosen  # type: ignore[assignment] # noqa: SLF001 - each, not counts
    for column in tokens[:, half:].T:
        scores, state = engine.decode(state, column)
        logits.append(np.asarray(scores, np.float64))
    return Run(np.concatenate(logits), np.stack(chosen.layers))


def compared(found: Run, wanted: Run) -> str:
    """The columns of one line."""
    apart = np.abs(found.logits - wanted.logits).mean() / wanted.logits.std()
    p, q = (jax.nn.log_softmax(it.logits, axis=-1) for it in (wanted, found))
    divergence = float(np.mean(np.sum(np.exp(p) * (p - q), axis=-1)))
    token = np.mean(found.logits.argmax(-1) != wanted.logits.argmax(-1))
    expert = np.mean((found.chosen != wanted.chosen).any(axis=-1))
    return f"{apart:10.2e}{divergence * 1e3:10.3f}{token:13.2%}{expert:15.2%}"


def models() -> Iterator[tuple[str, Any, np.ndarray[Any, Any]]]:
    """Each checkpoint with its tokens, `[rows, tokens]`."""
    config = GrokConfig.from_mapping(json.loads((GOLDEN / "config.json").read_text()))
    random = np.random.default_rng(0).integers(3, config.vocab_size, (ROWS, TOKENS))
    yield "golden", open_folder(GOLDEN / "ckpt-0", config), random.astype(np.int32)
    manifest = json.loads((DEMO / "grok-demo.json").read_text())
    config = GrokConfig.from_mapping(manifest["model"])
    folder = DEMO / "grok-demo"
    tokenizer = Tokenizer.load(folder / "tokenizer.model")
    sentences = [*map(tokenizer.encode, (folder / "text.txt").read_text().splitlines(True))]
    # Each row begins with a sentence, like the rows of its training.
    rows = [list(itertools.chain(*sentences[first:]))[:TOKENS] for first in range(ROWS)]
    yield "demo", open_folder(folder / "ckpt-0", config), np.array(rows, np.int32)


def main() -> None:
    """Print."""
    print(f"{'':<46}{'logits':>10}{'KL':>10}{'other token':>13}{'other experts':>15}")
    for name, checkpoint, tokens in models():
        exact = ran(checkpoint, tokens, "float32", ())
        variants = [
            (),
            *((part,) for part in PARTS),
            ("projections", "experts"),
            ("projections", "scores", "experts"),
        ]
        for parts in variants:
            found = ran(checkpoint, tokens, "bfloat16", parts)
            label = f"{name:<8}{', '.join(parts) or 'nothing'}"
            print(f"{label:<46}{compared(found, exact)}", flush=True)
        exact = decoded(checkpoint, tokens, "float32")
        rounded_caches: tuple[CacheType, ...] = ("bfloat16", "float16")
        for cache in rounded_caches:
            label = f"{name:<8}cache in {cache}, decoding"
            print(f"{label:<46}{compared(decoded(checkpoint, tokens, cache), exact)}", flush=True)


if __name__ == "__main__":
    main()
