"""A libtorrent session: settings, waiting for alerts, and an end with nothing written after it."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import secrets
import select
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from grokfetch.errors import (
    OutOfReach,
    SourceInvalid,
    StorageFailed,
    TorrentInvalid,
    storage_errors,
)

__all__ = ["Proxy", "Session", "SwarmSettings", "address", "libtorrent", "session_settings"]

WAIT_S = 0.2
"""The longest wait for an alert, which delays Ctrl-C and a caller's own clock."""

CLOSE_TIMEOUT_S = 60.0
"""How long the disk may take to finish writing."""

CLIENT = "grokfetch"
"""The client name sent to peers."""

DIVIDING = {"request_queue_time": 1, "whole_pieces_threshold": 0, "initial_picker_threshold": 0}
"""Settings while hosts divide a seed. With three seconds' worth of requests, more pieces are begun
than there are peers, and libtorrent completes these first, whatever their priority; whole pieces
from one peer add even more; and it takes the first four pieces without regard to priority."""

PREFER_TCP = 0
NO_LIMIT = -1


def libtorrent() -> Any:
    """The module.

    Raises:
        OutOfReach: it is not installed.
    """
    try:
        import libtorrent as module
    except ImportError as error:
        raise OutOfReach(
            f"libtorrent cannot be imported ({error}), and without it no swarm can be joined",
            hint="it has wheels for Python 3.11 to 3.13 on Linux x86-64 and macOS arm64; files "
            "that came another way can be used: grokfetch manifest DIR",
        ) from None
    return module


@dataclasses.dataclass(frozen=True, slots=True)
class Proxy:
    """A SOCKS5 or HTTP proxy; without a `user` it needs none.

    It looks up names itself. An HTTP proxy carries TCP only.
    """

    host: str
    port: int
    user: str = ""
    password: str = dataclasses.field(default="", repr=False)
    kind: Literal["socks5", "http"] = "socks5"


@dataclasses.dataclass(frozen=True, slots=True)
class SwarmSettings:
    """How to take part in a swarm.

    `listen` has interfaces and ports, comma-separated, like `0.0.0.0:6881`; port 0 is any free one.
    `discovery` looks for peers beyond the torrent's trackers: by DHT and among local peers, each of
    which can be turned off, and by opening a port on the router (UPnP, NAT-PMP). `peers` are more
    peers, as HOST:PORT. `up` and `down` limit payload and protocol bytes a second, None for no
    limit. With a `proxy`, peers and trackers are reached through it; if it carries no UDP, neither
    DHT nor UDP trackers are used.
    """

    listen: str = "0.0.0.0:6881,[::]:6881"
    discovery: bool = True
    peers: tuple[str, ...] = ()
    dht: bool = True
    lsd: bool = True
    trackers: bool = True
    up: int | None = None
    down: int | None = None
    proxy: Proxy | None = None
    encryption: Literal["required", "preferred", "off"] = "preferred"

    @property
    def local(self) -> bool:
        """Whether only this machine can be reached."""
        return all(it.startswith(("127.", "[::1]")) for it in self.listen.split(","))

    @property
    def near(self) -> bool:
        """Whether all peers, named or found, are on private networks."""
        hosts = [it.rpartition(":")[0].removeprefix("[").removesuffix("]") for it in self.peers]
        looks_here = self.discovery and self.lsd and not self.dht and not self.trackers
        try:
            private = all(ipaddress.ip_address(it).is_private for it in hosts)
            return private and (bool(hosts) or looks_here)
        except ValueError:
            return False

    @property
    def udp(self) -> bool:
        """Whether UDP is sent: it would bypass an HTTP proxy."""
        return self.proxy is None or self.proxy.kind == "socks5"

    def finds_peers(self, trackers: Sequence[str]) -> bool:
        """Whether unnamed peers can be found, or can find us.

        Args:
            trackers: of the torrent.
        """
        looks = self.discovery and ((self.dht and self.udp) or self.lsd)
        # Others may know a port that the user has chosen, but not one chosen by the system.
        known_port = any(not it.endswith(":0") for it in self.listen.split(","))
        asks = bool(self.asked(trackers))
        return looks or asks or (known_port and self.proxy is None)

    def asked(self, trackers: Sequence[str]) -> list[str]:
        """Those of the trackers that are asked for peers."""
        return [it for it in trackers if self.trackers and (self.udp or not it.startswith("udp:"))]

    @classmethod
    def loopback(cls, peers: tuple[str, ...] = ()) -> SwarmSettings:
        """Settings under which nothing leaves this machine."""
        return cls("127.0.0.1:0", discovery=False, peers=peers)


class Session:
    """A libtorrent session; when its block ends, it ends and nothing more is written.

    Attributes:
        peer_id: the 20 bytes by which peers know it.

    Raises:
        OutOfReach: libtorrent is not installed, or cannot listen where the settings say.
    """

    def __init__(self, settings: SwarmSettings) -> None:
        self._lt = libtorrent()
        self._settings = settings
        by_name = session_settings(self._lt, settings)
        self._session = self._lt.session(by_name)
        # A full-length fingerprint is the id by which peers know us.
        self.peer_id = by_name["peer_fingerprint"].encode()
        if settings.proxy is None and not self.port:
            raise OutOfReach(
                f"cannot listen on {settings.listen:.100}",
                hint="choose an address of this machine and a free port: --listen HOST:PORT",
            )
        self._handles: list[Any] = []
        self._folders = contextlib.ExitStack()
        # The descriptor becomes readable when the alert queue is no longer empty. Waiting in
        # libtorrent itself would delay Ctrl-C until it returns.
        self._wake, self._signal = socket.socketpair()
        self._wake.setblocking(False)
        self._signal.setblocking(False)
        self._session.set_alert_fd(self._signal.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._remove_torrents()
        finally:
            self._session.set_alert_fd(-1)
            # Its destructor waits for the threads of the network and the disk.
            del self._session
            self._folders.close()
            self._wake.close()
            self._signal.close()

    def _remove_torrents(self) -> None:
        left = len(self._handles)
        for handle in self._handles:
            self._session.remove_torrent(handle, self._lt.session.delete_partfile)
        self._handles.clear()
        deadline = time.monotonic() + CLOSE_TIMEOUT_S
        while left:
            # The alert comes when the files are closed.
            left -= sum(isinstance(it, self._lt.torrent_removed_alert) for it in self.alerts())
            if left and time.monotonic() > deadline:
                raise StorageFailed(
                    f"the disk has not finished writing after {CLOSE_TIMEOUT_S:.0f} s"
                )

    @property
    def port(self) -> int:
        """The port it listens on."""
        return int(self._session.listen_port())

    def add(
        self, params: Any, peers: Sequence[tuple[str, int]] = (), root: Path | None = None
    ) -> Any:
        """Add a torrent that starts at once, whatever else the session does.

        Args:
            params: libtorrent's.
            peers: to begin with.
            root: the checkpoint folder; None to keep the one in `params`.

        Raises:
            TorrentInvalid: libtorrent refuses it.
            StorageFailed: the folder cannot be opened.
        """
        if root is not None:
            params.save_path = self._name_of(root)
        flags = self._lt.torrent_flags
        params.flags &= ~(flags.paused | flags.auto_managed)
        params.peers = [*params.peers, *peers]
        # The session's own limits would exempt peers on the local network.
        params.upload_limit = self._settings.up or NO_LIMIT
        params.download_limit = self._settings.down or NO_LIMIT
        params.trackers = self._settings.asked(params.trackers)
        try:
            handle = self._session.add_torrent(params)
        except RuntimeError as error:
            raise TorrentInvalid(f"libtorrent refuses it: {error}") from None
        self._handles.append(handle)
        return handle

    def _name_of(self, root: Path) -> str:
        """A name of a folder for libtorrent, which accepts only UTF-8."""
        try:
            str(root).encode()
        except UnicodeEncodeError:
            with storage_errors(root):
                root.mkdir(parents=True, exist_ok=True)
                handle = os.open(root, os.O_RDONLY)
            self._folders.callback(os.close, handle)
            return f"/dev/fd/{handle}"
        return str(root)

    def wake(self) -> None:
        """Have `alerts` return at once; any thread may call it."""
        # A full socket wakes it as well.
        with contextlib.suppress(BlockingIOError):
            self._signal.send(b"!")

    def set_queue_time(self, seconds: int) -> None:
        """Keep requests for so many seconds of a peer's data open at it."""
        self._session.apply_settings({"request_queue_time": seconds})

    def divide(self, *, yes: bool) -> None:
        """Ask peers strictly by priority, for a few single blocks at a time, or as usual."""
        usual = self._lt.default_settings()
        self._session.apply_settings(
            {name: DIVIDING[name] if yes else usual[name] for name in DIVIDING}
        )

    def alerts(self, wait_s: float = WAIT_S) -> list[Any]:
        """The current alerts, after a short wait for at least one."""
        alerts = self._session.pop_alerts()
        if not alerts:
            select.select([self._wake], [], [], wait_s)
            with contextlib.suppress(BlockingIOError):
                self._wake.recv(4096)
            alerts = self._session.pop_alerts()
        return list(alerts)


def session_settings(lt: Any, settings: SwarmSettings) -> dict[str, Any]:
    """Our settings as those of a libtorrent session, by libtorrent's names."""
    category = lt.alert_category
    by_name: dict[str, Any] = {
        "user_agent": CLIENT,
        "peer_fingerprint": peer_id(lt),
        "listen_interfaces": settings.listen,
        "enable_dht": settings.discovery and settings.dht and settings.udp,
        "enable_lsd": settings.discovery and settings.lsd,
        # A port opened on the router would bypass the proxy.
        "enable_upnp": settings.discovery and settings.proxy is None,
        "enable_natpmp": settings.discovery and settings.proxy is None,
        "mixed_mode_algorithm": PREFER_TCP,
        # A peer that has nothing for us at the moment may be the one that sends a bad piece again.
        "close_redundant_connections": False,
        "alert_mask": category.error
        | category.status
        | category.storage
        | category.piece_progress
        | category.peer,
        "alert_queue_size": 100_000,
        "announce_to_all_trackers": True,
        "announce_to_all_tiers": True,
        "stop_tracker_timeout": 1,
    }
    by_name.update(_encryption(lt, settings))
    if settings.proxy is not None:
        by_name.update(_proxy(lt, settings.proxy))
        if not settings.udp:
            by_name["enable_outgoing_utp"] = False
            by_name["enable_incoming_utp"] = False
    if not settings.discovery or not settings.dht:
        by_name["dht_bootstrap_nodes"] = ""
    if not settings.discovery:
        by_name["webtorrent_stun_server"] = ""
    if settings.near:
        # uTP yields on a busy link, and hosts that share a link keep it busy.
        by_name["enable_outgoing_utp"] = False
        # Two hosts that connect to each other at the same time may both close.
        by_name["min_reconnect_time"] = 2
    if settings.local:
        # Here several peers share one address, and a lost one is worth trying again at once.
        by_name["allow_multiple_connections_per_ip"] = True
        by_name["min_reconnect_time"] = 1
        # uTP is 20 times slower than TCP on loopback, where there is nobody to be fair to.
        by_name["enable_outgoing_utp"] = False
        by_name["enable_incoming_utp"] = False
    return by_name


def peer_id(lt: Any) -> str:
    """A new id for this peer, 20 characters: libtorrent's usual prefix, the rest random."""
    beginning = str(lt.default_settings()["peer_fingerprint"])
    return beginning + secrets.token_hex(20)[: 20 - len(beginning)]


def _encryption(lt: Any, settings: SwarmSettings) -> dict[str, int]:
    policies, levels = lt.enc_policy, lt.enc_level
    policy, level = {
        "required": (policies.pe_forced, levels.pe_rc4),
        "preferred": (policies.pe_enabled, levels.pe_both),
        "off": (policies.pe_disabled, levels.pe_both),
    }[settings.encryption]
    return {
        "out_enc_policy": int(policy),
        "in_enc_policy": int(policy),
        "allowed_enc_level": int(level),
    }


def _proxy(lt: Any, proxy: Proxy) -> dict[str, Any]:
    kinds = lt.proxy_type_t
    without, with_password = {
        "socks5": (kinds.socks5, kinds.socks5_pw),
        "http": (kinds.http, kinds.http_pw),
    }[proxy.kind]
    return {
        "proxy_type": int(with_password if proxy.user else without),
        "proxy_hostname": proxy.host,
        "proxy_port": proxy.port,
        "proxy_username": proxy.user,
        "proxy_password": proxy.password,
        "proxy_hostnames": True,
        "proxy_peer_connections": True,
        "proxy_tracker_connections": True,
    }


def address(peer: str) -> tuple[str, int]:
    """The numeric address and the port of a HOST:PORT.

    Raises:
        SourceInvalid: it is not HOST:PORT, or the host is not known.
    """
    host, _, port = peer.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise SourceInvalid(
            f"a peer is written HOST:PORT, not {peer!r:.100}", hint="--peer 192.0.2.1:6881, say"
        )
    try:
        resolved = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise SourceInvalid(
            f"the peer {peer!r:.100} is not known ({error})",
            hint="correct its name, or leave it out",
        ) from None
    return str(resolved[0][4][0]), int(port)
