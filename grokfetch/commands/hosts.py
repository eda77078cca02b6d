"""The options by which a person says that several hosts share a model; no command of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from grokfetch.commands.loading import Loading, mesh_shape

if TYPE_CHECKING:
    from grokfetch.fetch import Asked
    from grokfetch.manifest.schema import Manifest
    from grokfetch.manifest.selection import Request
    from loader.weights.host_share import Share
    from loader.weights.schema import GrokConfig

__all__ = ["Hosts", "hosts_options", "share_options", "share_request"]


@dataclasses.dataclass(frozen=True, slots=True)
class Hosts:
    """The processes that run a model together, one a host.

    `coordinator`, `count` and `number` are given by hand, or found by jax where `detect` says so.
    """

    detect: bool = False
    coordinator: str | None = None
    count: int | None = None
    number: int | None = None

    @property
    def several(self) -> bool:
        """Whether there are other processes than this one."""
        return self.detect or self.coordinator is not None

    @contextlib.contextmanager
    def joined(self) -> Iterator[None]:
        """Be one of the processes while the block runs; if it fails the others are told why.

        Raises:
            OutOfReach: the others do not come.
        """
        if not self.several:
            yield
            return
        from loader.devices.cluster import give_up, join

        _keep_stdout()
        join(self.coordinator, self.count, self.number)
        try:
            yield
        except BaseException as error:
            give_up(str(error) or type(error).__name__)
            raise

    def asked(self, loading: Loading) -> Asked:
        """What to fetch of a checkpoint for this host: all of it if there is no other host."""
        from grokfetch.manifest.selection import Request

        def share(manifest: Manifest, piece_length: int) -> Request:
            from loader.devices.arrangement import arrange
            from loader.devices.cluster import local_share

            there = arrange(_config(manifest), loading)
            return share_request(local_share(there.mesh), manifest, piece_length)

        return share if self.several else Request()


def _keep_stdout() -> None:
    """Send to stderr what the collectives of CPUs, written in C++, say on stdout."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding)
    os.dup2(2, 1)


def _checked(address: str | None) -> str | None:
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise click.BadParameter(f"not HOST:PORT: {address!r:.80}")
    return address


_COUNT = click.option(
    "--num-hosts",
    type=click.IntRange(min=1),
    help="How many hosts share the model, one process each.",
)
_NUMBER = click.option(
    "--host-id", type=click.IntRange(min=0), help="Which of the hosts this is, from 0 on."
)
_OPTIONS = (
    click.option(
        "--cluster",
        is_flag=True,
        help="Run with the other processes of this job, started by Slurm, MPI, GKE or TPU.",
    ),
    click.option(
        "--coordinator",
        metavar="HOST:PORT",
        callback=lambda _context, _parameter, value: _checked(value),
        help="The same by hand: where host 0 waits for the others. Nothing there is encrypted.",
    ),
    _COUNT,
    _NUMBER,
)


def hosts_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it receives them as one `Hosts` named `hosts`."""

    @functools.wraps(command)
    def wired(
        *args: Any,
        cluster: bool,
        coordinator: str | None,
        num_hosts: int | None,
        host_id: int | None,
        **kwargs: Any,
    ) -> None:
        by_hand = [coordinator, num_hosts, host_id]
        if None in by_hand and by_hand != [None] * 3:
            raise click.UsageError("--coordinator, --num-hosts and --host-id go together")
        if cluster and coordinator is not None:
            raise click.UsageError("--cluster finds out what --coordinator says")
        command(*args, hosts=Hosts(cluster, coordinator, num_hosts, host_id), **kwargs)

    for option in reversed(_OPTIONS):
        wired = option(wired)
    return wired


def share_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options of one host; it gets a `Share` named `of_host`, or None."""

    @functools.wraps(command)
    def wired(
        *args: Any, num_hosts: int | None, host_id: int | None, mesh: str | None, **kwargs: Any
    ) -> None:
        given = [num_hosts, host_id, mesh]
        if None in given and given != [None] * 3:
            raise click.UsageError("--num-hosts, --host-id and --mesh go together")
        of_host = None
        if num_hosts is not None and host_id is not None and mesh is not None:
            from loader.weights.host_share import share_of_host

            of_host = share_of_host(mesh_shape(mesh), host_id, num_hosts)
        command(*args, of_host=of_host, **kwargs)

    for option in (
        click.option(
            "--mesh",
            metavar="expert=N,model=M",
            help="Only what the devices of one host need of a model on this mesh of all hosts' "
            "devices: of split experts its own, else nearly everything.",
        ),
        _NUMBER,
        _COUNT,
    ):
        wired = option(wired)
    return wired


def share_request(share: Share, manifest: Manifest, piece_length: int) -> Request:
    """What to fetch of a checkpoint for a share of it.

    Raises:
        NoModel: the manifest describes files only.
        MeshInvalid: the mesh does not divide the model.
    """
    from grokfetch.manifest.selection import Extract, Request
    from loader.weights.host_share import file_spans

    spans = file_spans(manifest, _config(manifest), share, piece_length)
    return Request(extract=Extract(str(share), tuple(spans.items())))


def _config(manifest: Manifest) -> GrokConfig:
    from grokfetch.errors import NoModel
    from loader.weights.schema import GrokConfig

    if manifest.model is None:
        raise NoModel(f"{manifest.name} is no model that hosts could share")
    return GrokConfig.from_mapping(manifest.model)
