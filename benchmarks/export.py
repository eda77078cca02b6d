"""`grokfetch export` against the disk: bytes per second and memory; and F32 exports in llama.cpp.

Run: python benchmarks/export.py DIR [--size 1 8] [--type q8_0 bf16] [--llama-python PATH]

For each size, in GB, it writes a synthetic checkpoint with Grok-1's shapes into DIR, exports it and
removes the export. The limit is the slower of reading the shards and writing and flushing as many
bytes as the export has; both are measured in the same run. PATH is a Python of another environment
in which `pip install llama-cpp-python` has been run: there a small model is loaded that was
exported as F32, and 2,000 texts are tokenized and run through both engines.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np

from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest
from grokfetch.manifest.shipped import demo_folder
from loader.export.target_file import TargetFile
from loader.weights.checkpoint import open_folder
from loader.weights.inventory import expected
from loader.weights.schema import GrokConfig, weight_bytes
from loader.weights.synthetic import write_checkpoint

PEER = Path(__file__).with_name("llama_export.py")
BLOCK = 4 << 20
GROK_1 = 318_239_886_140
TARGET = 0.6
SMALL = GrokConfig(
    vocab_size=512,
    sequence_len=512,
    emb_size=256,
    widening_factor=1.5,
    key_size=32,
    num_q_heads=8,
    num_kv_heads=2,
    num_layers=4,
    num_experts=8,
    attn_output_multiplier=0.2,
    embedding_multiplier_scale=8.0,
    output_multiplier_scale=0.5,
)
"""A shape that llama.cpp loads, for the comparison."""

TEXTS = 2000
RUN_THROUGH = 200
"""Texts of which logits are compared; of all of them the token ids are."""


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--size", type=float, nargs="*", default=[1, 8], help="GB")
    options.add_argument("--type", dest="types", nargs="*", default=["q8_0", "bf16"])
    options.add_argument("--llama-python", type=Path)
    chosen = options.parse_args()
    for size in chosen.size:
        config = sized(size)
        root = made(chosen.folder / f"model-{size:g}", config)
        for kind in chosen.types:
            measured(root, chosen.folder / "out", kind)
    if chosen.llama_python is not None:
        compare(chosen.folder / "small", chosen.llama_python)


def sized(gigabytes: float) -> GrokConfig:
    """One layer of Grok-1 with as many experts and tokens as make about that size."""
    experts = max(1, min(8, round((gigabytes - 0.2) / 0.65)))
    config = GrokConfig(
        num_layers=1, num_experts=experts, num_selected_experts=1, vocab_size=8 * 1024
    )
    lacking = gigabytes * 1e9 - weight_bytes(config)
    tokens = max(0, int(lacking / 4 / config.emb_size)) // 64 * 64
    return dataclasses.replace(config, vocab_size=config.vocab_size + tokens)


def made(root: Path, config: GrokConfig) -> Path:
    """The checkpoint with a manifest and the demo's tokenizer, written if it is not there."""
    files, tensors = expected(config, PurePosixPath("ckpt-0"))
    if not all((root / file.path).is_file() for file in files):
        write_checkpoint(root / "ckpt-0", config)
    shutil.copyfile(demo_folder() / "grok-demo/tokenizer.model", root / "tokenizer.model")
    store = Store(root)
    with store.lock():
        manifest = Manifest("grok", files, tensors=tensors, model=config.to_mapping())
        store.save_manifest(manifest)
    return root


def measured(root: Path, out: Path, kind: str) -> None:
    """Export once, and print how that compares with reading and writing."""
    shutil.rmtree(out, ignore_errors=True)
    shards = list((root / "ckpt-0").iterdir())
    source = sum(path.stat().st_size for path in shards)
    reading = seconds(lambda: [read(path) for path in shards])
    command = [sys.executable, "-m", "grokfetch", "export", root, out, "--type", kind]
    start = time.perf_counter()
    with subprocess.Popen(
        [*map(str, command), "--unproven", "--json"], stdout=subprocess.PIPE, text=True
    ) as child:
        written, peak = followed(child, start)
    whole = time.perf_counter() - start
    if child.returncode:
        sys.exit(f"export ended with {child.returncode}")
    target = sum(path.stat().st_size for path in out.glob("*.gguf"))
    shutil.rmtree(out)
    writing = seconds(lambda: write(out.with_suffix(".probe"), target))
    limit = max(reading, writing)
    print(
        f"{kind:5} {source / 1e9:5.2f} GB to {target / 1e9:5.2f} GB: written in {written:.1f} s, "
        f"read back by {whole:.1f} s; limit {limit:.1f} s (read {reading:.1f}, write "
        f"{writing:.1f}), {limit / written:.2f} of it while writing (target {TARGET}), "
        f"{limit / whole:.2f} in all; {peak / 1e6:.0f} MB of anonymous memory; "
        f"all of Grok-1 by arithmetic {whole * GROK_1 / source / 60:.0f} min",
        flush=True,
    )


def seconds(act: object) -> float:
    """How long something takes."""
    start = time.perf_counter()
    act()  # type: ignore[operator]
    return time.perf_counter() - start


def read(path: Path) -> None:
    """Read a file as it is."""
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def write(path: Path, size: int) -> None:
    """Write and flush so many bytes as an export does, and remove them."""
    block = os.urandom(BLOCK)
    with TargetFile(path, size) as file:
        for start in range(0, size, BLOCK):
            file.write(block[: min(BLOCK, size - start)], start)
        file.flush()
    path.unlink()


def followed(child: subprocess.Popen[str], start: float) -> tuple[float, int]:
    """Seconds until all was written, and the most anonymous bytes that were seen."""
    assert child.stdout is not None
    written, peak = 0.0, 0
    status = Path(f"/proc/{child.pid}/status")
    os.set_blocking(child.stdout.fileno(), False)
    while child.poll() is None:
        for line in status.read_text().splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]) * 1024)
        for line in child.stdout:
            if json.loads(line).get("phase") == "exporting":
                written = time.perf_counter() - start
        time.sleep(0.02)
    return written, peak


# --- llama.cpp ------------------------------------------------------------------------------------


def texts() -> Iterator[str]:
    """Texts of words, numbers, spaces, lines and characters that the tokenizer lacks."""
    dice = random.Random(0)
    words = (demo_folder() / "grok-demo/text.txt").read_text().split()
    others = [
        "  ",
        "\n",
        "\t",
        "42",
        "3.14",
        "äöü",
        "日本語",
        "🙂",
        "<s>",
        "</s>",
        "…",
        "x_y",
        "  \n ",
    ]
    for _ in range(TEXTS):
        parts = dice.choices(words, k=dice.randrange(1, 20)) + dice.choices(others, k=3)
        dice.shuffle(parts)
        yield dice.choice(["", " "]).join(parts)


def compare(root: Path, python: Path) -> None:
    """Token ids and logits of the F32 export in llama.cpp and of the shards in ours."""
    import jax

    from loader.devices.placement import load, make_mesh
    from loader.inference.engine import Engine
    from loader.inference.tokenizer import Tokenizer

    made(root, SMALL)
    out = root.with_name("small-f32")
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "grokfetch", "export", root, out, "--type", "f32"]
    subprocess.run([*map(str, command), "--unproven"], check=True)
    tokenizer = Tokenizer.load(root / "tokenizer.model")
    mesh = make_mesh(SMALL, devices=jax.devices()[:1])
    engine = Engine(SMALL, load(open_folder(root / "ckpt-0", SMALL), mesh), mesh, "float32")
    (file,) = out.glob("*.gguf")
    every = list(texts())
    ids = [tokenizer.encode(text) for text in every]
    with asking(python, file) as ask:
        wrong = sum(ask(text) != mine for text, mine in zip(every, ids, strict=True))
    print(f"{TEXTS} texts, {wrong} with other token ids")
    ours = [np.asarray(engine.prefill([mine])[0])[0] for mine in ids[:RUN_THROUGH]]
    for name, options in (("as it is", ()), ("with exact GELU and gates", ("--exact",))):
        with asking(python, file, *options) as ask:
            theirs = [np.array(ask(mine), np.float32) for mine in ids[:RUN_THROUGH]]
        gaps = np.abs(np.array(theirs) - np.array(ours))
        best = sum(np.argmax(theirs, axis=1) == np.argmax(ours, axis=1))
        print(
            f"last logits of {RUN_THROUGH} of them, F32, llama.cpp {name}: median difference "
            f"{np.median(gaps):.1e}, largest {gaps.max():.1e}, same best token {best} times"
        )


@contextlib.contextmanager
def asking(python: Path, file: Path, *options: str) -> Iterator[Callable[[object], list[float]]]:
    """A function that asks llama.cpp, which has loaded a file, as `llama_export.py` says."""
    with subprocess.Popen(
        [str(python), str(PEER), str(file), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        asked, answered = child.stdin, child.stdout
        answered.readline()

        def ask(question: object) -> list[float]:
            asked.write(f"{json.dumps(question)}\n")
            asked.flush()
            return json.loads(answered.readline())

        yield ask
        asked.close()


if __name__ == "__main__":
    main()
