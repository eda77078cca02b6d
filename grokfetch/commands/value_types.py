"""Parses the values of options: rates, sizes, durations, devices."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import unquote, urlsplit

import click

from grokfetch.units import parse_bytes

if TYPE_CHECKING:
    from grokfetch.fetch.swarm import Proxy
    from loader.weights.accelerators import Slice
    from loader.weights.partition import MeshShape

__all__ = ["Devices", "Duration", "Integer", "Mesh", "Number", "Rate", "Size", "proxy_of"]

SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


class Integer(click.IntRange):
    """An integer within bounds, which help and error messages give in words."""

    name = "N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        try:
            number: int = super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(_must_be("an integer", self._describe_range(), value), param, ctx)
        return number

    def _describe_range(self) -> str:
        # click puts this into the help of an option.
        return _bounds(self.min, self.max, above=self.min_open)


class Number(click.FloatRange):
    """A number within bounds, which help and error messages give in words."""

    name = "NUMBER"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number."""
        try:
            number: float = super().convert(value, param, ctx)
        except click.BadParameter:
            self.fail(_must_be("a number", self._describe_range(), value), param, ctx)
        return number

    def _describe_range(self) -> str:
        return _bounds(self.min, self.max, above=self.min_open)


def _must_be(what: str, bounds: str, value: object) -> str:
    return f"must be {what}, {bounds}, not {str(value)!r:.40}"


def _bounds(least: float | None, most: float | None, *, above: bool) -> str:
    """Bounds in words, for options that all have a minimum. Pure."""
    assert least is not None
    if most is None:
        return f"more than {least:,}" if above else f"{least:,} or more"
    return f"more than {least:,}, at most {most:,}" if above else f"{least:,} to {most:,}"


class Rate(click.ParamType):  # type: ignore[type-arg]
    """Bytes per second, with k, M or G for powers of 1000; an int."""

    name = "RATE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, at least 1."""
        if isinstance(value, int):
            return value
        rate = parse_bytes(str(value)) or 0
        # libtorrent holds rates in 31 bits.
        if not 0 < rate < 1 << 31:
            self.fail(
                f"{value!r:.40} is not a rate in bytes per second, such as 500k or 2.5M",
                param,
                ctx,
            )
        return rate


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, with k, M, G or T for powers of 1000; an int."""

    name = "SIZE"

    def __init__(self, least: int = 1) -> None:
        self._least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, at least `least`."""
        size = parse_bytes(str(value))
        if size is None or size < self._least:
            self.fail(f"{value!r:.40} is not a number of bytes, such as 800M or 16G", param, ctx)
        return size


class Duration(click.ParamType):  # type: ignore[type-arg]
    """Seconds, minutes, hours or days; a float, in seconds."""

    name = "DURATION"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number of seconds."""
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", str(value))
        if match is None:
            self.fail(f"{value!r:.40} is not a duration such as 90s, 30m, 12h or 7d", param, ctx)
        return float(match[1]) * SECONDS[match[2]]


class Mesh(click.ParamType):  # type: ignore[type-arg]
    """How many devices along each axis; a `MeshShape`."""

    name = "expert=N,model=M"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> MeshShape:
        """The mesh, with 1 along each axis that is not named."""
        from loader.weights.partition import MeshShape

        parts = [re.fullmatch(r"(data|expert|model)=(\d+)", it) for it in str(value).split(",")]
        axes = [(part[1], int(part[2])) for part in parts if part is not None]
        if len(dict(axes)) != len(parts):
            self.fail(f"not expert=N,model=M: {value!r:.80}", param, ctx)
        return MeshShape(**{"data": 1, "expert": 1, "model": 1, **dict(axes)})


class Devices(click.ParamType):  # type: ignore[type-arg]
    """Accelerators of one kind; a `Slice`."""

    name = "DEVICES"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Slice:
        """The devices with that name."""
        from loader.weights.accelerators import ACCELERATORS, slice_of

        named = slice_of(str(value))
        if named is None:
            kinds = ", ".join(ACCELERATORS)
            self.fail(f"{value!r:.40} is not like h100x8 or v5p-8; known: {kinds}", param, ctx)
        return named


PROXIES: dict[str, Literal["socks5", "http"]] = {
    "socks5": "socks5",
    "socks5h": "socks5",
    "http": "http",
}
"""URL schemes and kinds of proxies; with each of them, the proxy resolves host names."""


def proxy_of(text: str) -> Proxy:
    """The proxy that an address names.

    Raises:
        click.BadParameter: it names none.
    """
    from grokfetch.fetch.swarm import Proxy

    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or not port or url.scheme not in PROXIES or url.path.strip("/"):
        ways = " or ".join(f"{scheme}://HOST:PORT" for scheme in PROXIES)
        raise click.BadParameter(f"must be {ways}", param_hint="--proxy")
    user, password = unquote(url.username or ""), unquote(url.password or "")
    return Proxy(host, port, user, password, PROXIES[url.scheme])
