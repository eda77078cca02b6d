"""Saving proofs while more come: data is flushed beside the work, then the record is written.

Flushing a second's worth of a fast download takes most of a second. In a thread of its own it keeps
the disk busy from the first bytes on, and nothing waits for it but the record.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

from grokfetch.errors import StorageFailed
from grokfetch.folder.ledger import Proofs, flush

__all__ = ["Saver"]

FLUSH_BYTES = 256 << 20
"""So many proven bytes are worth a flush of their own."""

AFTER_FILE_S = 0.5
"""How soon after another record one is written because a file has become whole."""


class Saver:
    """Keeps the record at most `save_s` behind what is proven, or as far as the disk is slow.

    A record that is twice as old as it should be is waited for.

    Args:
        proofs: what to save.
        save_s: seconds between two writings of the record.
        clock: monotonic seconds.
    """

    def __init__(self, proofs: Proofs, save_s: float, clock: Callable[[], float]) -> None:
        self._proofs = proofs
        self._save_s = save_s
        self._clock = clock
        self._written_at = clock()
        self._pool = ThreadPoolExecutor(1, "flush")
        self._flush: Future[None] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def turn(self) -> None:
        """Do what is due; called after every event.

        Raises:
            StorageFailed: data cannot be flushed, or the record not be written.
        """
        age = self._clock() - self._written_at
        due = age >= self._save_s or (self._proofs.whole_file and age >= AFTER_FILE_S)
        if self._flush is None and (due or self._proofs.unflushed_bytes >= FLUSH_BYTES):
            self._flush = self._pool.submit(flush, self._proofs.begin_flush(), self._proofs.root)
        if self._flush is not None and (self._flush.done() or age >= 2 * self._save_s):
            self.settle()
            if due:
                self._proofs.write()
                self._written_at = self._clock()

    def settle(self) -> None:
        """Wait for the flush under way.

        Raises:
            StorageFailed: the disk refuses; what it was about is doubted.
        """
        if self._flush is None:
            return
        running, self._flush = self._flush, None
        try:
            running.result()
        except StorageFailed:
            self._proofs.end_flush(well=False)
            raise
        self._proofs.end_flush(well=True)
