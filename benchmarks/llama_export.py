"""An exported GGUF in llama.cpp: the peer that `export.py` and a test start.

It runs in a Python with llama-cpp-python, and needs nothing of this project. It is called as
`llama_export.py FILE [--exact]`. With `--exact`, two approximations are replaced by exact values
when a node of the graph has been computed: GELU, which is a table in float16, and the gates of the
chosen experts, which are divided by their sum. Each line of JSON on standard input gets one line of
answer: for a string, its token ids; for a list of token ids, the logits after the last; for
{"prompt": [ids], "count": N}, the N most probable ids that continue the prompt.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import llama_cpp
import numpy as np

PLACES = 512
"""Tokens that the cache has room for."""

GATES, DIVIDED_GATES, GATED = "ffn_moe_weights", "ffn_moe_weights_norm", "ffn_moe_geglu"
"""llama.cpp's names, before a hyphen and the number of the layer, of the nodes that matter."""


class Node(ctypes.Structure):
    """The beginning of `struct ggml_tensor`, in ggml.h."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )

    def values(self) -> np.ndarray:
        """The float32 values where they lie, the fastest dimension last."""
        shape, strides = tuple(self.ne)[::-1], tuple(self.nb)[::-1]
        size = sum((count - 1) * step for count, step in zip(shape, strides, strict=True)) + 4
        data = (ctypes.c_char * size).from_address(self.data)
        return np.ndarray(shape, np.float32, data, 0, strides)


class Exact:
    """The evaluation callback that writes exact values over approximate ones."""

    def __init__(self) -> None:
        self._gates: dict[str, np.ndarray] = {}

    def __call__(self, pointer: int, ask: bool, _data: object) -> bool:  # noqa: FBT001 - llama.cpp's
        """Whether a node is to be seen, before it is computed; after that what becomes of it."""
        node = Node.from_address(pointer)
        kind, _, layer = node.name.decode().partition("-")
        if ask:
            return kind in {GATES, DIVIDED_GATES, GATED}
        values = node.values()
        if kind == GATES:
            self._gates[layer] = values.copy()
        elif kind == DIVIDED_GATES:
            values[...] = self._gates[layer].reshape(values.shape)
        elif kind == GATED:
            gate, up = (Node.from_address(node.src[place]).values() for place in (0, 1))
            values[...] = gelu(gate.astype(np.float64)) * up
        return True


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU by its approximation with tanh, as the reference has it."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def main() -> None:
    """Answer what standard input asks."""
    file = Path(sys.argv[1])
    model = llama_cpp.llama_model_load_from_file(
        os.fsencode(file), llama_cpp.llama_model_default_params()
    )
    if not model:
        sys.exit(f"{file}: llama.cpp cannot load it")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = params.n_batch = PLACES
    # Keys and values in float32, as the F32 export is to be compared; nothing else rounds them.
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    callback = llama_cpp.ggml_backend_sched_eval_callback(Exact())
    if "--exact" in sys.argv[2:]:
        params.cb_eval = callback
    context = llama_cpp.llama_init_from_model(model, params)
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    print(json.dumps({"vocabulary": llama_cpp.llama_vocab_n_tokens(vocabulary)}), flush=True)
    for line in sys.stdin:
        match json.loads(line):
            case str() as text:
                answer: object = token_ids(vocabulary, text)
            case list() as tokens:
                forget(context)
                answer = logits(context, vocabulary, tokens, 0).tolist()
            case {"prompt": prompt, "count": count}:
                answer = continued(context, vocabulary, prompt, count)
        print(json.dumps(answer), flush=True)


def token_ids(vocabulary: llama_cpp.llama_vocab_p, text: str) -> list[int]:
    """What llama.cpp makes of a text; names of control tokens in it are text like any other."""
    data = text.encode()
    room = len(data) + 8
    ids = (llama_cpp.llama_token * room)()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, room, True, False)
    return list(ids[:count])


def forget(context: llama_cpp.llama_context_p) -> None:
    """Empty the cache."""
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)


def logits(
    context: llama_cpp.llama_context_p,
    vocabulary: llama_cpp.llama_vocab_p,
    tokens: Sequence[int],
    position: int,
) -> np.ndarray:
    """float32 `[vocabulary]` after the last of some tokens, the first of which has a position."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for index, token in enumerate(tokens):
        batch.token[index] = token
        batch.pos[index] = position + index
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = 0
        batch.logits[index] = index == len(tokens) - 1
    if llama_cpp.llama_decode(context, batch) != 0:
        sys.exit("llama_decode failed")
    pointer = llama_cpp.llama_get_logits_ith(context, -1)
    result = np.ctypeslib.as_array(pointer, (llama_cpp.llama_vocab_n_tokens(vocabulary),)).copy()
    llama_cpp.llama_batch_free(batch)
    return result


def continued(
    context: llama_cpp.llama_context_p,
    vocabulary: llama_cpp.llama_vocab_p,
    prompt: Sequence[int],
    count: int,
) -> list[int]:
    """The most probable tokens, one after another."""
    forget(context)
    tokens, position, result = list(prompt), 0, []
    for _ in range(count):
        best = int(logits(context, vocabulary, tokens, position).argmax())
        position += len(tokens)
        tokens = [best]
        result.append(best)
    return result


if __name__ == "__main__":
    main()
