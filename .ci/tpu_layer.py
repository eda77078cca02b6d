"""Compiles one decode step of a layer for a TPU that is not here; fails if it copies weights.

Run: python .ci/tpu_layer.py, with the extra `tpu`. If an expert is copied, or a weight is written
in another type, bytes are held in addition to arguments and results, and bytes are read again; the
bounds are those of benchmarks/accelerators.py.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "accelerators.py"


def main() -> None:
    """Compile, print, and exit with 1 if a bound is exceeded."""
    from loader.devices.absent import prepare
    from loader.inference.ahead import counts
    from loader.weights.accelerators import ACCELERATORS
    from loader.weights.partition import MeshShape

    benchmark = runpy.run_path(str(BENCHMARK))
    kind, step = ACCELERATORS["v5p"], benchmark["STEPS"]["decode 1"]
    prepare([kind])
    exceeded = 0
    for part, row in counts(benchmark["CONFIG"], kind, MeshShape(1, 8), step).items():
        assert row.needed
        again = row.read / row.needed
        exceeded += row.temporaries >= benchmark["MOST_DECODE"] or again > benchmark["MOST_READ"]
        print(f"{part}: {row.temporaries:,} bytes of temporaries, {again:.3f} of the needed read")
    sys.exit(exceeded > 0)


if __name__ == "__main__":
    main()
