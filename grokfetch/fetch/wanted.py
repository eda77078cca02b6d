"""What a SOURCE means: a torrent or a magnet link, what it must be, and who brings it."""

from __future__ import annotations

import dataclasses
import functools
import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from grokfetch.errors import GrokfetchError, SelectionInvalid, SourceInvalid, TorrentInvalid
from grokfetch.events import Notice
from grokfetch.fetch.mirror import (
    Mirrors,
    MirrorSettings,
    Together,
    bring_tokenizer,
    environment,
    read_document,
)
from grokfetch.fetch.prepare import Asked
from grokfetch.fetch.source import PieceSource
from grokfetch.fetch.swarm import Swarm, SwarmSettings
from grokfetch.folder.store import Store
from grokfetch.manifest.match import in_force
from grokfetch.manifest.schema import Manifest, parse
from grokfetch.manifest.selection import Request
from grokfetch.manifest.shipped import grok_1, shipped
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.magnet import Magnet, link_of_hash, parse_magnet, unquoted
from grokfetch.torrent.metainfo import TorrentFile, parse_torrent

__all__ = ["Network", "Wanted", "begun_in", "describe", "read_manifest", "resolve"]

HUGGING_FACE = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)?"
    r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*?)(?:/tree/[^/]+)?/?(?<!\.torrent)(?<!\.json)",
    re.ASCII,
)
"""A repository's name, OWNER/NAME, alone or in its web address."""

KINDS = (
    (b"<!doctype html", "a web page"),
    (b"<html", "a web page"),
    (b"pk\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"%pdf", "a PDF document"),
    (b"\x80", "a pickle, as the shards of a checkpoint are"),
    (b"[", "a JSON list"),
    (b"magnet:", "a text with a magnet link, which can be SOURCE itself"),
)
"""The first bytes, in lower case, of files that users give for a torrent by mistake."""


@dataclasses.dataclass(frozen=True, slots=True)
class Network:
    """Whom to ask for pieces: how to take part in a swarm, and which mirrors to use.

    The proxy and the download limit in the swarm's settings also apply to mirrors. `mirrors` is
    whether to use HTTP at all, `web_seeds` are mirrors named by the user.
    """

    swarm: SwarmSettings
    mirrors: bool = True
    web_seeds: tuple[str, ...] = ()

    def bring_tokenizer(self, store: Store) -> Notice | None:
        """Fetch the tokenizer that the manifest names, unless the right one is there."""
        return bring_tokenizer(store, self.mirror_settings()) if self.mirrors else None

    def mirror_settings(self) -> MirrorSettings:
        """How to treat mirrors: through the same proxy, with the same limit."""
        proxy = self.swarm.proxy
        return MirrorSettings(
            environment=environment(os.environ),
            proxy=None
            if proxy is None
            else (proxy.kind, proxy.host, proxy.port, proxy.user, proxy.password),
            down=self.swarm.down,
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """Where the pieces come from and, if known, what they must be.

    Without an `origin` mirrors bring whole files, whose sha256 the manifest gives.
    `begun` is the folder of an earlier fetch if SOURCE is one. `peers` are known in addition to
    those of the origin, `request` is the part that SOURCE itself asks for, and `warnings` say which
    parts of SOURCE are ignored.
    """

    origin: Magnet | TorrentFile | None
    manifest: Manifest | None
    begun: Path | None = None
    peers: tuple[str, ...] = ()
    request: Asked | None = None
    warnings: tuple[str, ...] = ()

    def pieces(self, store: Store, network: Network) -> PieceSource | Mirrors:
        """The swarm together with every named mirror.

        Args:
            store: the folder to fetch into; its manifest may name mirrors if there is no other.
            network: whom to ask.
        """
        manifest = self.manifest or store.manifest_or_none()
        listed = () if manifest is None else manifest.mirrors
        if self.origin is None:
            addresses = tuple(dict.fromkeys((*network.web_seeds, *listed)))
            return Mirrors(addresses if network.mirrors else (), network.mirror_settings())
        peers = (*network.swarm.peers, *self.peers)
        swarm = Swarm(self.origin, dataclasses.replace(network.swarm, peers=peers))
        if not network.mirrors:
            return swarm
        linked = self.origin.web_seeds if isinstance(self.origin, Magnet) else ()
        return Together(swarm, (*network.web_seeds, *listed), linked, network.mirror_settings())


def resolve(
    source: str | None,
    manifest: Manifest | None,
    state: Path | None = None,
    network: Network | None = None,
) -> Wanted:
    """What a SOURCE argument means.

    Args:
        source: a magnet link or a bare info hash; the path or web address of a torrent or a
            manifest; the path of a folder; a repository on Hugging Face that a shipped manifest
            names; None for Grok-1.
        manifest: what the user says the payload must be.
        state: where the state of a folder is, if it is not in the folder.
        network: how the web is reached.

    Raises:
        SourceInvalid: it is none of these.
        OutOfReach: it is an address that delivers nothing.
        TorrentInvalid, ManifestInvalid: it is one, but malformed.
    """
    network = network or Network(SwarmSettings())
    if source is None:
        return _from_manifest(manifest or grok_1(), "the manifest")
    text = unquoted(source)
    if not text:
        raise SourceInvalid("SOURCE is empty", hint="leave it out for Grok-1")
    path = Path(source)
    link = text if re.match("magnet:", text, re.IGNORECASE) else link_of_hash(text)
    if link is not None and not _exists(path):
        return _from_magnet(parse_magnet(link), manifest, network)
    repository = HUGGING_FACE.fullmatch(text)
    if repository is not None and not _exists(path):
        return _from_repository(repository["name"], manifest, text)
    if re.match("https?://", text, re.IGNORECASE):
        return _from_file(read_document(text, network.mirror_settings()), text, manifest)
    if path.is_dir():
        return begun_in(Store(path, state), manifest)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SourceInvalid(
            f"not a magnet link, and not a file or folder that can be read ({error.strerror})",
            path=source,
            hint=_meant(path),
        ) from None
    return _from_file(data, source, manifest)


def _meant(path: Path) -> str:
    """What a SOURCE that does not exist may mean."""
    if path.suffix in {".torrent", ".json"} or "://" in str(path) or _exists(path):
        return SourceInvalid.next_step
    return f"{SourceInvalid.next_step}, as in: grokfetch fetch --to {path}"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        # A link is longer than a file name may be.
        return False


def _from_magnet(magnet: Magnet, manifest: Manifest | None, network: Network) -> Wanted:
    """A magnet link, or the torrent itself where an address in the link gives it."""
    manifest = manifest or _shipped(magnet.info_hash)
    warnings = list(magnet.unusable)
    request = functools.partial(_files_request, magnet.files) if magnet.files else None
    for url in magnet.metadata if network.mirrors else ():
        try:
            data = read_document(url, network.mirror_settings(), stranger=True)
            torrent = parse_torrent(data)
            if magnet.info_hash not in (torrent.v1, torrent.v2):
                raise TorrentInvalid("it is another torrent")
        except GrokfetchError as error:
            warnings.append(f"no metadata from {url:.100}: {error.what}")
            continue
        both = dataclasses.replace(
            torrent,
            trackers=tuple(dict.fromkeys((*torrent.trackers, *magnet.trackers))),
            web_seeds=tuple(dict.fromkeys((*torrent.web_seeds, *magnet.web_seeds))),
        )
        return Wanted(both, manifest, None, magnet.peers, request, tuple(warnings))
    return Wanted(magnet, manifest, None, (), request, tuple(warnings))


def _files_request(numbers: Sequence[int], _manifest: Manifest, layout: Layout) -> Request:
    """The files with these numbers in the torrent, as `so` counts them."""
    missing = [number for number in numbers if number >= len(layout.files)]
    if missing:
        raise SelectionInvalid(
            f"the torrent has no file of number {missing[0]} (so=)",
            hint="leave so= out of the link, and choose with --only GLOB",
        )
    files = [layout.files[number] for number in numbers]
    return Request(only=tuple(glob.escape(str(file.path)) for file in files if not file.pad))


def _from_repository(name: str, manifest: Manifest | None, source: str) -> Wanted:
    """What to fetch for a repository on Hugging Face: the manifest that we ship for it."""
    part = f"huggingface.co/{name}/".lower()
    fitting = (it for it in shipped() if any(part in mirror.lower() for mirror in it.mirrors))
    of_repository = next(fitting, None)
    if of_repository is None:
        raise SourceInvalid(
            "not a file or folder here; as a repository on Hugging Face it has no manifest among "
            "those that come with grokfetch",
            path=source,
            hint=f"run: hf download {name} --local-dir DIR, then: grokfetch manifest DIR",
        )
    return _from_manifest(manifest or of_repository, source)


def _from_file(data: bytes, name: str, manifest: Manifest | None) -> Wanted:
    if data.lstrip()[:1] == b"{":
        return _from_manifest(parse(data, name) if manifest is None else manifest, name)
    try:
        torrent = parse_torrent(data)
    except TorrentInvalid as error:
        if data[:1] == b"d":
            raise TorrentInvalid(error.what, path=name) from None
        raise TorrentInvalid(
            f"this is {_kind(data)}, neither a torrent nor a manifest",
            path=name,
            hint=SourceInvalid.next_step,
        ) from None
    return Wanted(torrent, manifest or _shipped(torrent.v1, torrent.v2))


def _kind(data: bytes) -> str:
    """What kind of file it is, in words, judged by its first bytes."""
    head = data[:512].lstrip().lower()
    if not head:
        return "an empty file"
    for start, kind in KINDS:
        if head.startswith(start):
            return kind
    return f"a file that begins with {data[:12]!r}"


def begun_in(store: Store, manifest: Manifest | None = None) -> Wanted:
    """What a fetch that was begun in a folder wants.

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
            hint=store.hint_nearby() or "name a SOURCE, and --to DIR",
        )
    wanted = _from_manifest(manifest or earlier, str(store.root))
    return dataclasses.replace(wanted, begun=store.root)


def _from_manifest(manifest: Manifest, name: str) -> Wanted:
    if manifest.magnet is None and all(file.sha256 for file in manifest.files):
        return Wanted(None, manifest)
    if manifest.magnet is None:
        raise SourceInvalid(
            "the manifest has no magnet link, and not the sha256 of every file",
            path=name,
            hint="name a SOURCE, and the manifest with --manifest",
        )
    return Wanted(parse_magnet(manifest.magnet), manifest)


def _shipped(*info_hashes: str | None) -> Manifest | None:
    """The manifest that we ship for a torrent with one of these info hashes."""
    return next((it for it in shipped() if it.info_hash and it.info_hash in info_hashes), None)


def describe(source: str, manifest: Manifest | None, state: Path | None) -> Manifest:
    """What a SOURCE holds, without asking a peer.

    Args:
        source: as for `resolve`; a manifest without a magnet link is enough.
        manifest: what the user says it must be.
        state: as for `resolve`.

    Raises:
        SourceInvalid: it is none, or only peers know what it holds.
        OutOfReach, ManifestInvalid, TorrentInvalid: as for `resolve`.
        Contradiction: a torrent is not what the manifest says.
    """
    path = Path(source)
    if _exists(path) and path.is_dir():
        begun_in(Store(path, state))
        return manifest or Store(path, state).manifest()
    if _exists(path) and path.read_bytes().lstrip()[:1] == b"{":
        return manifest or read_manifest(path)
    wanted = resolve(source, manifest, state)
    if isinstance(wanted.origin, TorrentFile):
        layout = parse_info(wanted.origin.info, wanted.origin.piece_layers)
        return in_force(wanted.manifest, wanted.origin, layout, None)
    if wanted.manifest is None:
        raise SourceInvalid(
            "only its peers know what this link holds",
            path=f"{source:.60}",
            hint="name its .torrent or its manifest; or run: grokfetch fetch LINK --to DIR, which "
            "looks at the disk as soon as it knows",
        )
    return wanted.manifest


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
