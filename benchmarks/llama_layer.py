"""One layer of Grok-1's shapes in llama.cpp: the peer that `layer.py` starts.

It runs in a Python with llama-cpp-python and gguf, and needs nothing of this project. It is called
as `llama_layer.py FILE CONFIG`, with CONFIG a `GrokConfig` as JSON and its `ff_size`. FILE is
written if it does not exist. For each line of JSON on standard input, `[cache, places, position,
tokens]`, the answer is the seconds that llama.cpp took to read these tokens into the cache of that
name, which has `places` places; position 0 begins a new context. With "fill" after the tokens, only
the logits of the last token are requested.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

BLOCK = np.dtype([("scale", "<f2"), ("values", "i1", 32)])
"""Q8_0: 32 weights in a row and their scale."""

BLOCKS_AT_ONCE = 2**20
EMBEDDING_SCALE, SCALE = 2.0**-7, 2.0**-13
"""The embedding outweighs what attention adds: every token is routed by itself."""

SMALLEST = 256
"""Places of a cache at least; what our engine begins with."""

MOST = 8192
"""Tokens in one call."""

FLOAT, QUANTISED = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.Q8_0


def main() -> None:
    """Write the file if need be, then time what standard input asks for."""
    file, config = Path(sys.argv[1]), json.loads(sys.argv[2])
    if not file.exists():
        write(file, config)
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
    model = loaded(file)
    contexts: dict[str, llama_cpp.llama_context_p] = {}
    batch = llama_cpp.llama_batch_init(MOST, 0, 1)
    answer(
        {
            "llama-cpp-python": importlib.metadata.version("llama-cpp-python"),
            "system": llama_cpp.llama_print_system_info().decode(),
        }
    )
    for line in sys.stdin:
        cache, places, position, tokens, *fill = json.loads(line)
        if cache not in contexts:
            contexts[cache] = opened(model, max(places, SMALLEST))
        context = contexts[cache]
        if position == 0:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        answer(seconds_of(context, filled(batch, position, tokens, every=not fill)))


def answer(value: object) -> None:
    """Print one line of JSON and flush it."""
    print(json.dumps(value), flush=True)


def loaded(file: Path) -> llama_cpp.llama_model_p:
    """The model in the mapped file."""
    of_model = llama_cpp.llama_model_default_params()
    of_model.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
    # Weights repacked for AMX end the process with a signal in a layer of experts (0.3.36).
    of_model.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(os.fsencode(file), of_model)
    if not model:
        sys.exit(f"{file}: llama.cpp cannot load it")
    return model


def opened(model: llama_cpp.llama_model_p, places: int) -> llama_cpp.llama_context_p:
    """A context of llama.cpp with so many places, and a thread for each core."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = places
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    return llama_cpp.llama_init_from_model(model, params)


def filled(
    batch: llama_cpp.llama_batch, position: int, tokens: Sequence[int], *, every: bool
) -> llama_cpp.llama_batch:
    """The batch with these tokens.

    Where they are to be timed, logits are asked for after `every` one: llama.cpp leaves the experts
    of the last layer, which here is the only one, out for a token whose logits nobody wants.
    """
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index] = token
        batch.pos[index] = position + index
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = 0
        batch.logits[index] = every or index == len(tokens) - 1
    return batch


def seconds_of(context: llama_cpp.llama_context_p, batch: llama_cpp.llama_batch) -> float:
    """Seconds until the logits of a batch are there."""
    start = time.perf_counter()
    if llama_cpp.llama_decode(context, batch) != 0:
        sys.exit("llama_decode failed")
    llama_cpp.llama_synchronize(context)
    return time.perf_counter() - start


def write(file: Path, config: Mapping[str, int]) -> None:
    """A model of one layer with random weights, as llama.cpp's architecture `grok` wants it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.part")
    writer = described(partial, config)
    parts = list(tensors(config))
    for name, kind, *shape in parts:
        nbytes = int(np.prod(shape)) * (4 if kind is FLOAT else BLOCK.itemsize / 32)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(nbytes), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    (out,) = writer.fout
    writer.write_padding(out, out.tell())
    rng = np.random.default_rng(0)
    for name, kind, *shape in parts:
        for chunk in weights(rng, name, kind, int(np.prod(shape))):
            chunk.tofile(out)
        writer.write_padding(out, out.tell())
    writer.close()
    partial.rename(file)


def described(file: Path, config: Mapping[str, int]) -> gguf.GGUFWriter:
    """A writer that knows the hyperparameters; the rest of Grok-1's are llama.cpp's defaults."""
    writer = gguf.GGUFWriter(file, "grok")
    writer.add_block_count(1)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["sequence_len"])
    writer.add_embedding_length(config["emb_size"])
    writer.add_feed_forward_length(config["ff_size"])
    writer.add_head_count(config["num_q_heads"])
    writer.add_head_count_kv(config["num_kv_heads"])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_selected_experts"])
    writer.add_tokenizer_model("none")
    return writer


def tensors(
    config: Mapping[str, int],
) -> Iterator[tuple[str | int | gguf.GGMLQuantizationType, ...]]:
    """Name, type and shape of each tensor, the contracted axis last."""
    embed, ff, experts = config["emb_size"], config["ff_size"], config["num_experts"]
    queries = config["num_q_heads"] * config["key_size"]
    keys = config["num_kv_heads"] * config["key_size"]
    yield "token_embd.weight", QUANTISED, config["vocab_size"], embed
    yield "output_norm.weight", FLOAT, embed
    for norm in ("attn_norm", "attn_output_norm", "ffn_norm", "layer_output_norm"):
        yield f"blk.0.{norm}.weight", FLOAT, embed
    yield "blk.0.ffn_gate_inp.weight", FLOAT, experts, embed
    for name, *shape in (
        ("attn_q", queries, embed),
        ("attn_k", keys, embed),
        ("attn_v", keys, embed),
        ("attn_output", embed, queries),
        ("ffn_gate_exps", experts, ff, embed),
        ("ffn_up_exps", experts, ff, embed),
        ("ffn_down_exps", experts, embed, ff),
    ):
        yield f"blk.0.{name}.weight", QUANTISED, *shape


def weights(
    rng: np.random.Generator, name: str, kind: gguf.GGMLQuantizationType, count: int
) -> Iterator[np.ndarray]:
    """The elements of a tensor in pieces: ones for a norm, random ones otherwise."""
    if kind is FLOAT:
        yield np.ones(count, "<f4") if "norm" in name else rng.normal(0, 0.02, count).astype("<f4")
        return
    for start in range(0, count // 32, BLOCKS_AT_ONCE):
        blocks = np.empty(min(BLOCKS_AT_ONCE, count // 32 - start), BLOCK)
        blocks["scale"] = EMBEDDING_SCALE if name.startswith("token") else SCALE
        blocks["values"] = rng.integers(-127, 128, (len(blocks), 32), np.int8)
        yield blocks


if __name__ == "__main__":
    main()
