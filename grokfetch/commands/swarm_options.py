"""The options by which a person says how to take part in a swarm; no command of its own."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from grokfetch.units import parse_bytes

if TYPE_CHECKING:
    from grokfetch.fetch.swarm import Proxy, SwarmSettings

__all__ = ["Rate", "proxy_of", "swarm_options"]


class Rate(click.ParamType):  # type: ignore[type-arg]
    """Bytes a second, with k, M or G for powers of 1000; an int."""

    name = "RATE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, at least 1."""
        if isinstance(value, int):
            return value
        rate = parse_bytes(str(value)) or 0
        # libtorrent holds rates in 31 bits.
        if not 0 < rate < 1 << 31:
            self.fail(
                f"{value!r:.40} is no rate in bytes a second, such as 500k or 2.5M", param, ctx
            )
        return rate


_OPTIONS = (
    click.option(
        "--peer", "peers", metavar="HOST:PORT", multiple=True, help="A peer to ask as well."
    ),
    click.option(
        "--listen",
        metavar="ADDRESS:PORT",
        default="0.0.0.0:6881,[::]:6881",
        show_default=True,
        help="Where to listen for peers; several separated by commas.",
    ),
    click.option(
        "--discovery/--no-discovery",
        default=True,
        show_default=True,
        help="Look for peers by DHT and on the local network, and ask the router for a way in.",
    ),
    click.option("--no-dht", is_flag=True, help="Do not look for peers by DHT."),
    click.option("--no-lsd", is_flag=True, help="Do not look for peers on the local network."),
    click.option("--no-trackers", is_flag=True, help="Do not ask trackers."),
    click.option("--up", type=Rate(), help="Upload at most so many bytes a second: 500k, 2M."),
    click.option("--down", type=Rate(), help="Download at most so many bytes a second."),
    click.option(
        "--proxy",
        metavar="socks5://HOST:PORT",
        help="Reach peers and trackers through it; socks5://USER:PASSWORD@HOST:PORT to log in.",
    ),
    click.option(
        "--encryption",
        type=click.Choice(["required", "preferred", "off"]),
        default="preferred",
        show_default=True,
        help="Of connections with peers.",
    ),
)


def swarm_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it receives them as one `SwarmSettings` named `swarm`."""

    @functools.wraps(command)
    def wired(*args: Any, **kwargs: Any) -> None:
        own = {name: value for name, value in kwargs.items() if name not in _NAMES}
        command(*args, swarm=_settings(**{name: kwargs[name] for name in _NAMES}), **own)

    for option in reversed(_OPTIONS):
        wired = option(wired)
    return wired


_NAMES = (
    *("peers", "listen", "discovery", "no_dht", "no_lsd", "no_trackers"),
    *("up", "down", "proxy", "encryption"),
)


def _settings(
    *,
    peers: tuple[str, ...],
    listen: str,
    discovery: bool,
    no_dht: bool,
    no_lsd: bool,
    no_trackers: bool,
    up: int | None,
    down: int | None,
    proxy: str | None,
    encryption: Any,
) -> SwarmSettings:
    from grokfetch.fetch.swarm import SwarmSettings

    return SwarmSettings(
        listen,
        discovery=discovery,
        peers=peers,
        dht=not no_dht,
        lsd=not no_lsd,
        trackers=not no_trackers,
        up=up,
        down=down,
        proxy=None if proxy is None else proxy_of(proxy),
        encryption=encryption,
    )


def proxy_of(text: str) -> Proxy:
    """The proxy that an address names.

    Raises:
        click.BadParameter: it names none.
    """
    from urllib.parse import unquote

    from grokfetch.fetch.swarm import Proxy

    try:
        url = urlsplit(text)
        host, port = url.hostname, url.port
    except ValueError:
        host = port = None
    if not host or not port or url.scheme != "socks5" or url.path.strip("/"):
        raise click.BadParameter("a proxy is written socks5://HOST:PORT", param_hint="--proxy")
    return Proxy(host, port, unquote(url.username or ""), unquote(url.password or ""))
