"""The options that say which of several hosts a command runs on, and their values."""

from __future__ import annotations

import dataclasses
import re

import click

from grokfetch.commands.options import bundle
from grokfetch.commands.value_types import Integer, Mesh
from loader.weights.host_share import Share, share_of_host
from loader.weights.partition import MeshShape

__all__ = ["Hosts", "hosts_options", "share_options"]


@dataclasses.dataclass(frozen=True, slots=True)
class Hosts:
    """The processes that run a model together, one per host.

    `coordinator`, `count` and `number` are given by the user, or found by jax if `detect` is true.
    """

    detect: bool = False
    coordinator: str | None = None
    count: int | None = None
    number: int | None = None

    @property
    def several(self) -> bool:
        """Whether there is more than one process."""
        return self.detect or self.coordinator is not None


def _hosts(
    *,
    cluster: bool,
    coordinator: str | None,
    num_hosts: int | None,
    host_id: int | None,
) -> Hosts:
    by_hand = [coordinator, num_hosts, host_id]
    if None in by_hand and by_hand != [None] * 3:
        raise click.UsageError("--coordinator, --num-hosts and --host-id must be given together")
    if cluster and coordinator is not None:
        raise click.UsageError("--cluster finds the coordinator itself: leave out --coordinator")
    return Hosts(cluster, coordinator, num_hosts, host_id)


def _host_and_port(
    _context: click.Context, _parameter: click.Parameter, address: str | None
) -> str | None:
    if address is not None and not re.fullmatch(r".+:\d{1,5}", address):
        raise click.BadParameter(f"not HOST:PORT: {address!r:.80}")
    return address


_count = click.option(
    "--num-hosts",
    type=Integer(min=1),
    help="Number of hosts that share the model, one process each.",
)
_number = click.option(
    "--host-id", type=Integer(min=0), help="Number of this host, counted from 0."
)

hosts_options = bundle(
    "hosts",
    _hosts,
    click.option(
        "--cluster",
        is_flag=True,
        help="Run together with the other processes of this Slurm, MPI, GKE or TPU job.",
    ),
    click.option(
        "--coordinator",
        metavar="HOST:PORT",
        callback=_host_and_port,
        help="The same without a job: where host 0 waits for the others. It is not encrypted.",
    ),
    _count,
    _number,
)


def _share(num_hosts: int | None, host_id: int | None, mesh: MeshShape | None) -> Share | None:
    if num_hosts is not None and host_id is not None and mesh is not None:
        return share_of_host(mesh, host_id, num_hosts)
    if (num_hosts, host_id, mesh) != (None, None, None):
        raise click.UsageError("--num-hosts, --host-id and --mesh must be given together")
    return None


share_options = bundle(
    "of_host",
    _share,
    _count,
    _number,
    click.option(
        "--mesh",
        type=Mesh(),
        metavar="expert=N,model=M",
        help="Only what the devices of one host need, for this mesh of all hosts' devices: if "
        "experts are split, the host's own ones, otherwise nearly everything.",
    ),
)
