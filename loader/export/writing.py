"""Writes the files of an export: on all cores, in bounded memory, and again only what is missing.

    OUT/NAME.part            a file being written; it gets its name when all files are whole
    OUT/NAME
    OUT/.grokfetch/          as of every checkpoint folder (`grokfetch.folder.store`): lock,
        manifest.json        what the export must hold, with the sha256 of what was read back
        record.json          and that it was
        export.json          schema (`SCHEMA`), the plan's digest, and by name the tensors that are
                             on the disk, each with size and mtime_ns of the shard it was made from

A tensor is recorded after its bytes have been forced to the disk. Losing `export.json` costs time
only: what it does not name is written again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path, PurePosixPath
from typing import Any, Final

from grokfetch.errors import (
    Contradiction,
    Inexact,
    NotProven,
    StorageFailed,
    storage_failed,
)
from grokfetch.events import Progress
from grokfetch.folder import advisory
from grokfetch.folder.atomic import flush
from grokfetch.folder.known import EXPORT
from grokfetch.folder.record import FileProof, Record, Stamp
from grokfetch.folder.store import Store
from grokfetch.folder.verify import hash_files
from grokfetch.manifest.schema import Manifest
from grokfetch.process_limits import cores
from loader.export.jobs import Job, Work, encoded, rows_of
from loader.export.layout import Part, Plan
from loader.export.matrices import float16_scales
from loader.export.target_file import TargetFile
from loader.weights.checkpoint import Checkpoint

__all__ = ["Export", "check_scales", "read_back"]

SCHEMA: Final = 1
MOST_THREADS: Final = 24
MOST_COPIES: Final = 2
"""Matrices that are in memory at a time where files cannot be mapped."""


class Export:
    """One export into a folder whose exclusive lock is held.

    Args:
        plan: what to write.
        checkpoint: where the weights come from; of a folder that is being fetched each tensor is
            written when it has arrived.
        store: the folder.

    Raises:
        Contradiction: another export lies there.
        StorageFailed: other files lie where this one's go.
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

    @property
    def missing(self) -> list[tuple[PurePosixPath, int]]:
        """The files that are still to be written, with their sizes: for a look at the disk."""
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
        """Whether all of it is there, read back and unchanged since."""
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

    def _begun(self) -> dict[str, Stamp]:
        """The tensors that are on the disk, each with the stamp of its shard.

        Where their file has gone, or the shard has changed since, they do not count.
        """
        known = advisory.read(self._state, SCHEMA, _decoded)
        if known is None:
            for path in (*self._paths, *self._partial):
                if path.exists():
                    raise StorageFailed(
                        "a file lies where the export must go", path=path, hint="choose another OUT"
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
            and done[part.name] == self._stamp(part)
        }

    def _stamp(self, part: Part) -> Stamp:
        try:
            status = self._checkpoint[part.spec.name].path.stat()
        except OSError as error:
            raise storage_failed(error) from error
        return Stamp(status.st_size, status.st_mtime_ns)

    def _fields(self) -> dict[str, Any]:
        done = {name: [stamp.size, stamp.mtime_ns] for name, stamp in self._done.items()}
        return {"plan": self._plan.digest, "done": done}

    # --- writing ----------------------------------------------------------------------------------

    def write(self) -> Iterator[Progress]:
        """Write what is missing and give the files their names.

        Yields:
            How far it is, in bytes of the shards.

        Raises:
            Inexact: a weight cannot be written so; names its tensor.
            StorageFailed: a file cannot be written, or a shard cannot be read.
            GrokfetchError: as asking the checkpoint for a tensor raises, or what ended its fetch.
        """
        left = [part for part in self._plan.parts if part.name not in self._done]
        if left:
            # Without it the next export would take our own files for somebody else's.
            advisory.write_first(self._state, SCHEMA, self._fields())
            with contextlib.ExitStack() as opened:
                try:
                    files = self._opened(opened)
                except OSError as error:
                    raise storage_failed(error, self._store.root) from error
                yield from self._write(left, files)
        try:
            for path, partial in zip(self._paths, self._partial, strict=True):
                if partial.exists():
                    partial.replace(path)
            flush(self._store.root)
        except OSError as error:
            raise storage_failed(error, self._store.root) from error

    def _opened(self, opened: contextlib.ExitStack) -> list[TargetFile]:
        """The files under their names for the meantime, at their full size, begun."""
        files = []
        for file, path, partial in zip(self._plan.files, self._paths, self._partial, strict=True):
            if path.exists() and not partial.exists():
                path.replace(partial)
            files.append(opened.enter_context(TargetFile(partial, file.size)))
            files[-1].write(file.head, 0)
        # What is recorded as written must not lose its name in a power cut.
        flush(self._store.root)
        return files

    def _write(self, left: list[Part], files: Sequence[TargetFile]) -> Iterator[Progress]:
        total = sum(part.source_bytes for part in self._plan.parts)
        done = total - sum(part.source_bytes for part in left)
        work, written = Work(self._checkpoint, left), list[Part]()
        threads = min(cores(), MOST_THREADS)
        with ThreadPoolExecutor(threads, "export") as pool, ThreadPoolExecutor(1, "flush") as saver:
            saving = saver.submit(self._keep, [], files)
            running: dict[Future[None], Job] = {}
            try:
                while work.left or running:
                    for job in work.take(2 * threads - len(running)):
                        running[pool.submit(self._run, job, files)] = job
                    if not running:
                        work.await_more()
                    ended, _ = wait(running, work.patience_s, FIRST_COMPLETED)
                    for future in ended:
                        job = running.pop(future)
                        future.result()
                        if work.ends(job):
                            written.append(job.part)
                            done += job.part.source_bytes
                    yield Progress(done, total, "exporting")
                    if written and saving.done():
                        saving.result()
                        saving = saver.submit(self._keep, written, files)
                        written = []
                saving.result()
                self._keep(written, files)
            except BaseException:
                self._stopped.set()
                pool.shutdown(wait=True, cancel_futures=True)
                # By the thread that may still be recording others: whoever wrote last would win.
                saver.submit(self._keep, written, files)
                raise

    def _keep(self, parts: list[Part], files: Sequence[TargetFile]) -> None:
        """Record tensors once their bytes are on the disk."""
        if not parts:
            return
        stamps = {part.name: self._stamp(part) for part in parts}
        for index in {part.file for part in parts}:
            try:
                files[index].flush()
            except OSError as error:
                raise storage_failed(error, self._partial[index]) from error
        self._done |= stamps
        advisory.write(self._state, SCHEMA, self._fields())

    def _run(self, job: Job, files: Sequence[TargetFile]) -> None:
        # A mapping of its own, which goes with the job: those of all shards together would have
        # page tables of half a gigabyte.
        tensor = dataclasses.replace(self._checkpoint[job.part.spec.name])
        path = self._partial[job.part.file]
        with contextlib.nullcontext() if tensor.mappable else self._copies:
            matrix = rows_of(tensor, job.rows)
            try:
                for offset, data in encoded(job, tensor, matrix):
                    if self._stopped.is_set():
                        return
                    files[job.part.file].write(data, job.part.offset + offset)
            except Inexact as error:
                raise Inexact(error.what, path=tensor.path, hint=error.hint) from None
            except OSError as error:
                raise storage_failed(error, path) from error


def read_back(store: Store, described: Manifest) -> Iterator[Progress]:
    """Hash files as they stand on the disk, and make their folder one that `verify` knows.

    Args:
        store: the folder, its exclusive lock held.
        described: its manifest, the files without sha256.

    Raises:
        StorageFailed: a file cannot be read, or the state folder not be written.
    """
    digests, proofs, done = {}, {}, 0
    for file, stamp, result in hash_files(store, described.files, keep=False):
        if result.sha256 is None or stamp is None or stamp != store.stamp(file.path):
            raise StorageFailed(
                f"cannot be read back: {result.detail}", path=store.payload(file.path)
            )
        digests[file.path] = result.sha256
        proofs[file.path] = FileProof(stamp, result.sha256)
        done += file.size
        yield Progress(done, described.size, "hashing")
    files = (dataclasses.replace(it, sha256=digests[it.path]) for it in described.files)
    store.save_manifest(dataclasses.replace(described, files=tuple(files)))
    store.save_record(Record(files=proofs))


def check_scales(checkpoint: Checkpoint) -> None:
    """Return if Q8_0 can hold every scale of a checkpoint as it is.

    Raises:
        Inexact: it cannot; names the shard.
        GrokfetchError: as asking the checkpoint for a tensor raises.
    """
    for tensor in checkpoint.values():
        scales = dataclasses.replace(tensor).scales
        if scales is not None:
            try:
                float16_scales(scales)
            except Inexact as error:
                raise Inexact(error.what, path=tensor.path, hint=error.hint) from None


def _decoded(fields: dict[str, Any]) -> tuple[str, dict[str, Stamp]]:
    done = {name: Stamp(int(size), int(mtime)) for name, (size, mtime) in fields["done"].items()}
    return str(fields["plan"]), done


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False
