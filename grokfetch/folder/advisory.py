"""Small state files that prove nothing and whose loss does no harm.

A damaged one counts as absent, and failing to write one is not an error. `write_first` is for those
that the next run must find, because it refuses to continue without them.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from grokfetch.errors import StorageFailed, storage_errors
from grokfetch.folder.atomic import put

__all__ = ["count", "number", "read", "write", "write_first"]

T = TypeVar("T")


def read(path: Path, schema: int, decode: Callable[[dict[str, Any]], T]) -> T | None:
    """What `decode` makes of a file; None if it is absent, damaged, or of another version."""
    try:
        fields = json.loads(path.read_bytes())
        return decode(fields) if fields["schema"] == schema else None
    except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def write(path: Path, schema: int, fields: dict[str, Any]) -> None:
    """Put a file in the place of an earlier one, if the disk takes it."""
    # There may be no state folder yet, it may be read-only, and a full disk has other worries.
    with contextlib.suppress(StorageFailed):
        write_first(path, schema, fields)


def write_first(path: Path, schema: int, fields: dict[str, Any]) -> None:
    """Put a file in the place of an earlier one, before what is to be done is begun.

    Raises:
        StorageFailed: it cannot be written.
    """
    with storage_errors(path):
        put(path, (json.dumps({"schema": schema, **fields}) + "\n").encode())


def number(value: Any) -> float:
    """A JSON number as a float.

    Raises:
        ValueError, TypeError: it is none, or not finite.
    """
    parsed = float(value)
    if not math.isfinite(parsed):
        raise ValueError(f"not finite: {parsed}")
    return parsed


def count(value: Any) -> int:
    """A JSON number as a count.

    Raises:
        ValueError, TypeError, OverflowError: it is none, or negative.
    """
    parsed = int(value)
    if parsed < 0:
        raise ValueError(f"negative: {parsed}")
    return parsed
