"""If pages of mapped weights are lost, the process says why before it ends."""

from __future__ import annotations

import re
import subprocess
import sys

import httpx
import pytest
from support.demo import fetch_demo
from support.program import started

from grokfetch.errors import StorageFailed

DEADLINE_S = 60
LINE = "told: {folder}/{name}: it has become shorter while the model was using it"

PROGRAM = """
import os, mmap, signal, sys, threading
from pathlib import Path
import numpy as np
from loader.weights.lost_pages import explain_lost_pages

folder = Path(sys.argv[1])
files = [folder / name for name in ("a", "b")]
with files[1].open("rb") as file:
    pages = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
explain_lost_pages(folder, [*files, folder / "never"], lambda error: print("told:", error))
print("begun")
{fault}
print("not reached")
"""
FAULTS = {
    "in the main thread": "os.truncate(files[1], 0); pages.sum()",
    "in another thread": (
        "os.truncate(files[1], 0)\n"
        "thread = threading.Thread(target=pages.sum); thread.start(); thread.join()"
    ),
    "without Python's lock": (
        "import ctypes; os.truncate(files[1], 0)\n"
        "ctypes.CDLL(None).memchr(ctypes.c_void_p(pages.ctypes.data), 7, len(pages))"
    ),
}


def ended(folder, fault):
    for name in "ab":
        (folder / name).write_bytes(bytes(100_000))
    code = PROGRAM.format(fault=fault)
    return subprocess.run(
        [sys.executable, "-c", code, folder],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_a_file_that_shrinks_is_named_before_the_process_ends(tmp_path, fault):
    done = ended(tmp_path, fault)
    first, second, *_ = done.stdout.splitlines()
    assert first == "begun"
    assert second == LINE.format(folder=tmp_path, name="b")
    assert "verify" in done.stdout
    assert "not reached" not in done.stdout
    assert done.returncode == StorageFailed.exit_code
    assert done.stderr == ""


def test_a_page_that_the_disk_cannot_read_is_a_failing_disk(tmp_path):
    done = ended(tmp_path, "os.kill(os.getpid(), signal.SIGBUS)")
    assert f"told: {tmp_path}: the disk fails" in done.stdout
    assert done.returncode == StorageFailed.exit_code


@pytest.mark.slow
def test_serve_says_in_one_line_that_a_weight_file_shrank(tmp_path):
    folder = fetch_demo(tmp_path)
    options = ("--port", 0, "--slots", 1, "--dtype", "float32", "--mesh", "model=1")
    with started("serve", folder, *options, until="serving") as (server, lines):
        (url,) = re.findall(r"http://\S+/v1", lines[-1])
        for shard in folder.glob("grok-demo/ckpt-0/tensor*"):
            shard.write_bytes(b"")
        body = {"prompt": [1, 2, 3], "max_tokens": 2, "temperature": 0}
        try:
            answer = httpx.post(f"{url}/completions", json=body, timeout=DEADLINE_S)
        except httpx.TransportError:
            # Pages were touched before the files were checked again.
            assert server.wait(DEADLINE_S) == StorageFailed.exit_code
        else:
            assert answer.status_code == 500
            server.terminate()
            server.wait(DEADLINE_S)
        said = server.stderr.read()
    assert re.search(r"tensor\d+_000: it has (become shorter|shrunk)", said), said
    assert "Traceback" not in said
