"""Ctrl-C and SIGTERM, neither of which is ever lost.

Python raises `KeyboardInterrupt` wherever the main thread happens to be. Where that is a callback
of the garbage collector, a `__del__` or somebody's `except BaseException`, the exception is dropped
and the program goes on as if nobody had pressed a key. Here the exception itself notices: one that
dies before `honour` was called is raised again a moment later. While a module is being imported
nothing is raised at all, but when that is done.

Standard library only, and little of it: `grokfetch.__main__` installs this before anything else is
imported.
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
"""Seconds until an interruption that was dropped is raised again: by then whatever dropped it has
probably ended, and if not, it is dropped and raised once more."""

SHELL_BASE = 128
"""To which shells add a signal's number for the exit code of what it has ended."""


class _Count:
    """How many interruptions were raised, and up to which of them they were honoured."""

    raised = 0
    honoured = 0


class Held:
    """A context in which nothing is raised; what came meanwhile is raised soon after.

    To block the signals is not enough: another thread takes them then, and Python raises in the
    main one all the same.
    """

    depth = 0

    def __enter__(self) -> None:
        Held.depth += 1

    def __exit__(self, *_: object) -> None:
        Held.depth -= 1


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM; `exit_code` is what a shell gives a program that the signal has ended."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.exit_code = SHELL_BASE + number
        # What has dropped it may keep it as its own failure's context, until the program ends.
        _pending.number = number
        _Count.raised += 1
        self._place = _Count.raised

    def __del__(self) -> None:
        if self._place > _Count.honoured:
            # A timer, since raising here would be dropped as well.
            _again_soon(self.number)


class _Pending:
    """The signal that the timer stands for."""

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
        # It is raised again, and nobody need read where it was dropped.
        if not isinstance(dropped.exc_value, Interrupted):
            usual(dropped)

    sys.unraisablehook = hook


def uninstall() -> None:
    """Raise nothing again from here on: Python itself ends next, and with it what handles a timer.

    One that went off then would end the process with its own signal's code.
    """
    signal.signal(signal.SIGALRM, signal.SIG_IGN)


def honour(error: KeyboardInterrupt) -> int:
    """Say that the interruption has its effect now: it and all earlier ones may be forgotten.

    Returns:
        The exit code.
    """
    number = _pending.number if _Count.raised > _Count.honoured else signal.SIGINT
    _Count.honoured = _Count.raised
    signal.setitimer(signal.ITIMER_REAL, 0)
    if isinstance(error, Interrupted):
        return error.exit_code
    # Somebody's own `KeyboardInterrupt`, raised on account of ours or of none.
    return SHELL_BASE + number


@contextlib.contextmanager
def noted() -> Iterator[Callable[[], bool]]:
    """Have Ctrl-C only noted while the block runs, but a second one interrupt as ever.

    The callable that is yielded says whether it was pressed. Where Ctrl-C is ignored it stays so.
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
    """Raise what was dropped and is not raised again yet: a program that ends calls this first.

    Raises:
        Interrupted: there was something.
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
    """Whether a module is being imported, which may take an exception ill.

    Of compiled modules some end the process then, and some tell of another error. An import is
    over in a moment.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _again_soon(number: int) -> None:
    _pending.number = number
    signal.setitimer(signal.ITIMER_REAL, AGAIN_S)
