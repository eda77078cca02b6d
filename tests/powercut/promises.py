"""What must hold of every state that a power cut can leave, tried by the next commands."""

import dataclasses
import signal
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path

from powercut.recorder import Operation
from powercut.scenarios import FILES, Recorded, Struck
from powercut.states import Cut, Disk
from support.fake_swarm import FakeSwarm

from grokfetch.errors import GrokfetchError
from grokfetch.events import Outcome, Summary
from grokfetch.fetch import fetch
from grokfetch.folder import record as records
from grokfetch.folder.store import Store
from grokfetch.folder.survey import survey
from grokfetch.folder.verify import verify
from grokfetch.torrent.metainfo import parse_info, parse_torrent

STORAGE_FAILED = 16
DAMAGED = 20
RECORD = "to/.grokfetch/record.json"


@dataclasses.dataclass(frozen=True)
class Tried:
    """One state: the promises that were broken, and bytes that were fetched again."""

    broken: tuple[str, ...]
    fetched: int


def safe_pieces(recorded: Recorded, past: Sequence[Operation]) -> frozenset[int]:
    """The pieces that the last record names which the program had flushed, with its folder.

    Pieces that somebody has damaged since then do not count.
    """
    folder = RECORD.rpartition("/")[0]
    flushes = [at for at, it in enumerate(past) if it.kind == "fsyncdir" and it.path == folder]
    if not flushes:
        return frozenset()
    text = Cut(list(past), flushes[-1] + 1).best().content(RECORD)
    if text is None:
        return frozenset()
    torrent = parse_torrent(recorded.torrent)
    layout = parse_info(torrent.info, torrent.piece_layers)
    now = Cut(list(past), len(past)).best()
    return frozenset(
        piece
        for piece in records.decode(text).pieces
        if all(
            _bytes_at(now, str(part.file.path.relative_to(layout.name)), part.offset, part.length)
            for part in layout.segments(piece)
        )
    )


def _bytes_at(disk: Disk, path: str, offset: int, length: int) -> bool:
    """Whether a disk holds the right bytes of a file, in the torrent's layout or as adopted."""
    right = FILES[path][offset : offset + length]
    there = (disk.content(f"to/top/{path}"), disk.content(f"to/{path}"))
    return any(data is not None and data[offset : offset + length] == right for data in there)


def tried(recorded: Recorded, disk: Disk, safe: frozenset[int]) -> Tried:
    """Lay a state down and run the next commands on it."""
    with tempfile.TemporaryDirectory(prefix="powercut-") as place:
        disk.lay_down(Path(place))
        folder = Path(place) / "to"
        try:
            return _try(recorded, folder, safe)
        except Exception:  # noqa: BLE001 - whatever it is, it is a broken promise
            return Tried((f"a traceback: {traceback.format_exc()}",), 0)


def outlived(struck: Struck) -> Tried:
    """What is left of a program that a failing disk, or SIGKILL, has met, tried in its place."""
    broken = []
    ended = struck.ended
    if ended is not None and ended.code not in (STORAGE_FAILED, DAMAGED, -signal.SIGKILL):
        broken.append(f"exit code {ended.code}: {ended.said[-300:]}")
    if ended is not None and "Traceback" in ended.said:
        broken.append(f"a traceback: {ended.said[-600:]}")
    result = _try(struck.recorded, struck.disk / "to", frozenset())
    return Tried((*broken, *result.broken), result.fetched)


def _try(recorded: Recorded, folder: Path, safe: frozenset[int]) -> Tried:
    torrent = parse_torrent(recorded.torrent)
    broken = list(_trusted_and_wrong(folder))
    swarm = FakeSwarm(torrent, dict(FILES))
    broken += _ends_well(folder, swarm)
    again = safe & set(swarm.fetched)
    if again:
        broken.append(f"pieces {sorted(again)} were flushed and proven, and are fetched again")
    size = swarm.orders[0].layout.piece_size if swarm.orders else None
    return Tried(tuple(broken), sum(map(size, swarm.fetched)) if size else 0)


def _trusted_and_wrong(folder: Path) -> Iterator[str]:
    """Pieces that count as proven here and are not right, before anything reads them back."""
    store = Store(folder)
    try:
        if store.manifest_or_none() is None:
            return
        survey(store)
    except GrokfetchError:
        return
    for path, data in FILES.items():
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
    for path, data in FILES.items():
        entry = next(it for it in store.manifest().files if str(it.path).endswith(path))
        if store.payload(entry.path).read_bytes() != data:
            yield f"after the next fetch {entry.path} is wrong"
