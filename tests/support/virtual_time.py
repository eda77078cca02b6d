"""Event loops in virtual time: waiting takes no real time, and has a limit."""

from __future__ import annotations

import asyncio
import contextlib
import math
import selectors

PATIENCE_S, LOOK_S = 60, 10
"""Real seconds that a loop waits for another thread, and between looks at it: if the machine stands
still for a while, no thread makes progress in that time."""


class Hung(BaseException):
    """Something has taken too long, or waits for what never comes."""


class Clock:
    """A clock in seconds, which its loops advance.

    `working` says whether another thread is working; its result is waited for in real time.
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
        """Replaces `asyncio.run`."""
        with asyncio.Runner(loop_factory=self.loop) as runner:
            return runner.run(main)

    @contextlib.contextmanager
    def most(self, seconds):
        """The block may take at most `seconds`."""
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
            # Only another thread can cause the next event.
            for _ in range(PATIENCE_S // LOOK_S):
                ready = super().select(LOOK_S)
                if ready:
                    return ready
            raise Hung("it waits although nothing is in progress any more")
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
        # A thread would run in real time.
        done = self.create_future()
        try:
            done.set_result(function(*args))
        except Exception as error:  # noqa: BLE001  # it is passed on
            done.set_exception(error)
        return done
