"""A second forward pass of Grok-1, in plain NumPy and float64, one token at a time.

It was written only from the description of the model and shares no code with `loader`, so that an
error would have to be made twice to stay unnoticed.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass
class Result:
    logits: np.ndarray  # [T, V]
    chosen: list[list[set[int]]]  # [layer][token]
    narrowest: float  # smallest distance, in probability, between a chosen and an unchosen expert


class Reference:
    """The model over a mapping of names to tensors with `weight` and `scales`."""

    def __init__(self, config, tensors):
        self.config = config
        self._tensors = tensors

    def matrix(self, name):
        """A tensor in float64, scales applied row by row."""
        weight = np.array(self._tensors[name].weight, np.float64)
        scales = self._tensors[name].scales
        if scales is not None:
            rows, groups = weight.shape[-2], scales.shape[-2]
            for row in range(rows):
                weight[..., row, :] *= scales[..., row // (rows // groups), :].astype(np.float64)
        return weight

    def forward(self, tokens, masked=None):
        """Logits after every token; `masked` says which tokens are never attended to."""
        config = self.config
        masked = [token == config.pad_token for token in tokens] if masked is None else masked
        table = self.matrix("language_model/in_out_embed/embeddings")
        stream = [table[token] * config.embedding_multiplier_scale for token in tokens]
        chosen, narrowest = [], 1.0
        for number in range(config.num_layers):
            layer = f"transformer/decoder_layer_{number}/"
            before = [self.norm(layer + "rms_norm", h) for h in stream]
            mixed = self.attention(layer + "multi_head_attention/", before, masked)
            stream = [
                h + self.norm(layer + "rms_norm_1", m) for h, m in zip(stream, mixed, strict=True)
            ]
            before = [self.norm(layer + "rms_norm_2", h) for h in stream]
            mixed, sets, gap = self.experts(layer, before)
            stream = [
                h + self.norm(layer + "rms_norm_3", m) for h, m in zip(stream, mixed, strict=True)
            ]
            chosen.append(sets)
            narrowest = min(narrowest, gap)
        final = np.stack([self.norm("language_model/rms_norm", h) for h in stream])
        return Result(final @ table.T * config.output_multiplier_scale, chosen, narrowest)

    def norm(self, name, h):
        return h / np.sqrt(np.mean(h * h) + 1e-5) * self.matrix(name + "/scale")

    def rotated(self, vector, position):
        """Each pair (i, i + d/2) rotated by position / 10000 ** (2 i / d)."""
        half = len(vector) // 2
        rotated = np.empty_like(vector)
        for i in range(half):
            angle = position / 10_000 ** (2 * i / len(vector))
            a, b = vector[i], vector[i + half]
            rotated[i] = a * np.cos(angle) - b * np.sin(angle)
            rotated[i + half] = a * np.sin(angle) + b * np.cos(angle)
        return rotated

    def attention(self, name, inputs, masked):
        config, size = self.config, self.config.key_size
        query, key, value, output = (
            self.matrix(f"{name}{part}/w") for part in ("query", "key", "value", "linear")
        )
        readers = config.num_q_heads // config.num_kv_heads
        result = [np.zeros(config.num_q_heads * size) for _ in inputs]
        for head in range(config.num_q_heads):
            own = slice(head * size, (head + 1) * size)
            shared = slice(head // readers * size, (head // readers + 1) * size)
            keys = [self.rotated(x @ key[:, shared], t) for t, x in enumerate(inputs)]
            values = [x @ value[:, shared] for x in inputs]
            for t, x in enumerate(inputs):
                rotated = self.rotated(x @ query[:, own], t)
                scores = np.array([rotated @ k for k in keys[: t + 1]])
                scores = 30 * np.tanh(scores * config.attn_output_multiplier / 30)
                scores[np.array(masked[: t + 1])] = -1e30
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                result[t][own] = sum(w * v for w, v in zip(weights, values, strict=False))
        return [row @ output for row in result]

    def experts(self, layer, inputs):
        router = self.matrix(layer + "router/w")
        up, down, gate = (
            self.matrix(f"{layer}moe/{part}/w") for part in ("linear", "linear_1", "linear_v")
        )
        outputs, sets, narrowest = [], [], 1.0
        for x in inputs:
            scores = x @ router
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            order = np.argsort(-shares)
            best = order[: self.config.num_selected_experts]
            if len(best) < len(order):
                narrowest = min(narrowest, shares[best[-1]] - shares[order[len(best)]])
            total = 0
            for expert in best:
                a = x @ up[expert]
                gelu = a / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))
                total = total + shares[expert] * ((gelu * (x @ gate[expert])) @ down[expert])
            outputs.append(total)
            sets.append(set(best.tolist()))
        return outputs, sets, narrowest
