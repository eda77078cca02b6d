"""Several hosts that share a model: how they meet, and what each of them fetches; no command."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from grokfetch.commands.host_options import Hosts
from grokfetch.errors import NoModel, exit_code_of
from grokfetch.fetch import Asked
from grokfetch.manifest.schema import Manifest
from grokfetch.manifest.selection import Extract, Request
from grokfetch.torrent.layout import Layout
from loader.devices.arrangement import Loading, arrange
from loader.weights.host_share import Share, file_spans
from loader.weights.schema import GrokConfig

__all__ = ["asked", "joined", "share_request"]


@contextlib.contextmanager
def joined(hosts: Hosts) -> Iterator[None]:
    """Be one of the processes while the block runs; if it fails the others are told why.

    Raises:
        OutOfReach: the others do not come.
    """
    if not hosts.several:
        yield
        return
    from loader.devices.cluster import give_up, join, watched

    _keep_stdout()
    join(hosts.coordinator, hosts.count, hosts.number)
    try:
        with watched():
            yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        why = "it was interrupted" if interrupted else str(error) or type(error).__name__
        give_up(why, exit_code_of(error))
        raise


def asked(hosts: Hosts, loading: Loading) -> Asked:
    """What to fetch of a checkpoint for this host: all of it if there is no other host.

    Where there are others, whoever calls the result sets up the devices: the main thread.
    """

    def share(manifest: Manifest, layout: Layout) -> Request:
        from loader.devices.cluster import local_share

        arrangement = arrange(_config(manifest), loading)
        return share_request(local_share(arrangement.mesh), manifest, layout)

    return share if hosts.several else Request()


def _keep_stdout() -> None:
    """Send to stderr what the collectives of CPUs, written in C++, say on stdout."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)


def share_request(share: Share, manifest: Manifest, layout: Layout) -> Request:
    """What to fetch of a checkpoint for a share of it.

    Raises:
        NoModel: the manifest describes files only.
        MeshInvalid: the mesh does not divide the model.
    """
    spans = file_spans(manifest, _config(manifest), share, layout.piece_length)
    return Request(extract=Extract(str(share), tuple(spans.items())))


def _config(manifest: Manifest) -> GrokConfig:

    if manifest.model is None:
        raise NoModel(f"{manifest.name} is not a model that hosts could share")
    return GrokConfig.from_mapping(manifest.model)
