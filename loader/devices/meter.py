"""What this process uses: peak memory, bytes read from the disk, seconds of compiling."""

from __future__ import annotations

import threading
from typing import Self

__all__ = ["Meter"]

INTERVAL_S = 0.1
"""How often memory is measured: Linux keeps no peak of the anonymous part."""


class Meter:
    """Measures while its block runs."""

    def __init__(self) -> None:
        import psutil

        from loader.devices.compile_clock import CompileClock

        self._process = psutil.Process()
        self._compiling = CompileClock()
        self._ended = threading.Event()
        self._before = self._read_bytes()
        self._peak: int | None = None

    def __enter__(self) -> Self:
        self._look()
        self._compiling.start()
        self._thread = threading.Thread(target=self._watch, name="meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._compiling.stop()

    @property
    def compile_s(self) -> float:
        """Seconds of compiling since its block began."""
        return self._compiling.seconds

    @property
    def peak_memory(self) -> int | None:
        """The most anonymous bytes seen, None if the system does not report them.

        Pages of files do not count: the system drops them when it needs the room.
        """
        self._look()
        return self._peak

    @property
    def read(self) -> int | None:
        """Bytes read from the disk, not from memory, since it was made; None if not known.

        Pages of mapped files count, including those that the system reads ahead.
        """
        now = self._read_bytes()
        return None if now is None or self._before is None else now - self._before

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_S):
            self._look()

    def _look(self) -> None:
        memory = self._process.memory_info()
        # proc_pid_statm(5): resident memory not shared with a file is anonymous.
        if hasattr(memory, "shared"):
            self._peak = max(self._peak or 0, memory.rss - memory.shared)

    def _read_bytes(self) -> int | None:
        import psutil

        # proc_pid_io(5): bytes really fetched for this process. Not every system has it.
        if not hasattr(self._process, "io_counters"):
            return None
        try:
            return int(self._process.io_counters().read_bytes)
        except (psutil.AccessDenied, OSError):
            return None
