"""Compiles steps of one layer for a TPU that is not here, and fails if they copy or widen weights.

Run: python .ci/tpu_layer.py, with the extra `tpu`. A weight that is copied, or written in another
type, shows as an array of its shape that is written outside a fusion, if only in the fast memory of
a core; in main memory also as bytes held beside arguments and results, and as bytes read again,
whose bounds are those of benchmarks/accelerators.py.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "accelerators.py"


def main() -> None:
    """Compile, print, and end with 1 if a weight is written again or a bound is exceeded."""
    import jax

    from loader.devices.absent import absent, prepare
    from loader.devices.placement import make_mesh
    from loader.devices.products import Quantized
    from loader.devices.program_text import cost, remade
    from loader.inference.ahead import Load, compiled, described
    from loader.weights.accelerators import ACCELERATORS
    from loader.weights.capacity import Use, reads
    from loader.weights.partition import MeshShape

    benchmark = runpy.run_path(str(BENCHMARK))
    config, kind, shape = benchmark["CONFIG"], ACCELERATORS["v5p"], MeshShape(1, 8)
    prepare([kind])
    mesh = make_mesh(config, shape, list(absent(kind, shape.devices))[: shape.devices])
    layer = jax.tree.leaves(
        described(config, mesh).layers[0], is_leaf=lambda part: isinstance(part, Quantized)
    )
    weights = [part.weight for part in layer if isinstance(part, Quantized)]
    matrices = {one.sharding.shard_shape(one.shape)[-2:] for one in weights}
    # Blocks of this prompt have 64 tokens; with 128, a block would be shaped like the weight that
    # makes keys.
    steps = {name: benchmark["STEPS"][name] for name in ("decode 1", "decode 16")}
    failures = 0
    for step, load in (steps | {"prefill 256": Load(1, 256, 1024)}).items():
        most = benchmark["MOST_PREFILL" if load.fresh else "MOST_DECODE"]
        needed = reads(Use(config, shape, load.places), load.rows)
        for program in compiled(config, mesh, load):
            if program.name == "embed":
                continue
            again = list(remade(program.text, matrices))
            line = f"{step}, {program.name}: {program.temporaries:,} bytes of temporaries"
            failures += len(again) + (program.temporaries >= most)
            if not load.fresh:
                least = needed.layer if program.name == "layer" else needed.logits
                ratio = cost(program.text).read / least
                line += f", {ratio:.3f} of the needed read"
                failures += ratio > benchmark["MOST_READ"]
            print(line, *(f"  written again: {made}" for made in again), sep="\n")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
