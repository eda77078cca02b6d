"""`--state DIR`: where a command finds, or keeps, grokfetch's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

__all__ = ["state_option"]

Function = TypeVar("Function", bound=Callable[..., Any])


def state_option(function: Function) -> Function:
    """Add `--state` to a command, as its argument `state`: a path, or None."""
    return click.option(
        "--state",
        metavar="DIR",
        type=click.Path(file_okay=False, path_type=Path),
        help="Where grokfetch keeps its own files; DIR/.grokfetch by default.",
    )(function)
