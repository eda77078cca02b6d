"""Whole files from mirrors alone, where a manifest gives their sha256 and there is no torrent.

An incomplete file has another name (`part_name`), and none of its bytes is proven; the next fetch
continues at its end. Once it is complete it is read back, and gets its own name only if its sha256
is the manifest's. A wrong file is reported with the mirror that sent it, and is fetched again from
the start, from another mirror if there is one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import queue
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from grokfetch.errors import (
    Contradiction,
    GrokfetchError,
    OutOfReach,
    SourceInvalid,
    Stalled,
    StorageFailed,
    storage_errors,
    storage_failed,
)
from grokfetch.events import FetchEvent, Finding, Notice, Origin, Outcome, Phase, Status
from grokfetch.fetch import preflight
from grokfetch.fetch.mirror import Mirrors, Told, deliver, mirror_name
from grokfetch.fetch.prepare import Asked, selected
from grokfetch.folder.documents import part_name
from grokfetch.folder.payload import flush, refuse_linked_folders
from grokfetch.folder.record import FileProof
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, ManifestFile
from grokfetch.torrent.layout import BLOCK, Layout
from grokfetch.torrent.read_back import CHUNK, sha256_of

__all__ = ["bring_whole"]

MOST_WRONG = 2
"""How many times one mirror may send a wrong file."""


def bring_whole(  # noqa: PLR0913  # store and source, and what a fetch may choose
    store: Store,
    mirrors: Mirrors,
    *,
    manifest: Manifest | None,
    request: Asked | None,
    repair: bool,
    stall_s: float,
    clock: Callable[[], float],
) -> Iterator[FetchEvent]:
    """Bring the files of a manifest into a locked folder, and prove them by their sha256.

    Args:
        store: the folder, locked.
        mirrors: where from.
        manifest: what they must be; by default the manifest in force.
        request: what is asked for, as for `grokfetch.fetch.fetch`; files are brought whole.
        repair: read back first what was proven before.
        stall_s: patience without a byte, in seconds.
        clock: monotonic seconds.

    Raises:
        Contradiction: the folder was begun with a torrent, or every mirror sends wrong files.
        SourceInvalid: there is no mirror, or a file has no sha256.
        OutOfReach: no mirror has a file.
        Stalled: no byte came for too long.
        StorageFailed: the disk does not take them.
    """
    _settle(store, mirrors, manifest, request)
    asked = store.asked()
    files = [it for it in store.manifest().files if asked is None or it.path in asked]
    bringing = _Bringing(store, mirrors, files, clock)
    yield from bringing.look(repair=repair)
    with contextlib.closing(bringing.bring(stall_s)) as events:
        yield from events
    yield bringing.status("done")
    yield Outcome(bringing.total, bringing.fetched, bringing.rehashed)


def _settle(
    store: Store, mirrors: Mirrors, manifest: Manifest | None, request: Asked | None
) -> None:
    earlier = store.manifest_or_none()
    wanted = manifest or store.manifest()
    if store.torrent() is not None:
        raise Contradiction("this folder was begun with a torrent", path=store.root)
    unknown = next((file.path for file in wanted.files if file.sha256 is None), None)
    if not mirrors.addresses or unknown is not None:
        raise SourceInvalid(
            "the manifest has no magnet link, and "
            + (f"no sha256 of {unknown}" if unknown else "no mirror is named"),
            path=store.root,
            hint="name a SOURCE, and the manifest with --manifest"
            + ("" if unknown else "; or name a mirror: --web-seed URL"),
        )
    if wanted != earlier:
        store.save_manifest(wanted)
    if callable(request):
        request = request(wanted, Layout(wanted.name, 1, BLOCK, (), b""))
    selection = selected(store, request, everything=earlier is not None)
    if selection != store.selection():
        store.save_selection(selection)


@dataclasses.dataclass(slots=True)
class _File:
    """A file under way.

    `senders` have sent what is there of it, `earlier` is whether some of it came in an earlier
    fetch. `wrong` counts, for each mirror, how often it sent the file wrong, and `refused` are the
    mirrors that do not have it.
    """

    entry: ManifestFile
    part: Path
    done: int = 0
    senders: dict[str, None] = dataclasses.field(default_factory=dict)
    earlier: bool = False
    wrong: Counter[str] = dataclasses.field(default_factory=Counter)
    refused: dict[str, GrokfetchError] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        return self.entry.size

    def take(self, data: memoryview) -> None:
        with storage_errors(self.part):
            self.part.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            handle = os.open(self.part, flags, 0o666)
            try:
                while data:
                    written = os.pwrite(handle, data, self.done)
                    data = data[written:]
                    self.done += written
            finally:
                os.close(handle)

    def restart(self) -> None:
        with storage_errors(self.part):
            self.part.unlink(missing_ok=True)
        self.done, self.earlier = 0, False
        self.senders.clear()

    def mirrors(self, addresses: tuple[str, ...]) -> list[str]:
        """The mirrors that may still have the right file, the best first."""
        able = [it for it in addresses if it not in self.refused and self.wrong[it] < MOST_WRONG]
        return sorted(able, key=lambda address: self.wrong[address])


class _Bringing:
    """Files of a folder on their way."""

    def __init__(
        self,
        store: Store,
        mirrors: Mirrors,
        files: list[ManifestFile],
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._mirrors = mirrors
        self._files = files
        self._clock = clock
        self._open: dict[PurePosixPath, _File] = {}
        self._buffer = memoryview(bytearray(CHUNK))
        self._sent: Counter[Origin] = Counter()
        self.total = sum(file.size for file in files)
        self._proven = 0
        self.fetched = self.rehashed = 0

    def status(self, phase: Phase, rate: float = 0.0) -> Status:
        """The progress: proven files, and what is there of others."""
        return Status(
            phase,
            self._proven + sum(file.done for file in self._open.values()),
            self.total,
            rate,
            proven=self._proven,
            sent=dict(self._sent),
            mirrors=len(self._mirrors.addresses),
        )

    # --- what is there ------------------------------------------------------------------------

    def look(self, *, repair: bool) -> Iterator[FetchEvent]:
        """Accept what is proven, read back what may be complete, and list the rest."""
        proven = self._store.proven()
        for file in self._files:
            path = self._store.payload(file.path)
            now = self._store.stamp(file.path)
            if not repair and proven.whole(file):
                self._proven += file.size
            elif now is not None and now.size == file.size and self._prove(file, path):
                self.rehashed += 1
            else:
                if now is not None:
                    detail = "it is not the manifest's file; another takes its place"
                    yield Finding("corrupt", file.path, detail=detail)
                self._begin(file)
            yield self.status("checking")
        wanted = [(part_name(path), it.size) for path, it in self._open.items()]
        preflight.check(self._store.root, wanted)

    def _begin(self, file: ManifestFile) -> None:
        part = self._store.payload(part_name(file.path))
        refuse_linked_folders(self._store, part)
        begun = self._open[file.path] = _File(file, part)
        try:
            begun.done = part.stat().st_size
        except OSError:
            begun.done = 0
        begun.earlier = begun.done > 0
        if begun.done > file.size or part.is_symlink():
            begun.restart()

    # --- bringing -----------------------------------------------------------------------------

    def bring(self, stall_s: float) -> Generator[FetchEvent, None, None]:
        """Have the files brought in rounds, until each is right or no mirror is left to ask."""
        for file in list(self._open.values()):
            if file.done == file.size:
                yield from self._whole(file)
        while self._open:
            work: dict[str, dict[PurePosixPath, _File]] = {}
            for number, (path, file) in enumerate(self._open.items()):
                able = file.mirrors(self._mirrors.addresses)
                if able:
                    best = [it for it in able if file.wrong[it] == file.wrong[able[0]]]
                    work.setdefault(best[number % len(best)], {})[path] = file
            if not work:
                self._give_up()
            with contextlib.closing(self._round(work, stall_s)) as events:
                yield from events

    def _round(
        self, work: dict[str, dict[PurePosixPath, _File]], stall_s: float
    ) -> Generator[FetchEvent, None, None]:
        happened: queue.SimpleQueue[tuple[str, _File, Told]] = queue.SimpleQueue()
        stop: Callable[[], None]
        begun = threading.Event()

        def ready(cancel: Callable[[], None]) -> None:
            nonlocal stop
            stop = cancel
            begun.set()

        def tell(address: str, path: PurePosixPath, what: Told) -> None:
            happened.put((address, work[address][path], what))

        # If a mirror only makes us wait, another is asked for its files before we give up.
        settings = self._mirrors.settings
        settings = dataclasses.replace(settings, limited_s=min(settings.limited_s, stall_s))
        alive = started = self._clock()
        received = 0
        with ThreadPoolExecutor(1, "mirrors") as thread:
            running = thread.submit(deliver, work, settings, tell, ready)
            begun.wait()
            try:
                while not running.done() or not happened.empty():
                    with contextlib.suppress(queue.Empty):
                        address, file, what = happened.get(timeout=0.2)
                        if isinstance(what, int):
                            alive = self._clock()
                            received += what
                            self._sent[Origin("mirror", mirror_name(address))] += what
                            file.senders[address] = None
                        elif what is None:
                            yield from self._whole(file)
                        elif isinstance(what, Notice):
                            yield what
                        else:
                            file.refused[address] = what
                            yield Notice(f"mirror {mirror_name(address)}: {what.what}")
                    now = self._clock()
                    if now - alive > stall_s:
                        raise Stalled(f"no data for {stall_s:.0f} s", path=self._store.root)
                    yield self.status("downloading", received / max(now - started, 0.2))
            finally:
                stop()
            running.result()

    def _whole(self, file: _File) -> Iterator[FetchEvent]:
        """Read back a complete file."""
        entry = file.entry
        if self._prove(entry, file.part):
            self.fetched += 1
            del self._open[entry.path]
            return
        names = ", ".join(map(mirror_name, file.senders))
        if file.earlier or len(file.senders) != 1:
            names = " and ".join(filter(None, (names, "an earlier fetch" if file.earlier else "")))
        else:
            file.wrong.update(list(file.senders))
        yield Finding(
            "corrupt", entry.path, detail=f"its sha256 is not the manifest's; it came from {names}"
        )
        file.restart()

    def _prove(self, entry: ManifestFile, path: Path) -> bool:
        """Whether a file is the manifest's; if so, give it its name and record it."""
        try:
            if entry.size == 0 and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
            if sha256_of(path, self._buffer).sha256 != entry.sha256:
                return False
            flush([path], self._store.root)
            target = self._store.payload(entry.path)
            if path != target:
                path.replace(target)
                flush([target], self._store.root)
        except OSError as error:
            raise storage_failed(error, path) from error
        stamp = self._store.stamp(entry.path)
        if stamp is None:
            raise StorageFailed("it has gone while it was read", path=path)
        record = self._store.record()
        files = {**record.files, entry.path: FileProof(stamp, entry.sha256)}
        self._store.save_record(dataclasses.replace(record, files=files))
        self._proven += entry.size
        return True

    def _give_up(self) -> None:
        file = next(iter(self._open.values()))
        faults = [
            f"{mirror_name(address)}: {error.what}" for address, error in file.refused.items()
        ]
        faults += [f"{mirror_name(address)} sends another file" for address in file.wrong]
        stalled = any(isinstance(error, Stalled) for error in file.refused.values())
        kind = Contradiction if file.wrong else Stalled if stalled else OutOfReach
        raise kind(
            f"no mirror has it as the manifest says ({len(self._open)} such files): "
            + "; ".join(faults),
            path=self._store.payload(file.entry.path),
            hint="name another mirror: --web-seed URL; what has arrived is kept",
        )
