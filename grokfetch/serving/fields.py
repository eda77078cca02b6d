"""The members of a JSON object, each read once and checked; what is refused is named. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

__all__ = ["LARGEST", "Fields", "Refused", "all_of", "as_integer", "is_text", "refuse"]

LARGEST = 2**63 - 1
"""The integer that means "no limit"."""


class Refused(Exception):
    """A request that cannot be served.

    Args:
        message: for the person who wrote the client.
        param: the field that is meant.
        code: a word for programs.
        status: of the HTTP response.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


class Fields:
    """The members of an object; None is the same as a missing one."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in body.items() if value is not None}

    def take(self, name: str) -> Any:
        """The value of a member, whatever it is."""
        return self._left.pop(name, None)

    def string(self, name: str) -> str | None:
        """A string.

        Raises:
            Refused: it is something else.
        """
        value = self.take(name)
        if value is not None and not isinstance(value, str):
            refuse(name, "must be a string")
        return value

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false.

        Raises:
            Refused: it is something else.
        """
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            refuse(name, "must be true or false")
        return value

    def integer(self, name: str, least: int, most: int = LARGEST) -> int | None:
        """An integer within bounds; 16.0 counts as one.

        Raises:
            Refused: it is something else, or out of bounds.
        """
        value = self.take(name)
        if value is None:
            return None
        number = as_integer(value)
        if number is None or not least <= number <= most:
            refuse(name, f"must be an integer{_bounds(least, most)}")
        return number

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number within bounds.

        Raises:
            Refused: it is something else, or out of bounds.
        """
        value = self.take(name)
        if value is None:
            return default
        if not _is_number(value) or not least <= value <= most:
            refuse(name, f"must be a number between {least:g} and {most:g}")
        return float(value)

    def neutral(self, table: Mapping[str, Sequence[object]]) -> None:
        """Accept members whose values are listed in a table.

        Raises:
            Refused: one has another value.
        """
        for name, values in table.items():
            value = self.take(name)
            if value is not None and not any(_same(value, allowed) for allowed in values):
                refuse(name, "is not supported by this server", "unsupported_parameter")

    def ignore(self, *names: str) -> None:
        """Accept members with any values."""
        for name in names:
            self.take(name)

    def nothing_else(self) -> None:
        """Make sure that every member has been read.

        Raises:
            Refused: one has not.
        """
        for name in self._left:
            raise Refused(
                f"unknown field {name!r:.80}", param=f"{name:.80}", code="unknown_parameter"
            )


def refuse(name: str, why: str, code: str = "invalid_value") -> NoReturn:
    """Refuse the value of a member."""
    raise Refused(f"{name} {why}", param=name, code=code)


def is_text(value: object) -> bool:
    """Whether it is a string that can be encoded: JSON allows half a surrogate pair."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def as_integer(value: object) -> int | None:
    """An integer, however it is written: 16, 16.0 or 1.6e1; None if it is not an integer."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def all_of(value: object, fits: Callable[[object], bool]) -> bool:
    """Whether it is a non-empty list whose items all fit."""
    return isinstance(value, list) and bool(value) and all(fits(item) for item in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(value: object, other: object) -> bool:
    """Equality in JSON, where true is not 1."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)


def _bounds(least: int, most: int) -> str:
    if most < LARGEST:
        return f" between {least:,} and {most:,}"
    return "" if least <= -LARGEST else f", {least:,} or more"
