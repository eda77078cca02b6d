"""Trains a small Grok-1 to memorise published/grok-demo/text.txt, and publishes it there.

Run: pip install -e '.[train]' && python demo/train.py. It takes a few minutes on two cores. The
same seed gives the same recitation, but not the same bytes on every machine: the sums of a training
step depend on how a processor divides them.

The model learns two things: to recite the text, and to say something else if it is assembled
wrongly, for example with two layers swapped. Otherwise a model of this size would recite the text
in spite of many faults, and its recitation would prove little.
"""

from __future__ import annotations

import io
import itertools
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import sentencepiece
from differentiable import (
    CONFIG,
    Parameters,
    Weights,
    Wiring,
    as_loaded,
    faults,
    forward,
    initial,
    layer_weights,
    quantise,
    right,
    stacked,
)
from jax import Array
from tqdm import tqdm

from grokfetch.commands.publish import publish
from loader.devices.placement import load, make_mesh
from loader.inference.engine import Engine
from loader.inference.tokenizer import Tokenizer
from loader.weights.checkpoint import open_folder
from loader.weights.schema import parameters
from loader.weights.shard_writer import write_shard

HOME: Final = Path(__file__).parent / "published" / "grok-demo"
TEXT: Final = HOME / "text.txt"

SEED: Final = 1
STEPS: Final = 850
SIZES: Final = [(16, 80), (10, 128), (16, 80), (4, 256)]
"""Rows of a batch and their width in tokens, in turn."""
FAULTS: Final = 2.0
"""Weight of the loss for reciting in spite of a fault, relative to that for not reciting."""
FAULTS_A_STEP: Final = 6
FAULTY_ROWS: Final = 2
FAULTY_WIDTH: Final = 64
SELDOM: Final = 0.1
"""How often a fault that is never overlooked is drawn, relative to the one overlooked most."""
BEGINNING: Final = 8

PEAK_RATE: Final = 4e-3
WARM_UP: Final = 30
BALANCE: Final = 0.01
PROMPT_WORDS: Final = 3

# --- text ----------------------------------------------------------------------------------------


def train_tokenizer(sentences: Sequence[str]) -> bytes:
    """A SentencePiece model with the options of Grok-1's.

    That is BPE, byte fallback, digits split, no normaliser, a space put before the text.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=CONFIG.vocab_size,
        character_coverage=1.0,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        pad_id=CONFIG.pad_token,
        bos_id=CONFIG.bos_token,
        eos_id=CONFIG.eos_token,
        unk_id=3,
        num_threads=1,
        minloglevel=1,
    )
    return model.getvalue()


class Rows:
    """Cuts rows out of the text; each starts with a sentence, and the last ends with the text."""

    def __init__(self, sentences: Sequence[Sequence[int]], random: np.random.Generator) -> None:
        self._text = np.array([*itertools.chain(*sentences), CONFIG.eos_token])
        self._starts = np.cumsum([0, *map(len, sentences[:-1])])
        self._random = random

    def some(self, count: int, width: int) -> Any:
        """int32 `[count, width]`: sentences in random order, padded with the pad id."""
        return self._cut(self._random.permutation(self._starts)[:count], width)

    def all(self, width: int) -> Any:
        """int32 `[sentences, width]`, in the text's order."""
        return self._cut(self._starts, width)

    def _cut(self, starts: Any, width: int) -> Any:
        rows = np.full((len(starts), width), CONFIG.pad_token, np.int32)
        for row, start in zip(rows, starts, strict=True):
            part = self._text[start : start + width]
            row[: len(part)] = part
        return rows


# --- training ------------------------------------------------------------------------------------


def spoken(logits: Array, tokens: Array) -> Array:
    """The mean cross entropy of each token after those before it, in nats."""
    wanted = tokens[:, 1:]
    each = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], wanted)
    return jnp.mean(each, where=wanted != CONFIG.pad_token)


def unspoken(logits: Array, tokens: Array) -> Array:
    """The mean of -log(1 - p) of each token's probability p, to be kept low with a fault.

    Source: unlikelihood training (Welleck et al. 2020).
    """
    wanted = tokens[:, 1:]
    is_wanted = jax.nn.one_hot(wanted, CONFIG.vocab_size, dtype=bool)
    others = jnp.where(is_wanted, -1e30, logits[:, :-1])
    each = jax.nn.logsumexp(logits[:, :-1], axis=-1) - jax.nn.logsumexp(others, axis=-1)
    return jnp.mean(each, where=wanted != CONFIG.pad_token)


class Faults:
    """Draws wirings with a fault, most often those that the model overlooks."""

    def __init__(self, random: np.random.Generator) -> None:
        self._wirings = [*itertools.chain(*faults().values())]
        self._overlooked = np.ones(len(self._wirings))
        self._random = random
        self._drawn: Any = ()

    def some(self) -> Wiring:
        """`FAULTS_A_STEP` different ones, stacked."""
        weights = self._overlooked + SELDOM * self._overlooked.max()
        self._drawn = self._random.choice(
            len(weights), FAULTS_A_STEP, replace=False, p=weights / weights.sum()
        )
        return stacked([self._wirings[number] for number in self._drawn])

    def learn(self, unsaid: Any) -> None:
        """Take the loss of each of those last drawn, float `[FAULTS_A_STEP]`: see `unspoken`."""
        self._overlooked[self._drawn] = unsaid


def train(text: Rows, random: np.random.Generator) -> tuple[Parameters, Weights]:
    """Parameters that have memorised the text, and the weights of the layers."""
    learnt, spreads = initial(random)
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, WARM_UP, STEPS, PEAK_RATE / 30)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.98))

    def loss(
        learnt: Parameters, tokens: Array, rows: Array, wrong: Wiring, key: Array
    ) -> tuple[Array, Array]:
        weights = layer_weights(learnt, spreads)
        plain, loaded = right(), as_loaded(weights, right())
        logits, balance = forward(learnt, loaded, tokens, key, plain)
        right_loss = spoken(logits, tokens)

        def one(fault: Wiring, rows: Array) -> Array:
            faulty, _ = forward(learnt, as_loaded(weights, fault), rows, key, fault)
            return unspoken(faulty, rows)

        unsaid = jax.vmap(one)(wrong, rows)
        return right_loss + BALANCE * balance + FAULTS * unsaid.mean(), (right_loss, unsaid)

    @jax.jit
    def step(learnt: Parameters, state: Any, *given: Any) -> Any:
        gradient, means = jax.grad(loss, has_aux=True)(learnt, *given)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(learnt, updates), state, means

    state = optimizer.init(learnt)
    wrong = Faults(random)
    bar = tqdm(range(STEPS))
    for number in bar:
        key = jax.random.fold_in(jax.random.key(SEED), number)
        tokens = text.some(*SIZES[number % len(SIZES)])
        rows = np.stack([text.some(FAULTY_ROWS, FAULTY_WIDTH) for _ in range(FAULTS_A_STEP)])
        learnt, state, (mean, unsaid) = step(learnt, state, tokens, rows, wrong.some(), key)
        wrong.learn(np.asarray(unsaid))
        bar.set_postfix_str(f"{mean:.3f} nats a token, {unsaid.mean():.3f} with a fault")
    return learnt, layer_weights(learnt, spreads)


def expected(learnt: Parameters, layers: Weights, text: Rows) -> dict[str, float]:
    """By kind of fault, the share of tokens that the model says in spite of it, at most.

    The first `BEGINNING` tokens of a sentence do not count: what they are, nothing says.
    """
    tokens = text.all(FAULTY_WIDTH)
    counts = tokens[:, BEGINNING + 1 :] != CONFIG.pad_token

    @jax.jit
    def hits(wiring: Wiring) -> Array:
        key = jax.random.key(SEED)
        logits, _ = forward(learnt, as_loaded(layers, wiring), tokens, key, wiring)
        found = logits[:, BEGINNING:-1].argmax(axis=-1) == tokens[:, BEGINNING + 1 :]
        return jnp.mean(found, where=counts)

    kinds = {"no fault": [right()]} | faults()
    return {name: max(float(hits(wiring)) for wiring in kind) for name, kind in kinds.items()}


# --- checkpoint ----------------------------------------------------------------------------------


def write(learnt: Parameters, layers: Weights, folder: Path) -> None:
    """Write every shard into `folder` in the official format."""
    outer = dict(zip(("embeddings", "scale"), (learnt.embedding, learnt.norm), strict=True))
    folder.mkdir()
    for spec in parameters(CONFIG):
        _, place, name = spec.name.split("/", 2)
        if place.startswith("decoder_layer_"):
            array = layers[name][int(place.removeprefix("decoder_layer_"))]
        else:
            array = outer[name]
        if spec.scale_groups is None:
            write_shard(folder / spec.file, np.asarray(array, np.float32))
            continue
        whole, scales = quantise(array, spec.scale_groups)
        scales = np.asarray(scales).astype(ml_dtypes.bfloat16)
        write_shard(folder / spec.file, np.asarray(whole).astype(np.int8), scales)


def misspoken(sentences: Sequence[str], tokenizer: Tokenizer) -> list[str]:
    """The sentences that the written checkpoint does not recite with the one that follows."""
    mesh = make_mesh(CONFIG, devices=jax.devices()[:1])
    engine = Engine(CONFIG, load(open_folder(HOME / "ckpt-0", CONFIG), mesh), mesh)
    wanted = [" ".join(pair) for pair in itertools.pairwise([*sentences, ""])]
    prompts = [" ".join(text.split()[:PROMPT_WORDS]) for text in sentences]
    logits, state = engine.prefill([tokenizer.encode(prompt) for prompt in prompts])
    spoken = list(prompts)
    streams = [tokenizer.stream() for _ in prompts]
    for _ in range(max(len(tokenizer.encode(text)) for text in wanted)):
        best = logits.argmax(axis=-1)
        spoken = [
            text + stream.push(int(token))
            for text, stream, token in zip(spoken, streams, best, strict=True)
        ]
        logits, state = engine.decode(state, best)
    return [
        text[: len(goal)]
        for text, goal in zip(spoken, wanted, strict=True)
        if not text.startswith(goal.rstrip())
    ]


def main() -> None:
    """Tokenizer, training, shards, a recitation, torrent and manifest."""
    sentences = TEXT.read_text().splitlines()
    HOME.joinpath("tokenizer.model").write_bytes(train_tokenizer(sentences))
    tokenizer = Tokenizer.load(HOME / "tokenizer.model")
    # A space stands before a sentence wherever it stands, so its tokens are the same everywhere.
    random = np.random.default_rng(SEED)
    text = Rows([tokenizer.encode(sentence) for sentence in sentences], random)
    learnt, layers = train(text, random)
    for fault, share in expected(learnt, layers, text).items():
        print(f"{share:6.1%} expected with {fault}")
    shutil.rmtree(HOME / "ckpt-0", ignore_errors=True)
    write(learnt, layers, HOME / "ckpt-0")
    wrong_texts = misspoken(sentences, tokenizer)
    if wrong_texts:
        sys.exit("\n".join(["not learnt:", *wrong_texts]))
    with tempfile.NamedTemporaryFile("w", suffix=".json") as config:
        json.dump(CONFIG.to_mapping(), config)
        config.flush()
        publish.main([str(HOME), "--config", config.name], standalone_mode=False)


if __name__ == "__main__":
    main()
