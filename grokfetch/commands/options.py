"""The options that several commands share, and the settings made from them.

A command receives a bundle of options as one frozen value, made by a function whose parameters
have the names of the options.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from grokfetch.commands.value_types import Mesh, Number, Rate, Size, proxy_of
from grokfetch.manifest.selection import Request, parse_numbers
from grokfetch.output.reporting import begin_lines
from grokfetch.output.terminal import be_plain

if TYPE_CHECKING:
    from grokfetch.fetch.swarm import Proxy, SwarmSettings
    from grokfetch.fetch.wanted import Network
    from loader.devices.arrangement import CacheType, Dtype, Loading, Placement
    from loader.weights.partition import MeshShape

__all__ = [
    "LOADING_NAMES",
    "NETWORK_NAMES",
    "SWARM_NAMES",
    "bundle",
    "config_option",
    "folder_argument",
    "json_option",
    "loading_options",
    "manifest_option",
    "network_options",
    "part_options",
    "plain_option",
    "state_option",
    "swarm_options",
    "timeout_option",
    "tokenizer_option",
]

Function = TypeVar("Function", bound=Callable[..., Any])
Decorator = Callable[[Function], Function]


def bundle(
    name: str,
    make: Callable[..., object],
    *options: Decorator[Any],
    only_with: str | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command several options, which it receives as one argument.

    Args:
        name: of that argument.
        make: makes the argument; its parameters have the names of the options.
        options: what `click.option` returns, in the order of the help.
        only_with: a flag of the command; without it the argument is None, and `make` not called.
    """
    keys = tuple(inspect.signature(make).parameters)

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def bundled(*args: Any, **kwargs: Any) -> None:
            values = {key: kwargs.pop(key) for key in keys}
            made = make(**values) if only_with is None or kwargs[only_with] else None
            command(*args, **{name: made}, **kwargs)

        for option in reversed(options):
            bundled = option(bundled)
        return bundled

    return decorate


# --- single options ------------------------------------------------------------------------------

folder_argument = click.argument(
    "folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path)
)

state_option = click.option(
    "--state",
    metavar="DIR",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where grokfetch keeps its own files; DIR/.grokfetch by default.",
)

tokenizer_option = click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="SentencePiece model; by default the one beside the weights.",
)

manifest_option = click.option(
    "--manifest",
    "manifest_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Manifest that the files must match; by default the one shipped for the torrent, if any.",
)

config_option = click.option(
    "--config",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Hyperparameters of the checkpoint as JSON; by default the official model's.",
)

json_option = click.option(
    "--json",
    is_flag=True,
    # Parsed first, so that an error in another option is also written as JSON.
    is_eager=True,
    expose_value=False,
    callback=lambda context, _parameter, value: begin_lines(context) if value else None,
    help="Write events as JSON lines to stdout; see docs/events.md.",
)

plain_option = click.option(
    "--plain",
    is_flag=True,
    envvar="GROKFETCH_PLAIN",
    show_envvar=True,
    expose_value=False,
    callback=lambda context, _parameter, value: be_plain(context) if value else None,
    help="Words and numbers only, one statement per line, as for a screen reader.",
)

# --- peers and mirrors ---------------------------------------------------------------------------

SWARM_NAMES = (
    *("peers", "listen", "discovery", "no_dht", "no_lsd", "no_trackers"),
    *("proxy", "encryption"),
)
"""The options of peers, for the groups of a help text."""

NETWORK_NAMES = (*SWARM_NAMES, "web_seeds", "mirrors")
"""The options of peers and mirrors."""

timeout_option = click.option(
    "--timeout",
    metavar="SECONDS",
    type=Number(min=0, min_open=True),
    default=600,
    show_default=True,
    help="Give up after this long without receiving a byte.",
)


def _swarm(
    *,
    peers: tuple[str, ...],
    listen: str,
    discovery: bool,
    no_dht: bool,
    no_lsd: bool,
    no_trackers: bool,
    up: int | None,
    down: int | None,
    proxy: Proxy | None,
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
        proxy=proxy,
        encryption=encryption,
    )


_SWARM = (
    click.option(
        "--peer", "peers", metavar="HOST:PORT", multiple=True, help="A peer to connect to as well."
    ),
    click.option(
        "--listen",
        metavar="ADDRESS:PORT",
        default="0.0.0.0:6881,[::]:6881",
        show_default=True,
        help="Where to listen for peers; separate several by commas.",
    ),
    click.option(
        "--discovery/--no-discovery",
        default=True,
        show_default=True,
        help="Find peers by DHT and on the local network; ask the router to forward the port.",
    ),
    click.option("--no-dht", is_flag=True, help="Do not look for peers by DHT."),
    click.option("--no-lsd", is_flag=True, help="Do not look for peers on the local network."),
    click.option("--no-trackers", is_flag=True, help="Do not ask trackers."),
    click.option("--up", type=Rate(), help="Upload limit in bytes per second: 500k, 2M."),
    click.option("--down", type=Rate(), help="Download limit in bytes per second."),
    click.option(
        "--proxy",
        metavar="socks5://HOST:PORT",
        callback=lambda _context, _parameter, value: None if value is None else proxy_of(value),
        help="Proxy for peers, trackers and mirrors; socks5://USER:PASSWORD@HOST:PORT to log in. "
        "socks5h:// is the same; http:// is a proxy that supports CONNECT, without DHT and UDP.",
    ),
    click.option(
        "--encryption",
        type=click.Choice(["required", "preferred", "off"]),
        default="preferred",
        show_default=True,
        help="Encryption of connections to peers.",
    ),
)

swarm_options = bundle("swarm", _swarm, *_SWARM)


def _usable(
    _context: click.Context, _parameter: click.Parameter, addresses: tuple[str, ...]
) -> tuple[str, ...]:
    if addresses:
        from grokfetch.fetch.mirror.addresses import unusable

    for address in addresses:
        why = unusable(address, stranger=False)
        if why is not None:
            raise click.BadParameter(f"{address:.200}: {why}")
    return addresses


def _network(swarm: SwarmSettings, *, mirrors: bool, web_seeds: tuple[str, ...]) -> Network:
    from grokfetch.fetch.wanted import Network

    return Network(swarm, mirrors, web_seeds)


_MIRRORS = (
    click.option(
        "--web-seed",
        "web_seeds",
        metavar="URL",
        multiple=True,
        callback=_usable,
        help="A mirror to use as well: the URL of the folder that contains the torrent's folder, "
        "or a URL with {path}.",
    ),
    click.option(
        "--mirrors/--no-mirrors",
        default=True,
        show_default=True,
        help="Use HTTP too: mirrors in the manifest, link or torrent, and the tokenizer's URL.",
    ),
)


def network_options(
    command: Callable[..., None], *, only_with: str | None = None
) -> Callable[..., None]:
    """Give a command the options of swarm and mirrors, as the argument `network`, a `Network`.

    With `only_with` it is None unless that flag is given; then no module of the fetch is imported.
    """
    mirrors = bundle("network", _network, *_MIRRORS, only_with=only_with)
    return bundle("swarm", _swarm, *_SWARM, only_with=only_with)(mirrors(command))


# --- parts of a checkpoint ------------------------------------------------------------------------


def _part(
    layers: str | None, experts: str | None, only: tuple[str, ...], *, everything: bool
) -> Request | None:
    """What the options ask for; None if they are not given."""
    if layers is None and experts is None and not only:
        return Request() if everything else None
    if everything:
        raise click.UsageError("--all cannot be combined with --layers, --experts or --only")
    return Request(
        None if layers is None else parse_numbers(layers),
        None if experts is None else parse_numbers(experts),
        only,
    )


part_options = bundle(
    "part",
    _part,
    click.option(
        "--layers", metavar="0-3,7", help="Only these layers, and what is outside of layers."
    ),
    click.option("--experts", metavar="0,4", help="Only these experts of each layer."),
    click.option(
        "--only",
        metavar="GLOB",
        multiple=True,
        help="Only tensors or files whose name matches; may be repeated.",
    ),
    click.option(
        "--all", "everything", is_flag=True, help="Also everything that earlier runs left out."
    ),
)

# --- loading a model -----------------------------------------------------------------------------

LOADING_NAMES = ("dtype", "cache", "placement", "mesh", "memory", "unproven")
"""The options of loading, for the groups of a help text."""


def _loading(
    dtype: Dtype,
    cache: CacheType | None,
    placement: Placement | None,
    mesh: MeshShape | None,
    memory: int | None,
) -> Loading:
    from loader.devices.arrangement import Loading

    return Loading(dtype, placement, mesh, memory, cache=cache)


loading_options = bundle(
    "loading",
    _loading,
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float32"]),
        default="bfloat16",
        show_default=True,
        help="Type of activations and the KV cache; weights stay int8.",
    ),
    click.option(
        "--cache",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        metavar="DTYPE",
        help="Type of the KV cache alone: bfloat16, float32, or float16, which is as large as "
        "bfloat16 and rounds less, but overflows beyond 65,504.",
    ),
    click.option(
        "--placement",
        type=click.Choice(["mapped", "sharded"]),
        help="mapped leaves the weights in their files, only for CPUs and the default there; "
        "sharded copies them to the devices.",
    ),
    click.option(
        "--mesh",
        type=Mesh(),
        metavar="expert=N,model=M",
        help="Devices to use; all by default. With data=N as well there are N copies of the "
        "weights, each for a part of the batch.",
    ),
    click.option(
        "--memory",
        type=Size(),
        help="Memory for mapped weights and everything else, such as 16G; by default what is free.",
    ),
)
