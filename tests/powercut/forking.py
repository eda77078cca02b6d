"""Processes forked from one that has imported the program, so that none of them imports it again.

For a command that takes a tenth of a second, a new interpreter needs three tenths more to import.
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
"""Most bytes of a request, which is the code and the names of modules."""

IMPORTED = (
    *(f"grokfetch.commands.{it}" for it in ("fetch", "verify", "publish", "manifest", "export")),
    *("grokfetch.fetch.mirror.pool", "loader.export.padding", "loader.export.writing"),
    *("encodings.idna", "libtorrent", "psutil", "sentencepiece", "powercut.recorder", "mfusepy"),
)
"""What the parent imports: everything that commands import later, and the recorder."""


@dataclasses.dataclass
class Forked:
    """A forked process: its id, the socket for its exit code, and that code once known."""

    pid: int
    ends: socket.socket
    code: int | None = None

    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if the process has not ended by then."""
        if self.code is None and select.select([self.ends], [], [], seconds)[0]:
            (self.code,) = struct.unpack("i", self.ends.recv(4))
            self.ends.close()
        return self.code

    def kill(self) -> None:
        """End it at once."""
        os.kill(self.pid, signal.SIGKILL)
        self.wait(20)


def forked(code: str, stdout: int, stderr: int) -> Forked:
    """Run Python code in a process that has `IMPORTED`; the others are file descriptors."""
    ends, told = socket.socketpair()
    with told:
        handles = [told.fileno(), stdout, stderr]
        socket.send_fds(_parent(), [json.dumps(code).encode()], handles)
    (pid,) = struct.unpack("i", ends.recv(4))
    return Forked(pid, ends)


@functools.cache
def _parent() -> socket.socket:
    """The socket for requests to the parent, which ends when this process does."""
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
    """Fork a process for each request on stdin, until the other end is closed."""
    for name in IMPORTED:
        importlib.import_module(name)
    # Otherwise each process would scan all of it once more when it ends.
    gc.collect()
    gc.freeze()
    requests = socket.socket(fileno=0)
    # The watchers are not waited for.
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
    """Fork the requested process, and report its id and then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if not pid:
        os.close(told)
        for old, new in ((os.open(os.devnull, os.O_RDONLY), 0), (stdout, 1), (stderr, 2)):
            os.dup2(old, new)
            os.close(old)
        # As an interpreter with -c does.
        exec(code, {"__name__": "__main__"})
        sys.exit()
    os.write(told, struct.pack("i", pid))
    os.write(told, struct.pack("i", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)
