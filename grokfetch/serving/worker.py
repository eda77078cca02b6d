"""The thread that owns the model, and the event loop's side of it.

Orders go to the thread through a queue; after each step, its results go back to the loop in one
call. Everything except `_work` and what it calls runs in the loop.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from grokfetch.errors import GrokfetchError
from grokfetch.serving.model import Emission, Generation, Model, PrefixCache

__all__ = ["Busy", "Failed", "Worker"]

LONGEST_WAIT_S = 60
SMOOTHING = 0.2

FAILED = "a step of the model failed, and with it all texts in progress"

log = logging.getLogger("grokfetch.serving")


class Busy(Exception):
    """The queue is full.

    Args:
        retry_after: seconds after which there may be room; an integer.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"try again in {retry_after} s")
        self.retry_after = retry_after


class Failed(Exception):
    """A step of the model failed; the log says why."""


class Worker:
    """The texts in progress and in the queue.

    Args:
        model: used by the worker's thread alone.
        slots: how many texts are generated at once.
        queue_length: how many more texts may wait.

    Attributes:
        capacity: how many texts can be in progress and wait together.
        prefix_cache: the model's.
        working: texts that have a slot, as of the latest step.
        failures: steps that failed.
    """

    def __init__(self, model: Model, slots: int, queue_length: int) -> None:
        self._model = model
        self._slots = slots
        self.capacity = slots + queue_length
        self.prefix_cache: PrefixCache = model.prefix_cache
        self._orders: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._texts: dict[int, Texts] = {}
        self._numbers = itertools.count()
        self._seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.working = 0
        self.failures = 0

    @property
    def texts(self) -> int:
        """Texts in progress or in the queue."""
        return len(self._texts)

    @property
    def waiting(self) -> int:
        """Texts in the queue."""
        return max(0, self.texts - self.working)

    def start(self) -> None:
        """Start the thread, which reports to the running loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Tell the thread to end after its step, and wait for it."""
        self._orders.put(None)
        await asyncio.to_thread(self._thread.join)

    def open(self, generations: Sequence[Generation]) -> Texts:
        """Generate texts until the returned object is closed.

        Raises:
            Busy: there is no room in the queue.
        """
        if self.texts + len(generations) > self.capacity:
            raise Busy(self._patience(len(generations)))
        numbers = [next(self._numbers) for _ in generations]
        texts = Texts(self, numbers)
        for number, generation in zip(numbers, generations, strict=True):
            self._texts[number] = texts
            self._orders.put(functools.partial(self._model.add, number, generation))
        return texts

    def closed(self, seconds: float) -> None:
        """Note how long some texts took, to estimate the wait for room."""
        self._seconds += SMOOTHING * (seconds - self._seconds)

    def forget(self, number: int) -> None:
        """Free the slot of a text."""
        del self._texts[number]
        self._orders.put(functools.partial(self._model.drop, number))

    def _patience(self, wanted: int) -> int:
        """Estimated seconds until there is room, from how long recent requests took."""
        rounds = (self.texts + wanted - self.capacity) / self._slots
        return max(1, min(LONGEST_WAIT_S, round(rounds * self._seconds)))

    def _tell(self, emissions: Sequence[Emission], working: int) -> None:
        self.working = working
        for emission in emissions:
            texts = self._texts.get(emission.number)
            if texts is None:
                continue
            if emission.finished is not None:
                del self._texts[emission.number]
            texts.take(emission)

    def _fail(self) -> None:
        self.working = 0
        self.failures += 1
        for texts in set(self._texts.values()):
            texts.fail()
        self._texts.clear()

    def _work(self) -> None:
        """The thread: orders, a step, orders, a step, until told to end."""
        ended = False
        report: Callable[[], object]
        while not ended:
            try:
                ended = self._obey()
                report = functools.partial(self._tell, self._model.step(), self._model.working)
            except Exception as error:
                # A user can act on our own errors without a traceback; others need one.
                if isinstance(error, GrokfetchError):
                    log.error("%s: %s", FAILED, error)  # noqa: TRY400
                else:
                    log.exception(FAILED)
                self._model.reset()
                report = self._fail
            self._loop.call_soon_threadsafe(report)

    def _obey(self) -> bool:
        """Carry out all orders; if there is nothing to do, wait for one. True: the thread ends."""
        while True:
            try:
                order = self._orders.get(block=not self._model.busy)
            except queue.Empty:
                return False
            if order is None:
                return True
            order()
            if not self._model.busy:
                self._loop.call_soon_threadsafe(self._tell, (), 0)


class Texts:
    """The results of some texts, from `Worker.open`.

    Iterating yields each emission with the index of its text, and ends when all have finished or
    been dropped; it raises `Failed` if a step of the model fails.
    """

    def __init__(self, worker: Worker, numbers: Sequence[int]) -> None:
        self._worker = worker
        self._first = numbers[0]
        self._open = set(numbers)
        self._emissions: asyncio.Queue[Emission | None] = asyncio.Queue()
        self._start = time.monotonic()

    async def __aiter__(self) -> AsyncIterator[tuple[int, Emission]]:
        while self._open or not self._emissions.empty():
            emission = await self._emissions.get()
            if emission is None:
                raise Failed
            yield emission.number - self._first, emission

    def drop(self, index: int) -> None:
        """Cancel a text; does nothing if it has finished."""
        number = self._first + index
        if number in self._open:
            self._open.discard(number)
            self._worker.forget(number)

    def close(self) -> None:
        """Cancel all texts that have not finished."""
        for number in tuple(self._open):
            self.drop(number - self._first)
        self._worker.closed(time.monotonic() - self._start)

    def take(self, emission: Emission) -> None:
        """Receive an emission from the worker."""
        if emission.finished is not None:
            self._open.discard(emission.number)
        self._emissions.put_nowait(emission)

    def fail(self) -> None:
        """Have the iteration raise `Failed`."""
        self._open.clear()
        self._emissions.put_nowait(None)
