"""The options that several commands share, and the settings that they stand for.

A bundle of options reaches its command as one frozen value, made by a function whose parameters
are the names of the options.
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
        make: what to make of the values; its parameters are the names of the options.
        options: what `click.option` returns, in the order of the help.
        only_with: a flag of the command without which the argument is None, and not made.
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
    help="SentencePiece model; the one beside the weights if not given.",
)

manifest_option = click.option(
    "--manifest",
    "manifest_file",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="What the payload must be; else a shipped manifest of that torrent, if there is one.",
)

config_option = click.option(
    "--config",
    metavar="FILE",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Hyperparameters of the checkpoint as JSON; the official model's if not given.",
)

json_option = click.option(
    "--json",
    is_flag=True,
    # Before the others, so that a machine also reads what is wrong with those.
    is_eager=True,
    expose_value=False,
    callback=lambda context, _parameter, value: begin_lines(context) if value else None,
    help="Events as JSON lines on stdout, see docs/events.md.",
)

plain_option = click.option(
    "--plain",
    is_flag=True,
    envvar="GROKFETCH_PLAIN",
    show_envvar=True,
    expose_value=False,
    callback=lambda context, _parameter, value: be_plain(context) if value else None,
    help="Words and numbers only, one statement a line, as for a screen reader.",
)

# --- whom to fetch from, and share with ----------------------------------------------------------

SWARM_NAMES = (
    *("peers", "listen", "discovery", "no_dht", "no_lsd", "no_trackers"),
    *("proxy", "encryption"),
)
"""The options that say with whom, for the groups of a help."""

NETWORK_NAMES = (*SWARM_NAMES, "web_seeds", "mirrors")
"""The options that say from whom."""

timeout_option = click.option(
    "--timeout",
    metavar="SECONDS",
    type=Number(min=0, min_open=True),
    default=600,
    show_default=True,
    help="Give up after so long without a byte.",
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
        callback=lambda _context, _parameter, value: None if value is None else proxy_of(value),
        help="Reach peers, trackers and mirrors through it; socks5://USER:PASSWORD@HOST:PORT to "
        "log in. socks5h:// is the same; http:// is one that takes CONNECT, without DHT and UDP.",
    ),
    click.option(
        "--encryption",
        type=click.Choice(["required", "preferred", "off"]),
        default="preferred",
        show_default=True,
        help="Of connections with peers.",
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
        help="A mirror to use as well: the folder above the torrent's, or an address with {path}.",
    ),
    click.option(
        "--mirrors/--no-mirrors",
        default=True,
        show_default=True,
        help="Use HTTP too: the mirrors of manifest, link and torrent, the tokenizer's address.",
    ),
)


def network_options(
    command: Callable[..., None], *, only_with: str | None = None
) -> Callable[..., None]:
    """Give a command the options of swarm and mirrors; it gets them as a `Network`, `network`.

    With `only_with` it gets None unless that flag is given: then nothing of a fetch is imported.
    """
    mirrors = bundle("network", _network, *_MIRRORS, only_with=only_with)
    return bundle("swarm", _swarm, *_SWARM, only_with=only_with)(mirrors(command))


# --- what of a checkpoint -------------------------------------------------------------------------


def _part(
    layers: str | None, experts: str | None, only: tuple[str, ...], *, everything: bool
) -> Request | None:
    """What the options ask for, None if they do not say."""
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
        "--layers", metavar="0-3,7", help="Only these layers, and what lies outside layers."
    ),
    click.option("--experts", metavar="0,4", help="Of each mixture of experts only these."),
    click.option(
        "--only",
        metavar="GLOB",
        multiple=True,
        help="Only tensors or files whose name matches; may be repeated.",
    ),
    click.option("--all", "everything", is_flag=True, help="All that earlier runs left out, too."),
)

# --- how a model is held -------------------------------------------------------------------------

LOADING_NAMES = ("dtype", "cache", "placement", "mesh", "memory", "unproven")
"""The options that say how, for the groups of a help."""


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
        help="Of activations and the KV cache; weights stay int8.",
    ),
    click.option(
        "--cache",
        type=click.Choice(["bfloat16", "float16", "float32"]),
        metavar="DTYPE",
        help="Of the KV cache alone: bfloat16, float32, or float16, which is as large as bfloat16 "
        "and rounds less, but holds no number beyond 65,504.",
    ),
    click.option(
        "--placement",
        type=click.Choice(["mapped", "sharded"]),
        help="mapped leaves the weights in their files, for CPUs and the default there; sharded "
        "copies them to the devices.",
    ),
    click.option(
        "--mesh",
        type=Mesh(),
        metavar="expert=N,model=M",
        help="Devices to use; all of them by default. data=N too makes copies of the weights, each "
        "for some of the texts of a batch.",
    ),
    click.option(
        "--memory",
        type=Size(),
        help="Bytes that mapped weights and all else may take, 16G say; what is free by default.",
    ),
)
