"""Real commands, recorded on the file system of `recorder`."""

import contextlib
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from powercut.recorder import Fault, Operation, recordings
from support.torrents import content, lay_down, torrent_of
from support.web_server import WebServer

from grokfetch.fetch.swarm import SwarmSettings, seed

PIECE = 32768
FILES = {
    "a": content(3 * PIECE - 100),
    "deep/b": content(1000, 1),
    "deep/c": content(6 * PIECE, 2),
    "e": b"",
}
"""Files that share pieces in a v1 torrent."""


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a command has done to an empty disk: its operations, and the torrent it was about."""

    name: str
    operations: list[Operation]
    torrent: bytes


def available() -> str | None:
    """Why nothing can be recorded here; None if it can."""
    try:
        import mfusepy  # noqa: F401
    except (ImportError, OSError) as error:
        return f"mfusepy, or libfuse: {error}"
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse may not be opened here"
    return None if shutil.which("fusermount3") or shutil.which("fusermount") else "no fusermount"


@contextlib.contextmanager
def recorded_disk(
    work: Path, fault: Fault | None = None
) -> Iterator[tuple[Path, Callable[[], list[Operation]]]]:
    """A mounted disk, and what gives its operations once the block has ended."""
    place, backing, log = (work / name for name in ("disk", "backing", "log"))
    place.mkdir(parents=True)
    backing.mkdir()
    code = "import sys; from powercut.recorder import Fault, mount; "
    code += f"mount(*sys.argv[1:], fault={fault!r})"
    tests = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path[1:]])}
    command = [sys.executable, "-c", code, place, backing, log]
    process = subprocess.Popen(command, env=os.environ | tests)
    deadline = time.monotonic() + 20
    try:
        while not os.path.ismount(place):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the recording file system did not come up")
            select_for(0.01)
        yield place, lambda: recordings(log)
    finally:
        tool = shutil.which("fusermount3") or shutil.which("fusermount") or "fusermount"
        subprocess.run([tool, "-u", "-z", place], check=False, capture_output=True)
        process.wait(20)


def select_for(seconds: float) -> None:
    """Give the other process the processor; the caller looks again, with a deadline."""
    import select

    select.select([], [], [], seconds)


class Ended(Exception):
    """A program ended badly: its exit code, and what it said on stderr."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"exit code {code}\n{said}")
        self.code = code
        self.said = said


def program(*arguments: object) -> None:
    """Run grokfetch in a process of its own, with the fault that is planted."""
    call = f"{_planted}\nfrom grokfetch.cli import main\nmain({[*map(str, arguments)]!r})"
    command = [sys.executable, "-c", call]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise Ended(done.returncode, done.stderr)


SWARM = ("--listen", "127.0.0.1:0", "--no-discovery", "--no-mirrors", "--timeout", "30")


_planted = ""


@contextlib.contextmanager
def planted(code: str) -> Iterator[None]:
    """Have every program run `code` first, which breaks it."""
    global _planted  # noqa: PLW0603
    _planted = code
    try:
        yield
    finally:
        _planted = ""


def record(name: str, work: Path) -> Recorded:
    """Run a scenario of `NAMES`."""
    work.mkdir()
    origin = work / "origin"
    lay_down(origin, FILES)
    torrent = torrent_of(origin / "top", PIECE, "v1")
    file = work / "top.torrent"
    file.write_bytes(torrent)
    with recorded_disk(work / "recorded") as (disk, operations):
        _SCENARIOS[name](disk, origin, file)
    return Recorded(name, operations(), torrent)


@dataclasses.dataclass(frozen=True)
class Struck:
    """A scenario in which the disk failed: how the program ended, and the disk afterwards.

    `reached` is False where the scenario had fewer operations than the fault's number.
    """

    recorded: Recorded
    ended: Ended | None
    disk: Path
    reached: bool


def strike(name: str, work: Path, fault: Fault) -> Struck:
    """Run a scenario on a disk that fails once."""
    work.mkdir()
    origin = work / "origin"
    lay_down(origin, FILES)
    torrent = torrent_of(origin / "top", PIECE, "v1")
    file = work / "top.torrent"
    file.write_bytes(torrent)
    ended = None
    with recorded_disk(work / "recorded", fault) as (disk, operations):
        try:
            _SCENARIOS[name](disk, origin, file)
        except Ended as error:
            ended = error
    made = Recorded(name, operations(), torrent)
    reached = any(it.kind == "struck" for it in made.operations)
    return Struck(made, ended, work / "recorded" / "backing", reached)


def _swarm(disk: Path, origin: Path, torrent: Path) -> None:
    with seed(torrent.read_bytes(), origin, SwarmSettings.loopback()) as seeder:
        peer = f"127.0.0.1:{seeder.port}"
        program("fetch", torrent, "--to", disk / "to", "--peer", peer, *SWARM)


def _mirror(disk: Path, _origin: Path, torrent: Path) -> None:
    with WebServer({f"top/{path}": data for path, data in FILES.items()}) as server:
        options = ("--listen", "127.0.0.1:0", "--no-discovery", "--timeout", "30")
        program("fetch", torrent, "--to", disk / "to", "--web-seed", server.url, *options)


def _repair(disk: Path, origin: Path, torrent: Path) -> None:
    _swarm(disk, origin, torrent)
    damaged = disk / "to/top/deep/c"
    with damaged.open("r+b") as file:
        file.seek(PIECE)
        file.write(bytes(100))
    with seed(torrent.read_bytes(), origin, SwarmSettings.loopback()) as seeder:
        peer = f"127.0.0.1:{seeder.port}"
        program("fetch", disk / "to", "--repair", "--peer", peer, *SWARM)


def _adoption(disk: Path, origin: Path, torrent: Path) -> None:
    for path, data in FILES.items():
        target = disk / "to" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if path != "a":
            target.write_bytes(data)
            flush(target)
    for folder in (disk / "to/deep", disk / "to", disk):
        flush(folder)
    _swarm(disk, origin, torrent)


def _verify(disk: Path, origin: Path, torrent: Path) -> None:
    _swarm(disk, origin, torrent)
    program("verify", disk / "to")


def flush(path: Path) -> None:
    """Force a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_SCENARIOS = {
    "swarm": _swarm,
    "mirror": _mirror,
    "repair": _repair,
    "adoption": _adoption,
    "verify": _verify,
}
NAMES = tuple(_SCENARIOS)
ALONE = ("swarm", "mirror", "verify")
"""Those in which nobody but the program writes, so that a fault meets the program."""
