"""Several hosts that share a model: how they join, and what each one fetches; not a command."""

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
    """Be one of the processes while the block runs; if it fails, tell the others why.

    Raises:
        OutOfReach: the others do not join.
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
    """Which part of a checkpoint to fetch for this host: all of it if there is no other host.

    With several hosts, calling the result sets up the devices, so the main thread must do it.
    """

    def share(manifest: Manifest, layout: Layout) -> Request:
        from loader.devices.cluster import local_share

        arrangement = arrange(_config(manifest), loading)
        return share_request(local_share(arrangement.mesh), manifest, layout)

    return share if hosts.several else Request()


def _keep_stdout() -> None:
    """Send to stderr what the C++ code of CPU collectives writes to stdout."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)


def share_request(share: Share, manifest: Manifest, layout: Layout) -> Request:
    """Which part of a checkpoint to fetch for a host's share of it.

    Raises:
        NoModel: the manifest describes files only.
        MeshInvalid: the mesh does not divide the model.
    """
    spans = file_spans(manifest, _config(manifest), share, layout.piece_length)
    return Request(extract=Extract(str(share), tuple(spans.items())))


def _config(manifest: Manifest) -> GrokConfig:
    if manifest.model is None:
        raise NoModel(f"{manifest.name} does not describe a model that hosts could share")
    return GrokConfig.from_mapping(manifest.model)
