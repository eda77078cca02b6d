"""What the steps of Grok-1 compile to for GPUs and TPUs that need not be present.

Run: python benchmarks/accelerators.py --on v5p h100, with `pip install '.[tpu]'` or `'.[cuda]'`
for the compilers (Linux on x86-64), which may be in separate environments. Nothing is executed, so
no figure says how fast a device is. The table says what a device must hold, read, wait for and
exchange, counted in the compiled program.

A row is one step of one layer on one device (L), or the logits of its tokens (V). temp: bytes held
in addition to arguments and results. read: bytes from main memory, each operand of each operation
counted once. of it: read, relative to the bytes that are needed. loops: loops of unknown length; in
each iteration the host of a GPU waits, while a TPU decides by itself. ms: time for all layers and
the logits at the rate of the memory. fits: whether weights, cache and the work of this step fit in
the memory of a device.
"""

from __future__ import annotations

import argparse
import sys

from loader.devices.absent import prepare
from loader.inference.ahead import Load, counts
from loader.weights.accelerators import ACCELERATORS, Accelerator
from loader.weights.capacity import Use, need
from loader.weights.partition import MeshShape, choose_mesh
from loader.weights.schema import GrokConfig

CONFIG = GrokConfig()
STEPS = {
    "decode 1": Load(1, 1, 1024),
    "decode 1 of 8192": Load(1, 1, 8192),
    "decode 16": Load(16, 1, 1024),
    "decode 16 of 8192": Load(16, 1, 8192),
    "prefill 512": Load(1, 512, 1024),
    "prefill 2048": Load(1, 2048, 8192),
}
MOST_DECODE, MOST_PREFILL, MOST_READ = 4e6, 256e6, 1.05
HEAD = (
    f"{'device':<7}{'mesh':<19}{'step':<20}{'args MB':>9}{'temp MB':>9}{'read MB':>9}{'of it':>7}"
    f"{'loops':>6}{'exchanged kB':>14}{'ms':>8}  fits"
)


def main() -> None:
    """Compile and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--on", nargs="+", default=["v5p"], choices=sorted(ACCELERATORS))
    options.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    options.add_argument("--mesh", nargs="+", default=[], help="E,M instead of --devices")
    options.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    chosen = options.parse_args()
    kinds = [ACCELERATORS[name] for name in chosen.on]
    prepare(kinds)
    shapes = [MeshShape(*map(int, pair.split(","))) for pair in chosen.mesh]
    print(HEAD)
    missed = 0
    for kind in kinds:
        for shape in shapes or [choose_mesh(CONFIG, count) for count in chosen.devices]:
            for step in chosen.steps:
                missed += show(kind, shape, step)
    print(f"{missed} rows miss a target")
    sys.exit(missed > 0)


def show(kind: Accelerator, shape: MeshShape, step: str) -> int:
    """Print the rows of one step; returns how many miss a target."""
    load, missed = STEPS[step], 0
    use = Use(CONFIG, shape, load.places)
    rows = counts(CONFIG, kind, shape, load)
    read = CONFIG.num_layers * rows["layer"].read + rows["logits"].read
    held = need(use)
    work = max(row.temporaries for row in rows.values())
    fits = held.weights + load.rows * held.cache + work <= kind.usable
    for part, row in rows.items():
        ratio = None if row.needed is None else row.read / row.needed
        most = MOST_PREFILL if load.fresh else MOST_DECODE
        waits = bool(row.loops) and (kind.graphics is not None or not load.fresh)
        good = row.temporaries < most and not waits and (ratio is None or ratio <= MOST_READ)
        missed += not good
        last = part == "logits"
        print(
            f"{kind.name:<7}{shape!s:<19}{step + (' V' if last else ' L'):<20}"
            f"{row.arguments / 1e6:9.1f}{row.temporaries / 1e6:9.2f}{row.read / 1e6:9.1f}"
            f"{'' if ratio is None else format(ratio, '.3f'):>7}{row.loops:6}"
            f"{row.exchanged / 1e3:9.0f} in {row.exchanges:<2}"
            + (f"{read / kind.rate * 1e3:7.2f}  {'yes' if fits else 'NO'}" if last else "")
            + ("" if good else "  misses"),
            flush=True,
        )
    return missed


if __name__ == "__main__":
    main()
