"""Real commands, recorded on the file system of `recorder`."""

import contextlib
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from powercut.forking import forked
from powercut.recorder import Fault, Operation, recordings
from support import loadable
from support.program import SIMPLEST
from support.torrents import content, lay_down, torrent_of
from support.web_server import WebServer

from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import encode
from grokfetch.torrent.metainfo import parse_torrent

PIECE = 32768
FILES = {
    "a": content(3 * PIECE - 100),
    "deep/b": content(1000, 1),
    "deep/c": content(6 * PIECE, 2),
    "e": b"",
}
"""Files that share pieces in a v1 torrent."""

MIRROR = "http://mirror.test"

CONFIG = dataclasses.replace(
    loadable.CONFIG, emb_size=64, num_q_heads=2, num_kv_heads=1, num_layers=1, num_experts=2
)


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What a command has done to a disk: its operations, and the files it was about.

    `files` are those of the torrent, by their paths below its top folder. The first `begun`
    operations had been done, and flushed, before the command.
    """

    name: str
    operations: list[Operation]
    begun: int
    torrent: bytes
    files: dict[str, bytes]


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
    """`work / "backing"` as a mounted disk; after the block, the result gives its operations."""
    place, backing, log = (work / name for name in ("disk", "backing", "log"))
    place.mkdir()
    code = "import os\nfrom powercut.recorder import Fault, mount\n"
    code += f"mount({str(place)!r}, {str(backing)!r}, {str(log)!r}, {fault!r})\nos._exit(0)"
    process = forked(code, 1, 2)
    deadline = time.monotonic() + 20
    try:
        while not os.path.ismount(place):
            # Lets the other process run, and looks again.
            if process.wait(0.001) is not None or time.monotonic() > deadline:
                raise RuntimeError("the recording file system did not come up")
        yield place, lambda: recordings(log)
    finally:
        tool = shutil.which("fusermount3") or shutil.which("fusermount") or "fusermount"
        subprocess.run([tool, "-u", "-z", place], check=False, capture_output=True)
        process.wait(20)


class Ended(Exception):
    """A program ended badly: its exit code, and what it said on stderr."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(f"exit code {code}\n{said}")
        self.code = code
        self.said = said


def program(*arguments: object) -> str:
    """The stdout of grokfetch in a separate process, with a planted fault if there is one."""
    call = f"{_planted}\nfrom grokfetch.cli import main\nmain({[*map(str, arguments)]!r})"
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if _planted:
            # The fault must be planted before another module has imported the function.
            command = [sys.executable, "-c", call]
            done = subprocess.run(command, stdout=out, stderr=err, timeout=60, check=False)
            code = done.returncode
        else:
            process = forked(call, out.fileno(), err.fileno())
            code = process.wait(60)
            if code is None:
                process.kill()
                raise TimeoutError(f"not ended after a minute: {call}")
        for file in (out, err):
            file.seek(0)
        if code:
            raise Ended(code, err.read())
        return out.read()


SWARM = ("--listen", "127.0.0.1:0", "--no-discovery", "--no-mirrors")


_planted = ""


@contextlib.contextmanager
def planted(code: str) -> Iterator[None]:
    """Make every program first run `code`, which breaks it."""
    global _planted  # noqa: PLW0603
    _planted = code
    try:
        yield
    finally:
        _planted = ""


@dataclasses.dataclass(frozen=True)
class Struck:
    """A scenario on a disk that failed once, or not at all: how it ended, and the disk then.

    `reached` is False if the scenario had fewer operations than the fault's number. `text` is what
    a successful run has printed.
    """

    recorded: Recorded
    ended: Ended | None
    disk: Path
    reached: bool
    fault: Fault | None
    text: str | None


def record(name: str, work: Path) -> Recorded:
    """Run a scenario of `NAMES`.

    Raises:
        Ended: the command failed.
    """
    done = strike(name, work, None)
    if done.ended is not None:
        raise done.ended
    return done.recorded


def strike(name: str, work: Path, fault: Fault | None) -> Struck:
    """Run a scenario on a disk that fails once."""
    work.mkdir()
    origin, disk = work / "origin", work / "backing"
    files = payload(model()) if name == "while fetching" else FILES
    lay_down(origin, files)
    torrent = torrent_of(origin / "top", PIECE, "v1")
    file = work / "top.torrent"
    file.write_bytes(torrent)
    disk.mkdir()
    prepare, act = _SCENARIOS[name]
    prepare(disk, origin, file)
    ended = text = None
    with recorded_disk(work, fault) as (mounted, operations):
        try:
            text = act(mounted, origin, file)
        except Ended as error:
            ended = error
    noted = operations()
    kinds = [it.kind for it in noted]
    begun = kinds.index("begun")
    del noted[begun]
    recorded = Recorded(name, noted, begun, torrent, files)
    return Struck(recorded, ended, disk, "struck" in kinds, fault, text)


# --- the commands, and what lies on the disk before them ------------------------------------------


def _nothing(_disk: Path, _origin: Path, _torrent: Path) -> None:
    pass


def _swarm(disk: Path, origin: Path, torrent: Path) -> None:
    fetch = ("fetch", torrent, "--to", disk / "to", "--timeout", "30")
    _from_peer(origin, torrent, *fetch)


def _from_peer(origin: Path, torrent: Path, *arguments: object) -> str:
    with seed(torrent.read_bytes(), origin, SwarmSettings.loopback()) as seeder:
        return program(*arguments, "--peer", f"127.0.0.1:{seeder.port}", *SWARM)


def _mirror(disk: Path, _origin: Path, torrent: Path) -> None:
    with WebServer({f"top/{path}": data for path, data in FILES.items()}) as server:
        options = ("--listen", "127.0.0.1:0", "--no-discovery", "--timeout", "30")
        program("fetch", torrent, "--to", disk / "to", "--web-seed", server.url, *options)


def _damaged(disk: Path, origin: Path, torrent: Path) -> None:
    _swarm(disk, origin, torrent)
    with (disk / "to/top/deep/c").open("r+b") as file:
        file.seek(PIECE)
        file.write(bytes(100))


def _repair(disk: Path, origin: Path, torrent: Path) -> None:
    _from_peer(origin, torrent, "fetch", disk / "to", "--repair", "--timeout", "30")


def _brought(disk: Path, _origin: Path, _torrent: Path) -> None:
    for path in ("deep/b", "deep/c", "e"):
        lay_file(disk / "to" / path, FILES[path])


def _verify(disk: Path, _origin: Path, _torrent: Path) -> None:
    program("verify", disk / "to")


def _folder(disk: Path, _origin: Path, _torrent: Path) -> None:
    for path, data in FILES.items():
        lay_file(disk / "to" / path, data)


def _publish(disk: Path, _origin: Path, _torrent: Path) -> None:
    program(*publishing(disk / "to"))


def _publish_mirror(disk: Path, _origin: Path, _torrent: Path) -> None:
    with mirrored() as server:
        program(*mirroring(disk / "to", server))


def _shards(disk: Path, _origin: Path, _torrent: Path) -> None:
    shutil.copytree(model() / "ckpt-0", disk / "to/ckpt-0")
    shutil.copy(model() / "tokenizer.model", disk / "to")


def _manifest(disk: Path, _origin: Path, _torrent: Path) -> None:
    program(*describing(disk / "to"))


def _model(disk: Path, _origin: Path, _torrent: Path) -> None:
    shutil.copytree(model(), disk / "to")


def _run(disk: Path, _origin: Path, _torrent: Path) -> str:
    return program(*running(disk / "to"))


def _while_fetching(disk: Path, origin: Path, torrent: Path) -> str:
    described = torrent.with_suffix(".json")
    known = Store(model()).manifest()
    moved = known.moved({file.path: PurePosixPath("top", file.path) for file in known.files})
    link = parse_torrent(torrent.read_bytes()).info_hash
    whole = dataclasses.replace(moved, info_hash=link, magnet=f"magnet:?xt=urn:btih:{link}")
    described.write_bytes(encode(whole))
    meanwhile = ("--while-fetching", "--source", described)
    return _from_peer(origin, torrent, *running(disk / "to"), *meanwhile)


def _published(disk: Path, origin: Path, torrent: Path) -> None:
    _folder(disk, origin, torrent)
    lay_file(disk / "to/a", content(100, 3))
    _publish(disk, origin, torrent)
    _folder(disk, origin, torrent)


def _export(disk: Path, _origin: Path, _torrent: Path) -> None:
    program(*exporting(disk / "to"))


def publishing(folder: Path) -> tuple[object, ...]:
    """The command that publishes a folder."""
    return ("publish", folder, "--piece-length", PIECE)


def running(folder: Path) -> tuple[object, ...]:
    """The command that generates one token."""
    return ("run", folder, "--tokens", "5 6", "--max-tokens", "1", *SIMPLEST)


def describing(folder: Path) -> tuple[object, ...]:
    """The command that writes a checkpoint's manifest."""
    return ("manifest", folder, "--config", model().with_suffix(".json"))


def mirrored() -> WebServer:
    """A server with `model` at a constant address, reached by using the server as a proxy."""
    return WebServer({f"{MIRROR}/{path}": data for path, data in payload(model()).items()})


def mirroring(folder: Path, server: WebServer) -> tuple[object, ...]:
    """The command that publishes the files of `mirrored`, beside `folder` and under its name."""
    listed = model().with_suffix(".list")
    listed.write_text("\n".join(payload(model())))
    what = ("publish", f"{MIRROR}/{{path}}", "--files", listed, "--name", folder.name)
    how = ("--config", model().with_suffix(".json"), "--piece-length", PIECE)
    return (*what, *how, "--output", folder.parent, "--proxy", server.url)


def exporting(folder: Path) -> tuple[object, ...]:
    """The command that exports `model` into a folder."""
    return ("export", model(), folder, "--type", "bf16", "--split", "100k")


def payload(root: Path) -> dict[str, bytes]:
    """The bytes of a folder's files, without the state."""
    paths = {path: path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    return {
        str(name): path.read_bytes()
        for path, name in sorted(paths.items())
        if name.parts[0] != ".grokfetch"
    }


@functools.cache
def model() -> Path:
    """A small checkpoint, proven by its manifest; it exists as long as this process."""
    place = tempfile.TemporaryDirectory(prefix="powercut-model-")
    _kept.append(place)
    return loadable.make(Path(place.name) / "model", CONFIG)


_kept: list[object] = []


def lay_file(target: Path, data: bytes) -> None:
    """Write a file and the folders above it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)


_SCENARIOS = {
    "swarm": (_nothing, _swarm),
    "mirror": (_nothing, _mirror),
    "repair": (_damaged, _repair),
    "adoption": (_brought, _swarm),
    "verify": (_swarm, _verify),
    "publish": (_folder, _publish),
    "manifest": (_shards, _manifest),
    "run": (_model, _run),
    "export": (_nothing, _export),
    "while fetching": (_nothing, _while_fetching),
    "publish again": (_published, _publish),
    "publish from a mirror": (_nothing, _publish_mirror),
}
"""What is on the disk before, and the command: each takes disk, origin and torrent."""

NAMES = tuple(_SCENARIOS)
