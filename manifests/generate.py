"""Writes grok-1.json beside it, the manifest of the official checkpoint.

Run: python manifests/generate.py. Names, shapes, sizes and offsets come from
`loader.weights.schema`; only what no table can know stands here.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path, PurePosixPath

from grokfetch.manifest.schema import Manifest, TokenizerSource, encode
from loader.weights.inventory import expected
from loader.weights.schema import GrokConfig

INFO_HASH = "5f96d43576e3d386c9ba65b883210a393b68210e"
# As published in the README of xai-org/grok-1.
MAGNET = (
    f"magnet:?xt=urn:btih:{INFO_HASH}"
    "&tr=https%3A%2F%2Facademictorrents.com%2Fannounce.php"
    "&tr=udp%3A%2F%2Ftracker.coppersurfer.tk%3A6969"
    "&tr=udp%3A%2F%2Ftracker.opentrackr.org%3A1337%2Fannounce"
)
# Published by Hugging Face for the first file of the repository xai-org/grok-1.
FIRST_SHA256 = "15d3ffd1bbdcf908de72e6c191c5643a8eafcfb6338940c6b3981b530dd53b56"
TOKENIZER = TokenizerSource(
    path=PurePosixPath("tokenizer.model"),
    size=2_229_219,
    sha256="5c69d7cbad192fa2c9d14e2a77fbfdc11597c68907b043ddb0260e3d28eddd7f",
    url="https://github.com/xai-org/grok-1/raw/main/tokenizer.model",
)


def grok_1() -> Manifest:
    """The manifest of the official checkpoint."""
    config = GrokConfig()
    (first, *rest), tensors = expected(config, PurePosixPath("ckpt-0"))
    return Manifest(
        name="grok-1",
        licence="Apache-2.0",
        info_hash=INFO_HASH,
        magnet=MAGNET,
        mirrors=("https://huggingface.co/xai-org/grok-1/resolve/main/{path}",),
        files=(dataclasses.replace(first, sha256=FIRST_SHA256), *rest),
        tensors=tensors,
        model=config.to_mapping(),
        tokenizer=TOKENIZER,
    )


if __name__ == "__main__":
    Path(__file__).with_name("grok-1.json").write_bytes(encode(grok_1()))
