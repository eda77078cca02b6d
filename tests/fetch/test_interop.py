"""A seed that is not ours: aria2c, where it is installed.

The torrent is BitTorrent v1, as Grok-1's is: aria2c 1.36 computes another info hash than everybody
else for info dictionaries with a v2 file tree.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time

import pytest
from support.program import grokfetch
from support.torrents import content, lay_down, v1_torrent

from grokfetch.torrent.metainfo import encode_torrent

PIECE = 32768
FILES = {"a": content(3 * PIECE - 1), "b": b"", "deep/c": content(20 * PIECE + 7)}
TORRENT = v1_torrent(FILES, PIECE)
ALONE = ("--listen", "127.0.0.1:0", "--no-discovery", "--no-mirrors", "--timeout", "30")
QUIET = (
    "--enable-dht=false",
    "--enable-dht6=false",
    "--bt-enable-lpd=false",
    "--enable-peer-exchange=false",
)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def wait_for(port, process):
    """Return once the process takes connections."""
    pause, deadline = threading.Event(), time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            pause.wait(0.05)
        else:
            return
    pytest.fail("aria2c takes no connections")


@pytest.fixture
def aria2c(tmp_path):
    """HOST:PORT of an aria2c that seeds FILES."""
    program = shutil.which("aria2c")
    if program is None:
        pytest.skip("aria2c is not installed")
    lay_down(tmp_path / "seed", FILES)
    torrent = tmp_path / "top.torrent"
    torrent.write_bytes(encode_torrent(TORRENT))
    port = free_port()
    command = [program, "--no-conf", f"--dir={tmp_path / 'seed'}", "--seed-ratio=0", *QUIET]
    command += ["--check-integrity", f"--listen-port={port}", str(torrent)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            wait_for(port, process)
            yield f"127.0.0.1:{port}"
        finally:
            process.terminate()


@pytest.mark.parametrize("by", ["torrent", "magnet"])
def test_everything_comes_from_a_seed_that_is_aria2c(aria2c, tmp_path, by):
    magnet = f"magnet:?xt=urn:btih:{TORRENT.info_hash}"
    source = {"torrent": tmp_path / "top.torrent", "magnet": magnet}[by]
    folder = tmp_path / "fetched"
    grokfetch("fetch", source, "--to", folder, "--peer", aria2c, *ALONE)
    for name, data in FILES.items():
        assert (folder / "top" / name).read_bytes() == data
    grokfetch("verify", folder)
