"""The options by which a person says which mirrors to use; no command of its own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from grokfetch.commands.reporting import reporter

if TYPE_CHECKING:
    from grokfetch.fetch.mirror import MirrorSettings
    from grokfetch.fetch.source import PieceSource
    from grokfetch.fetch.swarm import SwarmSettings
    from grokfetch.folder.store import Store
    from grokfetch.manifest.schema import Manifest
    from grokfetch.torrent.magnet import Magnet
    from grokfetch.torrent.metainfo import TorrentFile

__all__ = ["Mirrors", "mirror_options"]


@dataclasses.dataclass(frozen=True, slots=True)
class Mirrors:
    """What a person wants of mirrors: whether to use HTTP at all, and addresses named by hand.

    `swarm` are the settings of the swarm beside them, of which the proxy and the limit of the
    download hold here too.
    """

    swarm: SwarmSettings
    wanted: bool = True
    named: tuple[str, ...] = ()

    def beside(
        self,
        pieces: PieceSource,
        origin: Magnet | TorrentFile,
        store: Store,
        manifest: Manifest | None,
    ) -> PieceSource:
        """The source of pieces together with every mirror that somebody names.

        Args:
            pieces: the swarm.
            origin: what it was made from; a magnet link may name mirrors.
            store: the checkpoint folder, whose manifest may name some.
            manifest: the one to be put in force, None for that of the folder.
        """
        if not self.wanted:
            return pieces
        from grokfetch.fetch.mirror import Together
        from grokfetch.torrent.magnet import Magnet

        there = manifest or store.manifest_or_none()
        listed = () if there is None else there.mirrors
        strange = origin.web_seeds if isinstance(origin, Magnet) else ()
        return Together(pieces, (*self.named, *listed), strange, self._settings())

    def bring_tokenizer(self, store: Store) -> None:
        """Fetch the tokenizer that the manifest names, if the right one is not there; say so."""
        if not self.wanted:
            return
        from grokfetch.fetch.mirror import bring_tokenizer

        notice = bring_tokenizer(store, self._settings())
        if notice is not None:
            with reporter("tokenizer") as sink:
                sink.take(notice)

    def _settings(self) -> MirrorSettings:
        from grokfetch.fetch.mirror import MirrorSettings

        proxy = self.swarm.proxy
        return MirrorSettings(
            proxy=None if proxy is None else (proxy.host, proxy.port, proxy.user, proxy.password),
            down=self.swarm.down,
        )


_OPTIONS = (
    click.option(
        "--web-seed",
        "web_seeds",
        metavar="URL",
        multiple=True,
        callback=lambda _context, _parameter, value: _checked(value),
        help="A mirror to use as well: the folder above the torrent's, or an address with {path}.",
    ),
    click.option(
        "--mirrors/--no-mirrors",
        default=True,
        show_default=True,
        help="Use HTTP too: the mirrors of manifest, link and torrent, the tokenizer's address.",
    ),
)


def _checked(addresses: tuple[str, ...]) -> tuple[str, ...]:
    if addresses:
        from grokfetch.fetch.mirror import unusable

        for address in addresses:
            why = unusable(address, stranger=False)
            if why is not None:
                raise click.BadParameter(f"{address:.200}: {why}")
    return addresses


def mirror_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command with `swarm_options` these too; it gets them as `Mirrors` named `mirrors`."""

    @functools.wraps(command)
    def wired(
        *args: Any, swarm: SwarmSettings, mirrors: bool, web_seeds: tuple[str, ...], **kwargs: Any
    ) -> None:
        command(*args, swarm=swarm, mirrors=Mirrors(swarm, mirrors, web_seeds), **kwargs)

    for option in reversed(_OPTIONS):
        wired = option(wired)
    return wired
