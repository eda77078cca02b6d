"""What the environment says about HTTP: proxies, certificates, the Hub. Nothing in it is an error.

`HTTP_PROXY`, `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY` (or in lower case) are read as curl reads
them, networks and `[::1]` in `NO_PROXY` included; `SSL_CERT_FILE`, `SSL_CERT_DIR`,
`REQUESTS_CA_BUNDLE` and `CURL_CA_BUNDLE` name certificates; `HF_ENDPOINT` and `HF_TOKEN` are those
of huggingface_hub. What cannot be used becomes a notice with the variable's name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import re
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from grokfetch.fetch.mirror.addresses import label

__all__ = ["HUB", "Environment", "ProxyUnusable", "environment"]

HUB = "https://huggingface.co"

KINDS = ("http", "https", "socks5", "socks5h")
"""The proxies that httpx knows."""

CERTIFICATES = ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class ProxyUnusable(Exception):
    """A variable names a proxy for this host, and the proxy cannot be used."""


@dataclasses.dataclass(frozen=True, slots=True)
class Environment:
    """The settings for HTTP.

    Attributes:
        proxies: for each scheme ("http", "https", "all"), the variable and its value.
        bypass: the entries of `NO_PROXY`.
        certificates: a file or folder of certificates to trust instead of those of httpx.
        hub: the address that replaces `HUB` in manifests.
        token: sent to the Hub and to nobody else.
        notices: what the user should know.
    """

    proxies: Mapping[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    bypass: tuple[str, ...] = ()
    certificates: Path | None = None
    hub: str = HUB
    token: str | None = dataclasses.field(default=None, repr=False)
    notices: tuple[str, ...] = ()

    def proxy(self, scheme: str, host: str, port: int | None) -> str | None:
        """The address of the proxy for a host; None for no proxy.

        Raises:
            ProxyUnusable: the one that is named cannot be used.
        """
        variable, address = self.proxies.get(scheme) or self.proxies.get("all") or ("", "")
        if not address or bypassed(self.bypass, host, port):
            return None
        why = _unusable_proxy(address)
        if why is not None:
            raise ProxyUnusable(f"{variable} names a proxy that cannot be used: {why}")
        return address

    def at_hub(self, address: str) -> str:
        """The address; one of the Hub is moved to the endpoint that the environment names."""
        inside = address == HUB or address.startswith(f"{HUB}/")
        return self.hub + address[len(HUB) :] if inside else address

    def token_for(self, scheme: str, host: str, port: int | None) -> str | None:
        """The token if this is the Hub, else None."""
        hub = urlsplit(self.hub)
        same = (hub.scheme, hub.hostname, hub.port or _port(hub.scheme)) == (
            scheme,
            host,
            port or _port(scheme),
        )
        return self.token if same else None


def environment(variables: Mapping[str, str]) -> Environment:
    """What the environment variables say; looks at the certificates that they name."""
    notices: list[str] = []
    proxies = {}
    for scheme in ("http", "https", "all"):
        # In a CGI script HTTP_PROXY comes from the client's headers.
        names = [f"{scheme}_proxy", f"{scheme.upper()}_PROXY"]
        name = next((name for name in names if variables.get(name, "").strip()), None)
        if name == "HTTP_PROXY" and "REQUEST_METHOD" in variables:
            continue
        if name is not None:
            proxies[name.lower().removesuffix("_proxy")] = (
                name,
                _proxy_address(name, variables[name].strip(), notices),
            )
    bypass = variables.get("no_proxy") or variables.get("NO_PROXY") or ""
    return Environment(
        proxies,
        tuple(entry for entry in re.split(r"[,\s]+", bypass) if entry),
        _certificates(variables, notices),
        _hub(variables.get("HF_ENDPOINT", "").strip().rstrip("/"), notices),
        _token(variables, notices),
        tuple(notices),
    )


def _proxy_address(name: str, text: str, notices: list[str]) -> str:
    address = text if "://" in text else f"http://{text}"
    if address.lower().startswith("socks://"):
        address = "socks5" + address[len("socks") :]
        notices.append(f"{name}: {label(text)} is taken for {label(address)}")
    return address


def _unusable_proxy(address: str) -> str | None:
    kind, _, rest = address.partition("://")
    if kind.lower() not in KINDS:
        return f"{kind:.20}:// is not one of {', '.join(f'{it}://' for it in KINDS)}"
    try:
        parts = urlsplit(address)
        _ = parts.port
    except ValueError as error:
        return str(error)
    return None if parts.hostname else f"{rest!r:.40} names no host"


def bypassed(entries: tuple[str, ...], host: str, port: int | None) -> bool:
    """Whether `NO_PROXY` exempts a host: by name, domain, address, prefix or network."""
    return any(_excepts(entry.lower(), host.lower().rstrip("."), port) for entry in entries)


def _excepts(entry: str, host: str, port: int | None) -> bool:
    if entry == "*":
        return True
    entry = urlsplit(entry).netloc if "://" in entry else entry
    match = re.fullmatch(r"\[(.*)\](?::(\d+))?", entry) or re.fullmatch(r"([^:]*)(?::(\d+))", entry)
    name, only_port = (match[1], match[2]) if match else (entry, None)
    if only_port is not None and only_port != str(port):
        return False
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host)
        with contextlib.suppress(ValueError):
            return address in ipaddress.ip_network(name, strict=False)
        prefix = name.rstrip("*")
        return prefix.endswith((".", ":")) and host.startswith(prefix)
    name = name.removeprefix("*").removeprefix(".").rstrip(".")
    return bool(name) and (host == name or host.endswith(f".{name}"))


def _certificates(variables: Mapping[str, str], notices: list[str]) -> Path | None:
    for name in CERTIFICATES:
        if variables.get(name):
            path = Path(variables[name])
            why = _unusable_certificates(name, path)
            if why is None:
                return path
            notices.append(f"{name}: {path} is not used: {why}")
    return None


def _unusable_certificates(name: str, path: Path) -> str | None:
    try:
        if path.is_dir():
            return "it is a folder" if name == "SSL_CERT_FILE" else None
        return _unusable_file(path, path.stat().st_mtime_ns)
    except OSError as error:
        return error.strerror or str(error)


@functools.cache
def _unusable_file(path: Path, mtime_ns: int) -> str | None:  # noqa: ARG001  # read again if changed
    """Why certificates cannot be used; to read a system's takes 30 ms, and each source asks."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cafile=path)
    except ssl.SSLError:
        return "there are no certificates in it"
    return None


def _hub(endpoint: str, notices: list[str]) -> str:
    if not endpoint:
        return HUB
    try:
        parts = urlsplit(endpoint)
        _ = parts.port
        if parts.scheme in ("http", "https") and parts.hostname:
            return urlunsplit((parts.scheme, parts.netloc, parts.path, "", ""))
    except ValueError:
        pass
    notices.append("HF_ENDPOINT is not used: it is not an http or https address")
    return HUB


def _token(variables: Mapping[str, str], notices: list[str]) -> str | None:
    token = variables.get("HF_TOKEN", "").strip()
    if not token:
        return None
    if not re.fullmatch(r"[!-~]+", token):
        notices.append("HF_TOKEN is not used: a token has no spaces and only ASCII characters")
        return None
    return token


def _port(scheme: str) -> int:
    return 443 if scheme == "https" else 80
