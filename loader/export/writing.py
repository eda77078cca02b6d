"""Writes the files of an export on all cores, in bounded memory; resumes with what is missing.

    OUT/NAME.part            a file being written; it gets its name when all files are complete
    OUT/NAME
    OUT/.grokfetch/          as in every checkpoint folder (`grokfetch.folder.store`): lock,
        manifest.json        what the export must hold, with the sha256 of what was read back
        record.json          the proof of that
        export.json          schema (`SCHEMA`), the plan's digest, and by name the tensors on the
                             disk, each with size and mtime_ns of the shard it was made from, and
                             first byte, length and CRC-32 of each span that was written

A tensor is recorded after its bytes have been flushed to the disk. What `export.json` does not name
is written again, and so is what does not read back as it was written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any, Final

from grokfetch.errors import (
    Contradiction,
    Inexact,
    NotProven,
    StorageFailed,
    storage_errors,
    storage_failed,
)
from grokfetch.events import Finding, Progress
from grokfetch.folder import advisory
from grokfetch.folder.atomic import flush
from grokfetch.folder.known import EXPORT
from grokfetch.folder.record import Stamp
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest
from grokfetch.process_limits import cores
from loader.export.checksums import Written, read_back
from loader.export.jobs import Job, Work, encoded, rows_of
from loader.export.layout import Part, Plan
from loader.export.matrices import bytes_of, float16_scales
from loader.export.target_file import TargetFile
from loader.weights.checkpoint import Checkpoint

__all__ = ["Export", "check_scales"]

SCHEMA: Final = 2
WITHOUT_CHECKSUMS: Final = 1
"""The previous schema: it has no checksums to compare, so everything is written again."""

MOST_THREADS: Final = 24
MOST_COPIES: Final = 2
"""Most matrices in memory at a time if files cannot be mapped."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    """A tensor that is on the disk: the stamp of its shard, and the spans that were written."""

    stamp: Stamp
    written: tuple[Written, ...]


class Export:
    """One export into a folder whose exclusive lock is held.

    Args:
        plan: what to write.
        checkpoint: where the weights come from; if it is still being fetched, each tensor is
            written once it has arrived.
        store: the folder.

    Raises:
        Contradiction: another export was begun there.
        StorageFailed: other files are where its files must go.
    """

    def __init__(self, plan: Plan, checkpoint: Checkpoint, store: Store) -> None:
        self._plan = plan
        self._checkpoint = checkpoint
        self._store = store
        self._state = store.state / EXPORT
        self._paths = [store.root / file.name for file in plan.files]
        self._partial = [path.with_name(f"{path.name}.part") for path in self._paths]
        self._copies = threading.Semaphore(MOST_COPIES)
        self._stopped = threading.Event()
        self._done = self._begun()
        self._changed = False

    @property
    def missing(self) -> list[tuple[PurePosixPath, int]]:
        """The files that are still to be written, with their sizes."""
        both = zip(self._plan.files, self._paths, self._partial, strict=True)
        return [
            (PurePosixPath(partial.name), file.size)
            for file, path, partial in both
            if not _has_size(path, file.size)
        ]

    @property
    def kept(self) -> int:
        """Tensors that are on the disk already."""
        return len(self._done)

    @property
    def whole(self) -> bool:
        """Whether everything has been written and read back, and is unchanged since."""
        if (
            self.missing
            or self.kept < len(self._plan.parts)
            or self._store.manifest_or_none() is None
        ):
            return False
        try:
            self._store.require_all()
        except NotProven:
            return False
        return True

    def _begun(self) -> dict[str, _Kept]:
        """The tensors that are on the disk.

        They do not count if their file is missing, or the shard has changed since.
        """
        known = advisory.read(self._state, SCHEMA, _decoded) or advisory.read(
            self._state, WITHOUT_CHECKSUMS, lambda fields: (str(fields["plan"]), {})
        )
        if known is None:
            for path in (*self._paths, *self._partial):
                if path.exists():
                    raise StorageFailed(
                        "a file is where the export must go", path=path, hint="choose another OUT"
                    )
            return {}
        digest, done = known
        if digest != self._plan.digest:
            raise Contradiction(
                "another export was begun here: of another model, type or version",
                path=self._store.root,
                hint="choose another OUT, or remove this one",
            )
        files = zip(self._plan.files, self._paths, self._partial, strict=True)
        here = [
            _has_size(path, file.size) or _has_size(partial, file.size)
            for file, path, partial in files
        ]
        return {
            part.name: done[part.name]
            for part in self._plan.parts
            if part.name in done
            and here[part.file]
            and self._checkpoint.arrived(part.spec.name)
            and done[part.name].stamp == self._stamp(part)
        }

    def _stamp(self, part: Part) -> Stamp:
        try:
            status = self._checkpoint[part.spec.name].path.stat()
        except OSError as error:
            raise storage_failed(error, reading=True) from error
        return Stamp(status.st_size, status.st_mtime_ns)

    def _fields(self) -> dict[str, Any]:
        done = {
            name: [kept.stamp.size, kept.stamp.mtime_ns, [it.fields for it in kept.written]]
            for name, kept in self._done.items()
        }
        return {"plan": self._plan.digest, "done": done}

    # --- writing ----------------------------------------------------------------------------------

    def write(self) -> Iterator[Progress]:
        """Write what is missing or was not written correctly, and give the files their names.

        Yields:
            Progress, in bytes of the shards.

        Raises:
            Inexact: a weight cannot be represented; names its tensor.
            StorageFailed: a file cannot be written, or a shard cannot be read.
            GrokfetchError: as asking the checkpoint for a tensor raises, or what ended its fetch.
        """
        left = [part for part in self._plan.parts if part.name not in self._done]
        if left or self._changed:
            self._changed = False
            # Without this the next export would take our own files for somebody else's.
            advisory.write_first(self._state, SCHEMA, self._fields())
            with contextlib.ExitStack() as opened:
                with storage_errors(self._store.root):
                    files = self._opened(opened)
                yield from self._write(left, files)
        with storage_errors(self._store.root):
            for path, partial in zip(self._paths, self._partial, strict=True):
                if partial.exists():
                    partial.replace(path)
            flush(self._store.root)

    def _opened(self, opened: contextlib.ExitStack) -> list[TargetFile]:
        """The files under their temporary names, at their full size, with their heads written."""
        files = []
        for file, path, partial in zip(self._plan.files, self._paths, self._partial, strict=True):
            if path.exists() and not partial.exists():
                path.replace(partial)
            files.append(opened.enter_context(TargetFile(partial, file.size)))
            files[-1].write(file.head, 0)
            files[-1].flush()
        # After a power cut, a file with recorded tensors must still have its name.
        flush(self._store.root)
        return files

    def _write(self, left: list[Part], files: Sequence[TargetFile]) -> Iterator[Progress]:
        total = sum(part.source_bytes for part in self._plan.parts)
        done = total - sum(part.source_bytes for part in left)
        work, written = Work(self._checkpoint, left), dict[str, tuple[Written, ...]]()
        spans = defaultdict[str, list[Written]](list)
        threads = min(cores(), MOST_THREADS)
        with ThreadPoolExecutor(threads, "export") as pool, ThreadPoolExecutor(1, "flush") as saver:
            saving = saver.submit(self._keep, {}, files)
            running: dict[Future[Written], Job] = {}
            try:
                while work.left or running:
                    for job in work.take(2 * threads - len(running)):
                        running[pool.submit(self._run, job, files)] = job
                    if not running:
                        work.await_more()
                    ended, _ = wait(running, work.patience_s, FIRST_COMPLETED)
                    for future in ended:
                        job = running.pop(future)
                        spans[job.part.name].append(future.result())
                        if work.ends(job):
                            written[job.part.name] = tuple(spans.pop(job.part.name))
                            done += job.part.source_bytes
                    yield Progress(done, total, "exporting")
                    if written and saving.done():
                        saving.result()
                        saving = saver.submit(self._keep, written, files)
                        written = {}
                saving.result()
                self._keep(written, files)
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                # In the thread that may still be recording others; otherwise one of the two would
                # overwrite what the other has recorded.
                saver.submit(self._keep, written, files)
                raise

    def _keep(
        self, written: Mapping[str, tuple[Written, ...]], files: Sequence[TargetFile]
    ) -> None:
        """Flush tensors to the disk and record them, each with the spans that were written."""
        if not written:
            return
        parts = [part for part in self._plan.parts if part.name in written]
        kept = {part.name: _Kept(self._stamp(part), written[part.name]) for part in parts}
        for index in {part.file for part in parts}:
            with storage_errors(self._partial[index]):
                files[index].flush()
        self._done |= kept
        advisory.write(self._state, SCHEMA, self._fields())

    def _run(self, job: Job, files: Sequence[TargetFile]) -> Written:
        """Write the bytes of a job, which lie one after another."""
        # Each job has its own mapping, which ends with it: mappings of all shards together would
        # have page tables of half a gigabyte.
        tensor = dataclasses.replace(self._checkpoint[job.part.spec.name])
        path = self._partial[job.part.file]
        first, stop, crc32 = None, 0, 0
        with contextlib.nullcontext() if tensor.mappable else self._copies:
            matrix = rows_of(tensor, job.rows)
            try:
                for offset, encoded_data in encoded(job, tensor, matrix):
                    if self._stopped.is_set():
                        # The export has ended, and the result will not be used.
                        break
                    data, start = bytes_of(encoded_data), job.part.offset + offset
                    crc32 = zlib.crc32(data, crc32)
                    files[job.part.file].write(data, start)
                    first = start if first is None else first
                    stop = start + len(data)
            except Inexact as error:
                raise Inexact(error.what, path=tensor.path, hint=error.hint) from None
            except OSError as error:
                raise storage_failed(error, path) from error
        first = stop if first is None else first
        return Written(first, stop - first, crc32)

    # --- reading back -----------------------------------------------------------------------------

    def read_back(self, described: Manifest) -> Iterator[Progress | Finding]:
        """Hash the files as `checksums.read_back` does; bad tensors then count as not written.

        Raises:
            StorageFailed: a file cannot be read, or the state folder cannot be written.
        """
        for event in read_back(self._store, described, self._written()):
            if isinstance(event, Finding):
                self._changed = True
                self._done.pop(event.tensor or "", None)
            yield event

    def _written(self) -> dict[PurePosixPath, dict[Written, str | None]]:
        """The spans that were written of each file, with their tensors."""
        names = [PurePosixPath(file.name) for file in self._plan.files]
        written: dict[PurePosixPath, dict[Written, str | None]] = {
            name: {Written.of(file.head): None}
            for name, file in zip(names, self._plan.files, strict=True)
        }
        for part in self._plan.parts:
            of_tensor = dict.fromkeys(self._done[part.name].written, part.name)
            written[names[part.file]].update(of_tensor)
        return written


def check_scales(checkpoint: Checkpoint) -> None:
    """Return if Q8_0 can represent every scale of a checkpoint exactly.

    Raises:
        Inexact: it cannot; the error names the shard.
        GrokfetchError: as asking the checkpoint for a tensor raises.
    """
    for tensor in checkpoint.values():
        scales = dataclasses.replace(tensor).scales
        if scales is not None:
            try:
                float16_scales(scales)
            except Inexact as error:
                raise Inexact(error.what, path=tensor.path, hint=error.hint) from None


def _decoded(fields: dict[str, Any]) -> tuple[str, dict[str, _Kept]]:
    done = {
        name: _Kept(Stamp(int(size), int(mtime)), tuple(map(Written.from_fields, written)))
        for name, (size, mtime, written) in fields["done"].items()
    }
    return str(fields["plan"]), done


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
