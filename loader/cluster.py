"""Several hosts as one mesh: `jax.distributed`, and what of a mesh is on this host."""

from __future__ import annotations

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh

from grokfetch.errors import OutOfReach
from loader.sharding import MeshShape, Position
from loader.shares import Share

__all__ = ["is_first", "join", "local_share", "meet"]

PATIENCE_S = 300
"""How long hosts wait for each other at the start."""

LONGEST_MS = 30 * 24 * 3600 * 1000
"""Longest wait at a meeting point, in milliseconds: a month, for a slow fetch."""

FAREWELL_S = 30
"""How long a host that is done, or has failed, waits for the others before it gives them up."""


def join(coordinator: str | None = None, hosts: int | None = None, host: int | None = None) -> None:
    """Make one of several processes whose devices jax then sees as one set; before its first use.

    Args:
        coordinator: HOST:PORT of the first process, which listens there and nowhere else; None if
            jax is to ask whoever started the processes: Slurm, MPI, GKE, TPU.
        hosts: how many processes there are, None as above.
        host: which one this is, from 0 on, None as above.

    Raises:
        OutOfReach: nobody has started such processes, or the others do not come.
    """
    try:
        jax.distributed.initialize(
            coordinator,
            hosts,
            host,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=PATIENCE_S,
            shutdown_timeout_seconds=FAREWELL_S,
            coordinator_bind_address=coordinator,
        )
    except (ValueError, RuntimeError) as error:
        raise OutOfReach(
            f"the hosts do not find each other: {str(error).splitlines()[0]}",
            hint="start one process a host, or say where: --coordinator HOST:PORT --num-hosts N "
            "--host-id I",
        ) from error


def meet(where: str) -> None:
    """Wait until all processes are at this point, as long as that takes.

    Collectives do not wait for ever, those of CPUs for less than a minute, and hosts load and fetch
    at rates of their own.

    Args:
        where: the name of the point, used once.
    """
    client = distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(where, LONGEST_MS)


def is_first() -> bool:
    """Whether this process is the one that speaks for all."""
    return jax.process_index() == 0


def local_share(mesh: Mesh) -> Share:
    """What the devices of this process hold on a mesh of the axes `expert` and `model`."""
    places = np.argwhere(
        [[it.process_index == jax.process_index() for it in row] for row in mesh.devices]
    )
    return Share(
        MeshShape(mesh.shape["expert"], mesh.shape["model"]),
        tuple(Position(int(expert), int(model)) for expert, model in places),
    )
