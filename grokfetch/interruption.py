"""Makes sure that Ctrl-C and SIGTERM are never lost.

Python raises `KeyboardInterrupt` wherever the main thread happens to be. In a callback of the
garbage collector, in `__del__` or under an `except BaseException`, the exception is dropped and the
program goes on as if nobody had pressed a key. Here the exception notices that itself: if it is
deleted before `honour` was called, it is raised again a moment later. While a module is being
imported, nothing is raised until the import is done.

Uses little of the standard library and nothing else: `grokfetch.__main__` installs it before
anything else is imported.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

__all__ = ["Held", "Interrupted", "honour", "install", "noted", "settle", "uninstall"]

AGAIN_S = 0.02
"""Seconds until a dropped interruption is raised again. By then the code that dropped it has
probably ended; if not, it is dropped and raised once more."""

SHELL_BASE = 128
"""Shells add this to a signal's number for the exit code of a process that it has ended."""


class _Count:
    """How many interruptions were raised, and how many of these were honoured."""

    raised = 0
    honoured = 0


class Held:
    """A context in which nothing is raised; an interruption during it is raised soon after.

    Blocking the signals is not enough: another thread receives them then, and Python still raises
    in the main thread.
    """

    depth = 0

    def __enter__(self) -> None:
        Held.depth += 1

    def __exit__(self, *_: object) -> None:
        Held.depth -= 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; `exit_code` is what shells report for a program that the signal ended."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.exit_code = SHELL_BASE + number
        # Code that dropped it may keep it as the context of another error until the program ends.
        _pending.number = number
        _Count.raised += 1
        self._place = _Count.raised

    def __del__(self) -> None:
        if self._place > _Count.honoured:
            # By a timer, since an exception raised here would be dropped as well.
            _again_soon(self.number)


class _Pending:
    """The signal that the timer will raise again."""

    number = int(signal.SIGINT)


_pending = _Pending()


def install() -> None:
    """Have both signals raise `Interrupted` in the main thread, from which this must be called.

    A Ctrl-C that the parent has ignored, as a shell does for a script's background jobs, stays
    ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupt)
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGALRM, _interrupt_again)
    usual = sys.unraisablehook

    def hook(dropped: Any) -> None:
        # It is raised again, so there is no need to report where it was dropped.
        if not isinstance(dropped.exc_value, Interrupted):
            usual(dropped)

    sys.unraisablehook = hook


def uninstall() -> None:
    """Raise nothing again from here on: Python shuts down next, and with it the signal handlers.

    A timer that fired then would end the process with SIGALRM's own code.
    """
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


def honour(error: KeyboardInterrupt) -> int:
    """Mark this interruption and all earlier ones as handled, so that none is raised again.

    Returns:
        The exit code.
    """
    number = _pending.number if _Count.raised > _Count.honoured else signal.SIGINT
    _Count.honoured = _Count.raised
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(error, Interrupted):
        return error.exit_code
    # A plain `KeyboardInterrupt` raised by other code, because of one of ours or on its own.
    return SHELL_BASE + number


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """While the block runs, only note a Ctrl-C; a second one interrupts as usual.

    The yielded callable tells whether it was pressed. If Ctrl-C is ignored, it stays ignored.
    """
    pressed = False
    usual = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed and callable(usual):
            usual(number, frame)
        pressed = True

    if usual is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, usual)


def settle() -> None:
    """Raise a dropped interruption that was not raised again yet; called before the program ends.

    Raises:
        Interrupted: there was one.
    """
    if _Count.raised > _Count.honoured:
        raise Interrupted(_pending.number)


def _interrupt(number: int, frame: FrameType | None) -> None:
    if Held.depth or _importing(frame):
        _Count.raised += 1
        _again_soon(number)
        return
    raise Interrupted(number)


def _interrupt_again(_number: int, frame: FrameType | None) -> None:
    if _Count.raised <= _Count.honoured:
        return
    if Held.depth or _importing(frame):
        _again_soon(_pending.number)
        return
    raise Interrupted(_pending.number)


def _importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported, during which an exception may do harm.

    Some compiled modules end the process then, and some report another error. An import ends soon.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _again_soon(number: int) -> None:
    _pending.number = number
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
