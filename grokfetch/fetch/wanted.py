"""What a SOURCE stands for: a torrent or a magnet link, what it must be, and who brings it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from grokfetch.errors import SourceInvalid, TorrentInvalid
from grokfetch.events import Notice
from grokfetch.fetch.mirror import MirrorSettings, Together, bring_tokenizer
from grokfetch.fetch.source import PieceSource
from grokfetch.fetch.swarm import Swarm, SwarmSettings
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, parse
from grokfetch.manifest.shipped import grok_1, shipped
from grokfetch.torrent.magnet import Magnet, parse_magnet
from grokfetch.torrent.metainfo import TorrentFile, parse_torrent

__all__ = ["Network", "Wanted", "begun_in", "read_manifest", "resolve"]


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """Whom to ask for pieces: how to take part in a swarm, and which mirrors to use.

    Of the swarm's settings the proxy and the limit of the download hold for mirrors too. `mirrors`
    is whether to use HTTP at all, `web_seeds` are mirrors named by hand.
    """

    swarm: SwarmSettings
    mirrors: bool = True
    web_seeds: tuple[str, ...] = ()

    def bring_tokenizer(self, store: Store) -> Notice | None:
        """Fetch the tokenizer that the manifest names, if the right one is not there."""
        return bring_tokenizer(store, self.mirror_settings()) if self.mirrors else None

    def mirror_settings(self) -> MirrorSettings:
        """How mirrors are to be treated: through the same proxy, with the same limit."""
        proxy = self.swarm.proxy
        return MirrorSettings(
            proxy=None if proxy is None else (proxy.host, proxy.port, proxy.user, proxy.password),
            down=self.swarm.down,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Where the pieces come from, and what they must be if that is known.

    `begun` is the folder of an earlier fetch if SOURCE is one.
    """

    origin: Magnet | TorrentFile
    manifest: Manifest | None
    begun: Path | None = None

    def pieces(self, store: Store, network: Network) -> PieceSource:
        """The swarm together with every mirror that somebody names.

        Args:
            store: the folder to fetch into; its manifest may name mirrors if there is no other.
            network: whom to ask.
        """
        swarm = Swarm(self.origin, network.swarm)
        if not network.mirrors:
            return swarm
        manifest = self.manifest or store.manifest_or_none()
        listed = () if manifest is None else manifest.mirrors
        linked = self.origin.web_seeds if isinstance(self.origin, Magnet) else ()
        return Together(swarm, (*network.web_seeds, *listed), linked, network.mirror_settings())


def resolve(source: str | None, manifest: Manifest | None, state: Path | None = None) -> Wanted:
    """What a SOURCE argument means.

    Args:
        source: a magnet link, or the path of a torrent, a manifest or a folder; None for Grok-1.
        manifest: what a person says the payload must be.
        state: where the state of a folder lies, if it is not in the folder.

    Raises:
        SourceInvalid: it is none of these.
        TorrentInvalid, ManifestInvalid: it is one, but malformed.
    """
    if source is None:
        return _from_manifest(manifest or grok_1(), "the manifest")
    if source.startswith("magnet:"):
        magnet = parse_magnet(source)
        return Wanted(magnet, manifest or _shipped(magnet.info_hash))
    path = Path(source)
    if not source:
        raise SourceInvalid("SOURCE is empty", hint="leave it out for Grok-1")
    if path.is_dir():
        return begun_in(Store(path, state), manifest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceInvalid(
            f"no magnet link, and cannot be read as a file ({error.strerror})", path=source
        ) from None
    return _from_file(data, source, manifest)


def _from_file(data: bytes, name: str, manifest: Manifest | None) -> Wanted:
    if data.lstrip()[:1] == b"{":
        return _from_manifest(parse(data, name) if manifest is None else manifest, name)
    try:
        torrent = parse_torrent(data)
    except TorrentInvalid as error:
        raise TorrentInvalid(error.what, path=name) from None
    return Wanted(torrent, manifest or _shipped(torrent.v1) or _shipped(torrent.v2))


def begun_in(store: Store, manifest: Manifest | None = None) -> Wanted:
    """What a fetch that was begun in a folder stands for.

    Raises:
        SourceInvalid: none was.
    """
    torrent, earlier = store.torrent(), store.manifest_or_none()
    if torrent is not None:
        return Wanted(torrent, manifest, store.root)
    if earlier is None:
        raise SourceInvalid(
            "no fetch was begun in this folder",
            path=store.root,
            hint="name a SOURCE, and --to DIR",
        )
    wanted = _from_manifest(manifest or earlier, str(store.root))
    return dataclasses.replace(wanted, begun=store.root)


def _from_manifest(manifest: Manifest, name: str) -> Wanted:
    if manifest.magnet is None:
        raise SourceInvalid(
            "the manifest has no magnet link",
            path=name,
            hint="name a SOURCE, and the manifest with --manifest",
        )
    return Wanted(parse_magnet(manifest.magnet), manifest)


def _shipped(info_hash: str | None) -> Manifest | None:
    return next((known for known in shipped() if info_hash and known.info_hash == info_hash), None)


def read_manifest(path: Path) -> Manifest:
    """The manifest in a file.

    Raises:
        ManifestInvalid: it is malformed.
        SourceInvalid: it cannot be read.
    """
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise SourceInvalid(f"cannot be read: {error.strerror}", path=path) from None
