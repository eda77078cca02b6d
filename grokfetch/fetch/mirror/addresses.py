"""Addresses of mirrors: which are usable, and where a mirror has a file. Pure: no I/O here.

Two forms are understood. A web seed (BEP 19) is a folder: a file is at
`<address>/<torrent name>/<path>`, and where a torrent is one file and the address does not end in a
slash, the address is the file. A template holds `{path}`, which stands for the file's path with or
without the torrent's top folder; without is tried first, as Hugging Face has it.
"""

from __future__ import annotations

import ipaddress
import re
from pathlib import PurePosixPath
from typing import Literal
from urllib.parse import quote, urlsplit, urlunsplit

__all__ = ["PATH", "Zone", "label", "places", "unusable", "zone"]

PATH = "{path}"
"""Stands for a file's path in a template."""


def unusable(address: str, *, stranger: bool) -> str | None:
    """Why an address cannot be a mirror, None if it can.

    Args:
        address: as it was given.
        stranger: whether it came from a torrent or a magnet link. Such an address must not make
            this machine send a query to its own or its neighbours' services; libtorrent has the
            same rule.
    """
    if not re.fullmatch(r"https?://[^\s/?#]\S*", address, re.IGNORECASE):
        return "it is not an http or https address"
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        return str(error)
    if not parts.hostname:
        return "it names no host"
    bare = re.fullmatch(r"[^.:]+", parts.hostname) and parts.hostname != "localhost"
    if stranger and parts.query and not bare and zone(parts.hostname) != "world":
        return "it is a query to a private address, and a stranger wrote it"
    return None


Zone = Literal["machine", "link", "local", "world"]

LOCAL_NAMES = (".local", ".lan", ".internal", ".intranet", ".home.arpa", ".localdomain")


def zone(host: str) -> Zone:
    """Where a host is by its name or address: this machine, its link, a private network or beyond.

    A name without a dot is one of the local network.
    """
    if host == "localhost" or host.endswith(".localhost"):
        return "machine"
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return "local" if "." not in host or host.endswith(LOCAL_NAMES) else "world"
    if address.is_loopback or address.is_unspecified:
        return "machine"
    if address.is_link_local:
        return "link"
    return "world" if address.is_global else "local"


def label(address: str) -> str:
    """The address as shown to users: without user, password, query and fragment."""
    parts = urlsplit(address)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def places(address: str, path: PurePosixPath) -> tuple[str, ...]:
    """The addresses at which a mirror may have a file, the likeliest first.

    Args:
        address: the mirror's.
        path: of the file, with the torrent's top folder.
    """
    if PATH in address:
        inside = PurePosixPath(*path.parts[1:]) if len(path.parts) > 1 else path
        return tuple(
            dict.fromkeys(address.replace(PATH, quote(str(tail))) for tail in (inside, path))
        )
    if len(path.parts) == 1 and not address.endswith("/"):
        return (address,)
    return (f"{address.rstrip('/')}/{quote(str(path))}",)
