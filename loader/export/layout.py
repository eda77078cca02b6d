"""Which files an export consists of, and which of their bytes are which weight. Pure: no I/O here.

Everything follows from the config, the vocabulary and the options, so an export can be described
before it begins and resumed after any interruption.

Source of the names and keys: llama.cpp, `llm_build_grok` and conversion of Grok.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Final, Literal, TypeVar

from grokfetch.errors import Inexact
from loader.export.gguf import Entry, Field, padded, written
from loader.export.matrices import BLOCK_LENGTH, ElementType
from loader.weights.schema import LAYER, OUTER, GrokConfig, ParamSpec, by_layer, parameters

__all__ = [
    "CONFIG_KEY",
    "NORM_EPSILON",
    "ROPE_BASE",
    "SCORE_CAP",
    "Origin",
    "OutputFile",
    "Part",
    "Plan",
    "Vocabulary",
    "field_of",
    "gguf_name",
    "gguf_plan",
    "in_files",
    "is_transposed",
    "split_name",
    "transposed_shape",
]

GGUF_NAMES: Final = {
    "embedding": "token_embd",
    "norm": "output_norm",
    "gate": "ffn_gate_exps",
    "up": "ffn_up_exps",
    "down": "ffn_down_exps",
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "before_attention": "attn_norm",
    "after_attention": "attn_output_norm",
    "before_experts": "ffn_norm",
    "after_experts": "layer_output_norm",
    "router": "ffn_gate_inp",
}
"""By field in the table of tensors, `loader.weights.schema`."""

FIELDS: Final = {kind.name: kind.field for kind in (*OUTER, *LAYER)}
FILE_TYPES: Final[dict[ElementType, int]] = {"F32": 0, "F16": 1, "Q8_0": 7, "BF16": 32}
TOKEN_TYPES: Final = {"normal": 1, "unknown": 2, "control": 3, "unused": 5, "byte": 6}
SCORE_CAP: Final = 30.0
NORM_EPSILON: Final = 1e-5
ROPE_BASE: Final = 10000.0
UNUSED_SCORE: Final = -10000.0

CONFIG_KEY: Final = "grokfetch.config"
"""The key of the config, as JSON, in a GGUF that we write: rebuilding shards needs every field."""

T = TypeVar("T")

Vocabulary = Sequence[tuple[str, float, Literal["normal", "unknown", "control", "unused", "byte"]]]
"""Piece, score and kind of every token by its id, as `loader.inference.tokenizer` reads them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Origin:
    """Where exported weights come from; every export holds this.

    name: of the checkpoint. info_hash: of its torrent, None without one. manifest: sha256 of its
    manifest, in hexadecimal. version: of grokfetch.
    """

    name: str
    info_hash: str | None
    manifest: str
    version: str
    licence: str | None = None

    @property
    def fields(self) -> dict[str, str]:
        """The same as metadata in a file, by key."""
        fields = {
            "grokfetch.version": self.version,
            "grokfetch.source.name": self.name,
            "grokfetch.source.manifest_sha256": self.manifest,
        }
        if self.info_hash is not None:
            fields["grokfetch.source.info_hash"] = self.info_hash
        return fields


@dataclasses.dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of the export: its name, the bytes before its first tensor, and its size."""

    name: str
    head: bytes
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A tensor of the export: the parameter that it holds, and where.

    `offset` is in bytes from the beginning of the file with the index `file`. `expert` is the index
    of an expert if the tensor holds only that one, None for the whole parameter.
    """

    name: str
    spec: ParamSpec
    kind: ElementType
    file: int
    offset: int
    expert: int | None = None

    @property
    def source_bytes(self) -> int:
        """Bytes of the weights and scales that it is made from."""
        whole = self.spec.nbytes
        return whole if self.expert is None else whole // self.spec.shape[0]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """A whole export: its files and its tensors."""

    files: tuple[OutputFile, ...]
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """Identifies an export: plans with equal digests write equal bytes for equal weights."""
        hasher = hashlib.sha256()
        for file in self.files:
            hasher.update(json.dumps([file.name, file.size]).encode() + file.head)
        return hasher.hexdigest()


def gguf_plan(
    config: GrokConfig,
    vocabulary: Vocabulary,
    origin: Origin,
    kind: ElementType,
    split: int | None = None,
) -> Plan:
    """An export as GGUF, for llama.cpp's architecture `grok`.

    With Q8_0, the embedding, norms and routers stay float32, and all other tensors keep their int8
    values and scales.

    Args:
        config: the model.
        vocabulary: its tokens; if there are fewer than the model has, unused ones are added.
        origin: of the weights.
        kind: type of the weights that are int8 in the shards, and of the embedding unless it is
            Q8_0.
        split: most bytes of tensors in a file; None for one file.

    Raises:
        Inexact: a group of rows with one scale is not a multiple of a Q8_0 block.
    """
    if kind == "Q8_0":
        _require_whole_blocks(config)
    entries = [(spec, _entry(spec, kind)) for spec in by_layer(config)]
    groups = list(in_files(entries, lambda placed: padded(placed[1].nbytes), split))
    # A manifest may call its checkpoint anything.
    stem = re.sub(r"[^\w.-]+", "-", origin.name).lstrip(".") or "model"
    whole = PurePosixPath(f"{stem}-{kind}.gguf")
    fields = _fields(config, vocabulary, origin, kind)
    files, parts = [], []
    for number, group in enumerate(groups):
        name = whole.name
        if len(groups) > 1:
            name = f"{whole.stem}{_number(number, len(groups))}"
            place = _split_fields(number, len(groups), len(entries))
            fields = (fields if number == 0 else {}) | place
        placed = list(_placed(group))
        head = written(fields, [entry for _, entry in placed])
        parts += [
            Part(entry.name, spec, entry.kind, number, len(head) + entry.offset)
            for spec, entry in placed
        ]
        last = placed[-1][1]
        files.append(OutputFile(name, head, len(head) + padded(last.offset + last.nbytes)))
    return Plan(tuple(files), tuple(parts))


def gguf_name(spec: ParamSpec) -> str:
    """The name of a parameter in GGUF."""
    layer = "" if spec.layer is None else f"blk.{spec.layer}."
    return f"{layer}{GGUF_NAMES[field_of(spec)]}.weight"


def field_of(spec: ParamSpec) -> str:
    """The field of a parameter in the table of tensors, `loader.weights.schema`."""
    return FIELDS[spec.name if spec.layer is None else spec.name.split("/", 2)[2]]


def transposed_shape(spec: ParamSpec) -> tuple[int, ...]:
    """The shape of a parameter in an export: `[..., N, K]` for a transposed `[..., K, N]`."""
    if not is_transposed(spec):
        return spec.shape
    return (*spec.shape[:-2], spec.shape[-1], spec.shape[-2])


def is_transposed(spec: ParamSpec) -> bool:
    """Whether a parameter is transposed: every matrix is, except the embedding."""
    return len(spec.shape) > 1 and spec.axes != ("vocab", "embed")


def split_name(first: Path, number: int, count: int) -> Path:
    """The path of file `number`, counted from 0, of an export whose first file is `first`."""
    return first.with_name(first.name.removesuffix(_number(0, count)) + _number(number, count))


def _number(number: int, count: int) -> str:
    return f"-{number + 1:05d}-of-{count:05d}.gguf"


def _entry(spec: ParamSpec, kind: ElementType) -> Entry:
    held: ElementType = "F32"
    if spec.scale_groups is not None or (spec.axes == ("vocab", "embed") and kind != "Q8_0"):
        held = kind
    return Entry(gguf_name(spec), transposed_shape(spec), held, 0)


def _require_whole_blocks(config: GrokConfig) -> None:
    for spec in parameters(config):
        if spec.scale_groups is None:
            continue
        rows = spec.shape[-2] // spec.scale_groups
        if rows % BLOCK_LENGTH:
            raise Inexact(
                f"{spec.name} has {rows} rows for each scale, and Q8_0 has blocks of "
                f"{BLOCK_LENGTH}: a block would need two scales",
                hint="choose --type f32 or bf16, or --pad",
            )


def in_files(
    tensors: Iterable[T], nbytes: Callable[[T], int], split: int | None
) -> Iterator[list[T]]:
    """The tensors of each file: at most `split` bytes, but at least one tensor."""
    group: list[T] = []
    size = 0
    for tensor in tensors:
        if group and split is not None and size + nbytes(tensor) > split:
            yield group
            group, size = [], 0
        group.append(tensor)
        size += nbytes(tensor)
    yield group


def _placed(group: Iterable[tuple[ParamSpec, Entry]]) -> Iterator[tuple[ParamSpec, Entry]]:
    """The tensors of a file, one after another."""
    offset = 0
    for spec, entry in group:
        yield spec, dataclasses.replace(entry, offset=offset)
        offset += padded(entry.nbytes)


def _split_fields(number: int, count: int, tensors: int) -> dict[str, Field]:
    return {
        "split.no": Field("u16", number),
        "split.count": Field("u16", count),
        "split.tensors.count": Field("i32", tensors),
    }


def _fields(
    config: GrokConfig, vocabulary: Vocabulary, origin: Origin, kind: ElementType
) -> dict[str, Field]:
    general = {
        "general.architecture": Field("str", "grok"),
        "general.type": Field("str", "model"),
        "general.name": Field("str", origin.name),
        "general.file_type": Field("u32", FILE_TYPES[kind]),
        "general.quantization_version": Field("u32", 2),
    }
    if origin.licence is not None:
        general["general.license"] = Field("str", origin.licence.lower())
    numbers = {
        "vocab_size": config.vocab_size,
        "context_length": config.sequence_len,
        "embedding_length": config.emb_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.ff_size,
        "expert_feed_forward_length": config.ff_size,
        "attention.head_count": config.num_q_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.key_size,
        "attention.value_length": config.key_size,
        "rope.dimension_count": config.key_size,
        "expert_count": config.num_experts,
        "expert_used_count": config.num_selected_experts,
    }
    factors = {
        "rope.freq_base": ROPE_BASE,
        "attention.layer_norm_rms_epsilon": NORM_EPSILON,
        "embedding_scale": config.embedding_multiplier_scale,
        "logit_scale": config.output_multiplier_scale,
        "attention.output_scale": config.attn_output_multiplier,
        "attn_logit_softcapping": SCORE_CAP,
    }
    return (
        general
        | {f"grok.{key}": Field("u32", value) for key, value in numbers.items()}
        | {f"grok.{key}": Field("f32", value) for key, value in factors.items()}
        | _vocabulary_fields(config, vocabulary)
        | {CONFIG_KEY: Field("str", json.dumps(config.to_mapping()))}
        | {key: Field("str", value) for key, value in origin.fields.items()}
    )


def _vocabulary_fields(config: GrokConfig, vocabulary: Vocabulary) -> dict[str, Field]:
    """The tokens, given so that llama.cpp tokenizes a text as SentencePiece does."""
    lacking = range(len(vocabulary), config.vocab_size)
    tokens = list(vocabulary) + [(f"[PAD{it}]", UNUSED_SCORE, "unused") for it in lacking]
    pieces, scores, kinds = zip(*tokens, strict=True)
    fields = {
        "model": Field("str", "llama"),
        "pre": Field("str", "default"),
        "tokens": Field("str", pieces),
        "scores": Field("f32", scores),
        "token_type": Field("i32", tuple(TOKEN_TYPES[kind] for kind in kinds)),
        "bos_token_id": Field("u32", config.bos_token),
        "eos_token_id": Field("u32", config.eos_token),
        "padding_token_id": Field("u32", config.pad_token),
        "add_bos_token": Field("bool", value=False),
        "add_eos_token": Field("bool", value=False),
        "add_space_prefix": Field("bool", value=True),
    }
    if "unknown" in kinds:
        fields["unknown_token_id"] = Field("u32", kinds.index("unknown"))
    return {f"tokenizer.ggml.{key}": field for key, field in fields.items()}
