"""Processes forked from one that has imported the program, so that none of them imports it again.

Of a command that is done after a tenth of a second, an interpreter that starts afresh takes three
tenths more for its imports.
"""

import atexit
import dataclasses
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

LONGEST = 1 << 16
"""Bytes of a request: the code, and the names of modules."""

IMPORTED = (
    *(f"grokfetch.commands.{it}" for it in ("fetch", "verify", "publish", "manifest", "export")),
    *("grokfetch.fetch.mirror.pool", "loader.export.padding", "loader.export.writing"),
    *("encodings.idna", "libtorrent", "psutil", "sentencepiece", "powercut.recorder", "mfusepy"),
)
"""What the parent imports: what the commands import when they are called, and the recorder."""


@dataclasses.dataclass
class Forked:
    """A forked process: its number, where its exit code comes from, and that code once known."""

    pid: int
    ends: socket.socket
    code: int | None = None

    def wait(self, seconds: float) -> int | None:
        """The exit code, of a signal the negative; None if it has not ended by then."""
        if self.code is None and select.select([self.ends], [], [], seconds)[0]:
            (self.code,) = struct.unpack("i", self.ends.recv(4))
            self.ends.close()
        return self.code

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait(20)


def forked(code: str, stdout: int, stderr: int) -> Forked:
    """Run Python code in a process of its own, which has `IMPORTED`; the others are handles."""
    ends, told = socket.socketpair()
    with told:
        handles = [told.fileno(), stdout, stderr]
        socket.send_fds(_parent(), [json.dumps(code).encode()], handles)
    (pid,) = struct.unpack("i", ends.recv(4))
    return Forked(pid, ends)


@functools.cache
def _parent() -> socket.socket:
    """What the parent takes its requests from; it ends when this process does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    tests = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])}
    call = "from powercut.forking import serve; serve()"
    with theirs:
        parent = subprocess.Popen(
            [sys.executable, "-c", call], stdin=theirs, env=os.environ | tests
        )

    def end() -> None:
        ours.close()
        parent.wait(20)

    atexit.register(end)
    return ours


def serve() -> None:
    """Fork a process for each request on stdin, until nobody can make one any more."""
    for name in IMPORTED:
        importlib.import_module(name)
    # A process that ends would look through all of it once more.
    gc.collect()
    gc.freeze()
    requests = socket.socket(fileno=0)
    # Nobody waits for the watchers.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        text, handles, _, _ = socket.recv_fds(requests, LONGEST, 3)
        if not text:
            return
        if not os.fork():
            _watch(json.loads(text), *handles)
        for handle in handles:
            os.close(handle)


def _watch(code: str, told: int, stdout: int, stderr: int) -> None:
    """Fork the process that is asked for, and tell its number and then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        os.close(told)
        for old, new in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
            os.dup2(old, new)
            os.close(old)
        # As an interpreter does with -c.
        exec(code, {"__name__": "__main__"})
        sys.exit()
    os.write(told, struct.pack("i", pid))
    os.write(told, struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)
