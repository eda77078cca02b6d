"""What must hold for every state that a power cut can leave, checked by the next commands."""

import dataclasses
import functools
import json
import os
import signal
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from click.testing import CliRunner
from powercut.recorder import Operation
from powercut.scenarios import (
    FILES,
    MIRROR,
    Recorded,
    Struck,
    describing,
    exporting,
    mirrored,
    mirroring,
    model,
    payload,
    publishing,
    running,
)
from powercut.states import Cut, Disk
from support.fake_swarm import FakeSwarm
from support.program import invoke

from grokfetch.cli import main
from grokfetch.errors import (
    Damaged,
    GrokfetchError,
    NotProven,
    SourceInvalid,
    StateMissing,
    StorageFailed,
)
from grokfetch.events import Outcome, Summary
from grokfetch.fetch import fetch
from grokfetch.fetch.preflight import TRIAL
from grokfetch.folder import journal
from grokfetch.folder import record as records
from grokfetch.folder.known import made_here
from grokfetch.folder.store import Store
from grokfetch.folder.survey import survey
from grokfetch.folder.verify import verify
from grokfetch.manifest import schema
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import Segment
from grokfetch.torrent.metainfo import parse_torrent

MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Where states are tried; nothing needs to reach a disk there."""

STORAGE_FAILED = StorageFailed.exit_code
DAMAGED = Damaged.exit_code
NOT_PROVEN = NotProven.exit_code
RECORD = "to/.grokfetch/record.json"
MANIFEST = ".grokfetch/manifest.json"
HASHED = ".to.publishing/hashed.json"
EXPORTED = "to/.grokfetch/export.json"


@dataclasses.dataclass(frozen=True)
class Tried:
    """The result for one state: broken promises, and bytes that were fetched again."""

    broken: tuple[str, ...]
    fetched: int


def safe(recorded: Recorded, past: Sequence[Operation]) -> frozenset[object]:
    """What has been done, flushed and recorded, and must not have to be done again.

    For a fetch these are numbers of pieces, for an export names of tensors, for publishing from a
    mirror paths of files until their hashes are removed. For other commands it is only the fact
    that they have ended.
    """
    if recorded.name == "export":
        fields = _safe_file(past, EXPORTED)
        return frozenset(json.loads(fields)["done"]) if fields else frozenset()
    if recorded.name == "publish from a mirror":
        return _hashed(past) or frozenset(["ended"][: len(past) == len(recorded.operations)])
    if recorded.name in MADE:
        return frozenset(["ended"][: len(past) == len(recorded.operations)])
    text = _safe_file(past, RECORD)
    if text is None:
        return frozenset()
    torrent = parse_torrent(recorded.torrent)
    layout = parse_info(torrent.info, torrent.piece_layers)
    now = Cut(list(past), len(past)).best()
    # Pieces that were damaged since then do not count.
    return frozenset(
        piece
        for piece in records.decode(text).pieces
        if all(
            _bytes_at(now, recorded.files, str(part.file.path.relative_to(layout.name)), part)
            for part in layout.segments(piece)
        )
    )


def _hashed(past: Sequence[Operation]) -> frozenset[object]:
    """Files whose hashes are kept; once those are being removed, the fact that it has ended."""
    if any(
        it.kind == "unlink" and it.path.startswith(f"{PurePath(HASHED).parent}/") for it in past
    ):
        return frozenset(["ended"])
    fields = _safe_file(past, HASHED)
    return frozenset(json.loads(fields)["files"]) if fields else frozenset()


def _safe_file(past: Sequence[Operation], path: str) -> bytes | None:
    """A state file as it was when its folder was last flushed."""
    folder = path.rpartition("/")[0]
    flushes = [at for at, it in enumerate(past) if it.kind == "fsyncdir" and it.path == folder]
    return Cut(list(past), flushes[-1] + 1).best().content(path) if flushes else None


def _bytes_at(disk: Disk, files: Mapping[str, bytes], path: str, part: Segment) -> bool:
    """Whether a disk holds the right bytes of a file, in the torrent's layout or as adopted."""
    span = slice(part.offset, part.offset + part.length)
    there = (disk.content(f"to/top/{path}"), disk.content(f"to/{path}"))
    return any(data is not None and data[span] == files[path][span] for data in there)


def tried(recorded: Recorded, disk: Disk, kept: frozenset[object]) -> Tried:
    """Write a state to the disk and run the next commands on it."""
    with tempfile.TemporaryDirectory(prefix="powercut-", dir=MEMORY) as place:
        disk.lay_down(Path(place))
        try:
            return _try(recorded, Path(place) / "to", kept)
        except Exception:  # noqa: BLE001 - whatever it is, it is a broken promise
            return Tried((f"a traceback: {traceback.format_exc()}",), 0)


def outlived(struck: Struck) -> Tried:
    """Check what a program has left after a disk fault or SIGKILL, in the folder itself."""
    fault, ended = struck.fault, struck.ended
    assert fault is not None
    broken = []
    if ended is not None and not _clear(ended.code, fault.action):
        broken.append(f"exit code {ended.code}: {ended.said[-300:]}")
    if ended is not None and "Traceback" in ended.said:
        broken.append(f"a traceback: {ended.said[-600:]}")
    # The text to compare with is only made when it is needed: it takes seconds, because of jax.
    if fault.action != "flip" and struck.text is not None and struck.text != _text():
        broken.append(f"a run that ended well has said {struck.text}")
    folder = struck.disk / "to"
    try:
        # The files of a server are not on this disk.
        if fault.action == "flip" and folder.is_dir():
            broken += _found_by_verification(struck.recorded, folder)
        if fault.action == "truncated" and struck.recorded.name == "run":
            _refused_until_it_is_back(folder)
        result = _try(struck.recorded, folder, frozenset())
    except Exception:  # noqa: BLE001 - whatever it is, it is a broken promise
        result = Tried((f"a traceback: {traceback.format_exc()}",), 0)
    return Tried((*broken, *result.broken), result.fetched)


def _clear(code: int, action: str) -> bool:
    """Whether an exit code reports what has happened."""
    match action:
        # After half a read, or a truncation, the rest of a page reads as zeros.
        case "flip" | "short" | "truncated":
            return code >= SourceInvalid.exit_code
        case "kill":
            return code in (STORAGE_FAILED, DAMAGED, -signal.SIGKILL)
    return code in (STORAGE_FAILED, DAMAGED)


@functools.cache
def _text() -> str:
    """The output of a run without a fault."""
    return invoke(*running(model())).stdout


def _found_by_verification(recorded: Recorded, folder: Path) -> Iterator[str]:
    """Check that a silently changed bit is found by `verify`, which reads everything back."""
    said = CliRunner().invoke(main, ["verify", str(folder)])
    if said.exit_code and said.exit_code < SourceInvalid.exit_code:
        yield f"verify ends with {said.exit_code}: {said.output[-300:]} {said.exception!r}"
    yield from _trusted_and_wrong(folder, _right(recorded))
    if said.exit_code == 0:
        store = Store(folder)
        for entry in store.manifest().files:
            right = [it for path, it in _right(recorded).items() if str(entry.path).endswith(path)]
            if right and store.payload(entry.path).read_bytes() not in right:
                yield f"verify finds nothing wrong with {entry.path}"


def _refused_until_it_is_back(folder: Path) -> None:
    """Check that a shorter file is not trusted, and that `verify` proves it once it is restored."""
    right = payload(model())
    right[MANIFEST] = (model() / MANIFEST).read_bytes()
    shorter = [path for path, data in right.items() if (folder / path).read_bytes() != data]
    if shorter:
        invoke(*running(folder), code=StateMissing.exit_code if MANIFEST in shorter else NOT_PROVEN)
    for path in shorter:
        (folder / path).write_bytes(right[path])
    invoke("verify", folder)


def _right(recorded: Recorded) -> Mapping[str, bytes]:
    """What the files of a scenario must hold."""
    if recorded.name not in MADE:
        return recorded.files
    if recorded.name == "export":
        return _export()
    if recorded.name == "publish from a mirror":
        return {}
    return FILES if recorded.name.startswith("publish") else payload(model())


def _try(recorded: Recorded, folder: Path, kept: frozenset[object]) -> Tried:
    if recorded.name in MADE:
        exported = recorded.name == "export"
        broken = [] if exported else list(_trusted_and_wrong(folder, _right(recorded)))
        return Tried((*broken, *MADE[recorded.name](folder, kept)), 0)
    torrent = parse_torrent(recorded.torrent)
    broken = list(_trusted_and_wrong(folder, recorded.files))
    swarm = FakeSwarm(torrent, dict(recorded.files))
    broken += _ends_well(folder, swarm)
    broken += [f"a trial is left: {it}" for it in folder.parent.rglob(f"{TRIAL}*")]
    again = kept & set(swarm.fetched)
    if again:
        broken.append(
            f"pieces {sorted(map(str, again))} were flushed and proven, and are fetched again"
        )
    size = swarm.orders[0].layout.piece_size if swarm.orders else None
    return Tried(tuple(broken), sum(map(size, swarm.fetched)) if size else 0)


def _trusted_and_wrong(folder: Path, right: Mapping[str, bytes]) -> Iterator[str]:
    """Bytes that count as proven and are wrong, before anything reads them back."""
    store = Store(folder)
    try:
        if store.manifest_or_none() is None:
            return
        survey(store)
    except GrokfetchError:
        return
    for path, data in right.items():
        entries = [it for it in store.manifest().files if str(it.path).endswith(path)]
        for entry in entries:
            for start in range(0, max(1, len(data)), 4096):
                length = min(4096, len(data) - start)
                try:
                    store.require(entry.path, start, length)
                except GrokfetchError:
                    continue
                there = store.payload(entry.path).read_bytes()[start : start + length]
                if there != data[start : start + length]:
                    yield f"byte {start} and on of {entry.path} count as proven and are wrong"


def _ends_well(folder: Path, swarm: FakeSwarm) -> Iterator[str]:
    """The verdict of `verify` and the end of the next fetch."""
    store = Store(folder)
    try:
        known = store.manifest_or_none() is not None
    except GrokfetchError as error:
        yield f"a state file is the end of the program: {error}"
        return
    *_, outcome = fetch(Store(folder), swarm)
    if not isinstance(outcome, Outcome):
        yield "the next fetch did not end well"
    *_, summary = verify(Store(folder))
    if not isinstance(summary, Summary) or not summary.complete:
        yield f"after the next fetch not everything is proven (manifest known: {known})"
    store = Store(folder)
    for path, data in swarm.files.items():
        entry = next(it for it in store.manifest().files if str(it.path).endswith(path))
        if store.payload(entry.path).read_bytes() != data:
            yield f"after the next fetch {entry.path} is wrong"


# --- commands that make something of files that are there -----------------------------------------


def _outputs(folder: Path) -> tuple[Path, Path]:
    """The torrent and the manifest of a published folder."""
    return folder.with_name("to.torrent"), folder.with_name("to.json")


def _published(folder: Path, kept: frozenset[object]) -> Iterator[str]:
    torrent, described = _outputs(folder)
    if kept and not (torrent.exists() and described.exists()):
        yield "what was published is lost after its command has ended"
    # Existing ones must be complete; half a document is an error here.
    if torrent.exists():
        parse_torrent(torrent.read_bytes())
    if described.exists():
        schema.parse(described.read_bytes(), "manifest")
    yield from _made(folder, publishing(folder), kept)
    files = schema.parse(described.read_bytes(), "manifest").files
    if {str(it.path) for it in files} != {f"to/{path}" for path in FILES}:
        yield "what is published then is another folder"
    if Store(folder).manifest().files and not made_here(Store(folder)):
        yield "what is published then counts as fetched"


def _mirrored(folder: Path, kept: frozenset[object]) -> Iterator[str]:
    torrent, described = _outputs(folder)
    if "ended" in kept and not (torrent.exists() and described.exists()):
        yield "what was published is lost after its command has ended"
    right = _published_from_mirror()
    for path, data in zip((torrent, described), right, strict=True):
        if path.exists() and path.read_bytes() != data:
            yield f"{path.name} is not what it should be"
    with mirrored() as server:
        invoke(*mirroring(folder, server))
    # The length of each is requested first.
    asked = [f"to/{url.removeprefix(f'{MIRROR}/')}" for url in server.asked]
    again = sorted(str(path) for path in kept if asked.count(str(path)) > 1)
    if again:
        yield f"{again} were hashed, flushed and recorded, and are fetched again"
    if (torrent.read_bytes(), described.read_bytes()) != right:
        yield "what is published then is not what it should be"


@functools.cache
def _published_from_mirror() -> tuple[bytes, bytes]:
    """Torrent and manifest without a fault."""
    with tempfile.TemporaryDirectory(prefix="powercut-") as place, mirrored() as server:
        invoke(*mirroring(Path(place) / "to", server))
        torrent, described = _outputs(Path(place) / "to")
        return torrent.read_bytes(), described.read_bytes()


def _described(folder: Path, kept: frozenset[object]) -> Iterator[str]:
    yield from _made(folder, describing(folder), kept)


def _has_run(folder: Path, kept: frozenset[object]) -> Iterator[str]:
    store = Store(folder)
    # Nothing of the model was written.
    store.require_all()
    before = journal.runs(store)
    if kept and not before:
        yield "the run that has ended is not in the history"
    journal.add_run(store, RUN)
    if len(journal.runs(store)) != len(before) + 1:
        yield "the next run is not in the history"
    yield from _made(folder, ("status", folder), kept)


def _exported(folder: Path, kept: frozenset[object]) -> Iterator[str]:
    result = invoke(*exporting(folder), "--json")
    events = list(map(json.loads, result.stdout.splitlines()))
    if lost := [it["tensor"] for it in events if it["event"] == "finding"]:
        yield f"{lost} were recorded and are not on the disk"
    (end,) = [it for it in events if "kept" in it]
    if end["kept"] < len(kept):
        yield f"{len(kept)} tensors were flushed and recorded, {end['kept']} are kept"
    invoke("verify", folder)
    # libfuse renames an open file that is removed, and that name may come back after a cut.
    if not _export().items() <= payload(folder).items():
        yield "what is exported then is not what it should be"


@functools.cache
def _export() -> dict[str, bytes]:
    """The files of an export without a fault."""
    with tempfile.TemporaryDirectory(prefix="powercut-") as place:
        invoke(*exporting(Path(place) / "to"))
        return payload(Path(place) / "to")


def _made(folder: Path, again: tuple[object, ...], kept: frozenset[object]) -> Iterator[str]:
    """Check that what has ended is proven unchanged, and the command and `verify` succeed again."""
    try:
        Store(folder).require_all()
    except GrokfetchError as error:
        if kept:
            yield f"what was proven when the command ended is so no more: {error}"
    invoke(*again)
    invoke("verify", folder)


MADE = {
    "publish": _published,
    "publish again": _published,
    "publish from a mirror": _mirrored,
    "manifest": _described,
    "run": _has_run,
    "export": _exported,
}
"""By command, the check after it, which takes the folder and what is safe."""

RUN = journal.Run(1.0, "mapped", "cpu", 1, 1, 1.0, 1, 1, 1.0, None, None, None, None)
