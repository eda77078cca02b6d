"""Event loops whose time passes at once when nothing else is to be done, and ends some day."""

from __future__ import annotations

import asyncio
import contextlib
import math
import selectors

PATIENCE_S, LOOK_S = 60, 10
"""Real seconds that a loop waits for another thread, and how often it looks again meanwhile: where
the machine stands still for a while, no thread has had any time of it."""


class Hung(BaseException):
    """Something has not ended in its time, or waits for what never comes."""


class Clock:
    """Seconds, which its loops let pass.

    `working` says whether a thread is at work, whose result a loop waits for in real time.
    """

    def __init__(self, working=lambda: False):
        self.now = 1000.0
        self.ends = math.inf
        self.working = working

    def monotonic(self):
        return self.now

    def loop(self):
        return _Loop(self)

    def run(self, main, **_):
        """In place of `asyncio.run`."""
        with asyncio.Runner(loop_factory=self.loop) as runner:
            return runner.run(main)

    @contextlib.contextmanager
    def most(self, seconds):
        """Nothing in the block may take longer."""
        self.ends = self.now + seconds
        try:
            yield
        finally:
            self.ends = math.inf


class _Selector(selectors.DefaultSelector):
    def __init__(self, clock):
        super().__init__()
        self._clock = clock

    def select(self, timeout=None):
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self._clock.working():
            # Only another thread can have anything to say.
            for _ in range(PATIENCE_S // LOOK_S):
                ready = super().select(LOOK_S)
                if ready:
                    return ready
            raise Hung("nothing is under way any more, and it waits all the same")
        self._clock.now += timeout
        if self._clock.now > self._clock.ends:
            self._clock.ends = math.inf
            raise Hung("it takes too long")
        return []


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self, clock):
        self._virtual = clock
        super().__init__(_Selector(clock))

    def time(self):
        return self._virtual.now

    def run_in_executor(self, _, function, *args):
        # A thread would work in real time.
        done = self.create_future()
        try:
            done.set_result(function(*args))
        except Exception as error:  # noqa: BLE001  # it is handed on
            done.set_exception(error)
        return done
