"""An export as safetensors, with the names that vLLM or SGLang expects. Pure: no I/O here.

A file is the length of a JSON header, the header, and the tensors without gaps; an index says which
file holds which tensor. Every matrix is `[out, in]`, and each expert is a separate tensor. What is
int8 in the shards becomes bfloat16, rounded once, and so does the embedding; norms and routers stay
float32.

Sources: the specification in safetensors' README; the loaders of vLLM, `grok1.py`, and of SGLang,
`grok.py`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal, NamedTuple

from loader.export.layout import (
    NORM_EPSILON,
    ROPE_BASE,
    SCORE_CAP,
    Origin,
    OutputFile,
    Part,
    Plan,
    field_of,
    in_files,
    transposed_shape,
)
from loader.export.matrices import ElementType, row_bytes
from loader.weights.schema import GrokConfig, ParamSpec, by_layer

__all__ = ["SPLIT", "Names", "safetensors_plan"]

Names = Literal["vllm", "sglang"]

SPLIT: Final = 5_000_000_000
"""Most bytes of tensors in a file, by default."""

VLLM: Final = {
    "embedding": "embed_tokens.weight",
    "norm": "norm.scale",
    "gate": "moe_block.experts.{expert}.linear.weight",
    "up": "moe_block.experts.{expert}.linear_v.weight",
    "down": "moe_block.experts.{expert}.linear_1.weight",
    "query": "attn.q_proj.weight",
    "key": "attn.k_proj.weight",
    "value": "attn.v_proj.weight",
    "output": "attn.o_proj.weight",
    "before_attention": "pre_attn_norm.scale",
    "after_attention": "post_attn_norm.scale",
    "before_experts": "pre_moe_norm.scale",
    "after_experts": "post_moe_norm.scale",
    "router": "moe_block.gate.weight",
}
SGLANG: Final = {
    "embedding": "embed_tokens.weight",
    "norm": "norm.weight",
    "gate": "block_sparse_moe.experts.{expert}.w1.weight",
    "up": "block_sparse_moe.experts.{expert}.w3.weight",
    "down": "block_sparse_moe.experts.{expert}.w2.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "before_attention": "pre_attn_norm.weight",
    "after_attention": "post_attn_norm.weight",
    "before_experts": "pre_moe_norm.weight",
    "after_experts": "post_moe_norm.weight",
    "router": "block_sparse_moe.gate.weight",
}
"""By field in the table of tensors; the prefix is `model.`, or in a layer `model.layers.N.`."""

CONFIGURATION: Final = '''"""The configuration of Grok-1, for transformers, which has none."""

from transformers import PretrainedConfig


class Grok1Config(PretrainedConfig):
    """Whatever config.json says."""

    model_type = "grok-1"
'''


class _Tensor(NamedTuple):
    name: str
    spec: ParamSpec
    expert: int | None

    @property
    def shape(self) -> tuple[int, ...]:
        shape = transposed_shape(self.spec)
        return shape if self.expert is None else shape[1:]

    @property
    def kind(self) -> ElementType:
        whole = self.spec.scale_groups is None and self.spec.axes != ("vocab", "embed")
        return "F32" if whole else "BF16"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


def safetensors_plan(
    config: GrokConfig, tokenizer: bytes, origin: Origin, names: Names, split: int = SPLIT
) -> Plan:
    """An export as safetensors, with config, index and tokenizer beside it.

    Args:
        config: the model.
        tokenizer: the SentencePiece model.
        origin: of the weights.
        names: which engine's names to use.
        split: most bytes of tensors in a file; a larger tensor has a file of its own.
    """
    groups = list(in_files(_tensors(config, names), lambda tensor: tensor.nbytes, split))
    files, parts, index = [], [], {}
    for number, group in enumerate(groups):
        name = "model.safetensors"
        if len(groups) > 1:
            name = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        head = _head(group, origin)
        at = len(head)
        for tensor in group:
            parts.append(Part(tensor.name, tensor.spec, tensor.kind, number, at, tensor.expert))
            index[tensor.name] = name
            at += tensor.nbytes
        files.append(OutputFile(name, head, at))
    total = sum(tensor.nbytes for group in groups for tensor in group)
    beside = {
        "model.safetensors.index.json": _json(
            {"metadata": {"total_size": total}, "weight_map": index}
        ),
        "config.json": _json(_config(config, names)),
        "configuration_grok1.py": CONFIGURATION.encode(),
        "tokenizer.model": tokenizer,
        "tokenizer_config.json": _json(_tokenizer_config()),
    }
    files += [OutputFile(name, data, len(data)) for name, data in beside.items()]
    return Plan(tuple(files), tuple(parts))


def _tensors(config: GrokConfig, names: Names) -> Iterator[_Tensor]:
    table = {"vllm": VLLM, "sglang": SGLANG}[names]
    for spec in by_layer(config):
        layer = "" if spec.layer is None else f"layers.{spec.layer}."
        name = f"model.{layer}{table[field_of(spec)]}"
        if "expert" not in spec.axes:
            yield _Tensor(name, spec, None)
            continue
        for expert in range(config.num_experts):
            yield _Tensor(name.format(expert=expert), spec, expert)
    if names == "sglang":
        # SGLang reads a separate output matrix, which in Grok-1 is the embedding.
        embedding = next(spec for spec in by_layer(config) if spec.axes == ("vocab", "embed"))
        yield _Tensor("lm_head.weight", embedding, None)


def _head(group: Iterable[_Tensor], origin: Origin) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | origin.fields}
    at = 0
    for tensor in group:
        header[tensor.name] = {
            "dtype": tensor.kind,
            "shape": tensor.shape,
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()


def _config(config: GrokConfig, names: Names) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "architectures": ["Grok1ForCausalLM"],
        "model_type": "grok-1",
        "auto_map": {"AutoConfig": "configuration_grok1.Grok1Config"},
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.emb_size,
        "intermediate_size": config.ff_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_q_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.key_size,
        "max_position_embeddings": config.sequence_len,
        "num_experts": config.num_experts,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_selected_experts,
        "rms_norm_eps": NORM_EPSILON,
        "rope_theta": ROPE_BASE,
        "attn_output_multiplier": config.attn_output_multiplier,
        "attn_logit_softcapping": SCORE_CAP,
        "embedding_multiplier_scale": config.embedding_multiplier_scale,
        "output_multiplier_scale": config.output_multiplier_scale,
        "tie_word_embeddings": names == "vllm",
        "pad_token_id": config.pad_token,
        "bos_token_id": config.bos_token,
        "eos_token_id": config.eos_token,
    }
    if names == "sglang":
        # Otherwise SGLang would look for a separate file for each GPU.
        fields["load_presharded_moe"] = False
    return fields


def _tokenizer_config() -> dict[str, Any]:
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
    }
