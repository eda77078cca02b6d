"""JSON values that know the name of their field, so that every error message can name it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from grokfetch.errors import ManifestInvalid

__all__ = ["Field", "parsed"]

T = TypeVar("T")

LARGEST = 2**63 - 1
"""No file system holds a larger file; sums and products of what passes stay exact in Python."""


def parsed(text: bytes, name: str, newest: int) -> Field:
    """The JSON object in a text.

    Args:
        text: the JSON.
        name: of the object, for refusals.
        newest: the latest version of its schema that can be read.

    Raises:
        ManifestInvalid: it is no object, or one of a later version.
    """
    try:
        top = Field(json.loads(text), name)
    except (ValueError, RecursionError) as error:
        raise ManifestInvalid(f"is not valid JSON: {error}") from None
    schema = top.get("schema").integer(minimum=1)
    if schema > newest:
        raise ManifestInvalid(
            f"schema is {schema}, this grokfetch reads up to {newest}", hint="upgrade grokfetch"
        )
    return top


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """A JSON value that knows the name of its field, so that every error message can name it."""

    value: Any
    name: str

    def refuse(self, why: str) -> NoReturn:
        """Raise ManifestInvalid: the name of the field, `why`, and its value."""
        raise ManifestInvalid(f"{self.name} {why}, not {json.dumps(self.value):.80}")

    def members(self) -> dict[str, Any]:
        """The members of an object; anything else is refused."""
        if not isinstance(self.value, dict):
            self.refuse("must be an object")
        members: dict[str, Any] = self.value
        return members

    def get(self, key: str) -> Field:
        """The member `key`, refused if it is missing."""
        name = key if self.name == "manifest" else f"{self.name}.{key}"
        members = self.members()
        if key not in members:
            raise ManifestInvalid(f"{name} is missing")
        return Field(members[key], name)

    def optional(self, key: str, read: Callable[[Field], T]) -> T | None:
        """The member `key` as `read` sees it, None if it is missing or null."""
        return None if self.members().get(key) is None else read(self.get(key))

    def items(self) -> Iterator[Field]:
        """The items of a list; anything else is refused."""
        if not isinstance(self.value, list):
            self.refuse("must be a list")
        return (Field(item, f"{self.name}[{index}]") for index, item in enumerate(self.value))

    def string(self) -> str:
        """A non-empty string; anything else is refused."""
        if not isinstance(self.value, str) or not self.value:
            self.refuse("must be a non-empty string")
        return str(self.value)

    def matching(self, pattern: str, why: str) -> str:
        """A string that a regular expression matches as a whole; anything else is refused."""
        if not re.fullmatch(pattern, self.string()):
            self.refuse(why)
        return self.string()

    def integer(self, minimum: int = 0) -> int:
        """An integer from `minimum` to `LARGEST`; anything else is refused."""
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.refuse("must be an integer")
        if not minimum <= self.value <= LARGEST:
            self.refuse(f"must be from {minimum} to {LARGEST}")
        return int(self.value)
