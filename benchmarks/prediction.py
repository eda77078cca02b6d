"""How often a layer's experts can be predicted one layer ahead, and whether reading them then pays.

Run: python benchmarks/prediction.py. The model is the demo's, because it is the only one of this
size that has been trained. While the experts of layer l are computed, its residual stream goes
through the norm and the router of layer l + 1, which gives the prediction. It is compared with what
that router chooses later. The gain is then computed from rates: the disk is only idle while the
last expert of a layer is computed, and a wrong prediction keeps it from reading what is needed.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from grokfetch.manifest.shipped import demo_folder
from loader.devices.paging import Paging
from loader.devices.placement import make_mesh, share
from loader.inference import model
from loader.inference.engine import Engine
from loader.inference.experts import route
from loader.inference.tokenizer import Tokenizer
from loader.weights.checkpoint import Checkpoint, open_folder
from loader.weights.schema import GrokConfig

PROMPT = "First it asks"
TOKENS = 60
EXPERT, ATTENTION = 0.604, 0.088
"""Gigabytes of one expert, and of one layer's attention, of Grok-1."""


class Guesser(Paging):
    """Records what was predicted for each layer and what was then chosen."""

    def __init__(self) -> None:
        self.chosen: list[tuple[int, set[int]]] = []

    def experts(self, number: int, chosen: tuple[int, ...]) -> None:
        """Record the choice of a router."""
        self.chosen.append((number, set(chosen)))


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--disk", type=float, default=2.2, help="GB/s of parallel reads")
    options.add_argument("--memory", type=float, default=30.0, help="GB/s of the products")
    chosen = options.parse_args()
    folder = demo_folder()
    config, checkpoint = opened(folder)
    hits, total = hit_rate(config, checkpoint, folder)
    rate = hits / total
    print(f"{hits} of {total} experts guessed one layer ahead: {rate:.1%}")
    print(f"by chance: {config.num_selected_experts / config.num_experts:.1%}")
    idle = EXPERT / chosen.memory
    room = idle * chosen.disk
    print(
        f"while the last expert is computed, {idle * 1e3:.0f} ms, the disk gives {room:.3f} GB; "
        f"the next attention, which is certain, takes {ATTENTION} of them"
    )


def opened(folder: Path) -> tuple[GrokConfig, Checkpoint]:
    """The model of a published folder."""
    from grokfetch.manifest.schema import parse

    manifest = parse((folder / "grok-demo.json").read_bytes(), "grok-demo.json")
    config = GrokConfig.from_mapping(manifest.model or {})
    return config, open_folder((folder / manifest.tensors[0].file).parent, config)


def hit_rate(config: GrokConfig, checkpoint: Checkpoint, folder: Path) -> tuple[int, int]:
    """The experts predicted correctly, and all that were chosen, while a text is generated."""
    mesh = make_mesh(config)
    params = share(checkpoint, mesh)
    guesser = Guesser()
    engine = Engine(config, params, mesh, "float32", guesser)
    steps = engine._steps  # noqa: SLF001 - the residual stream between two halves of a layer
    attend, guesses = steps._attend, []  # noqa: SLF001

    def watched(weights, cache, x, window):  # noqa: ANN001, ANN202
        x, cache, routed = attend(weights, cache, x, window)
        number = next(i for i, layer in enumerate(params.layers) if layer is weights)
        if number + 1 < config.num_layers and x.shape[1] == 1:
            after = params.layers[number + 1]
            flat = model.norm(x, after.before_experts).reshape(1, -1)
            choices, _ = route(flat, after.router, config.num_selected_experts)
            guesses.append((number + 1, set(np.asarray(choices)[0].tolist())))
        return x, cache, routed

    steps._attend = watched  # noqa: SLF001
    text = Tokenizer.load(next(folder.rglob("tokenizer.model")))
    prompt = text.encode(PROMPT)
    for _ in engine.generate(prompt, TOKENS):
        pass
    # The prompt's own step is left out: it wants nearly every expert.
    decoded = guesser.chosen[config.num_layers :]
    right = iter(guesses)
    hits = total = 0
    for number, experts in decoded:
        if number:
            guessed = next(right)
            assert guessed[0] == number
            hits += len(guessed[1] & experts)
            total += len(experts)
    return hits, total


if __name__ == "__main__":
    main()
