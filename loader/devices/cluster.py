"""Several hosts as one mesh: `jax.distributed`, and the part of a mesh on this host."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import jax
from jax._src import distributed
from jax.sharding import Mesh

from grokfetch.errors import GrokfetchError, OutOfReach
from loader.weights.host_share import Share
from loader.weights.partition import MeshShape, positions

__all__ = ["check", "give_up", "is_first", "join", "local_share", "meet", "watched"]

PATIENCE_S = 300
"""How long hosts wait for each other at the start."""

FAREWELL_S = 30
"""How long a host that is done, or has failed, waits for the others before jax ends them all."""

SILENCE_S = 20
"""How long a host may be silent before jax considers it dead; one of jax's threads reports it."""

GRACE_S = 3
"""How long the main thread may take to notice on its own that another host has given up."""

PARTING_S = 10
"""How long a host whose main thread cannot end waits for the others before it ends anyway."""

POLL_S = 0.2
ARRIVED, FAILED = "grokfetch/arrived", "grokfetch/failed"


def join(coordinator: str | None = None, hosts: int | None = None, host: int | None = None) -> None:
    """Join several processes whose devices jax then sees as one set; call it before jax is used.

    Args:
        coordinator: HOST:PORT of the first process, which listens only there; None if jax should
            ask what started the processes: Slurm, MPI, GKE, TPU.
        hosts: how many processes there are, None as above.
        host: the number of this one, from 0, None as above.

    Raises:
        OutOfReach: nothing has started such processes, or the first one is not there.
    """
    if coordinator is not None and host != 0:
        _wait_for(coordinator)
    ending = signal.getsignal(signal.SIGTERM)
    try:
        jax.distributed.initialize(
            coordinator,
            hosts,
            host,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=PATIENCE_S,
            heartbeat_timeout_seconds=SILENCE_S,
            shutdown_timeout_seconds=FAREWELL_S,
            coordinator_bind_address=coordinator,
        )
    except (ValueError, RuntimeError) as error:
        raise OutOfReach(
            f"the hosts cannot be joined: {str(error).splitlines()[0]}",
            hint="start one process a host, and say where: --coordinator HOST:PORT --num-hosts N "
            "--host-id I",
        ) from error
    # jax only records SIGTERM.
    signal.signal(signal.SIGTERM, ending)


def _wait_for(coordinator: str) -> None:
    """Return once a process listens there: jax ends this process if none does."""
    name, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            socket.create_connection((name.strip("[]"), int(port)), PATIENCE_S).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise OutOfReach(
                    f"host 0 is not found at {coordinator}: {error.strerror or error}",
                    hint="start the process with --host-id 0 there, and open its port",
                ) from None
            time.sleep(POLL_S)
        else:
            return


def meet(where: str) -> None:
    """Wait until all processes are at this point, as long as that takes.

    Collectives do not wait for ever, on CPUs for less than a minute, and hosts fetch and load at
    different rates.

    Args:
        where: the name of the point, used once.

    Raises:
        OutOfReach: one of them has given up.
    """
    client = distributed.global_state.client
    if client is None:
        return
    client.key_value_set(f"{ARRIVED}/{where}/{jax.process_index()}", "")
    while len(client.key_value_dir_get(f"{ARRIVED}/{where}")) < jax.process_count():
        check()
        time.sleep(POLL_S)


def check() -> None:
    """Make sure that no process has given up.

    Raises:
        OutOfReach: one of them has given up.
    """
    client = distributed.global_state.client
    for key, why in () if client is None else client.key_value_dir_get(FAILED):
        raise OutOfReach(
            f"host {key.rpartition('/')[2]} has given up: {why}",
            hint="fix what it reports, then start all hosts again",
        )


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """While the block runs, end this process soon after another one has died or given up.

    A collective that waits for the other host cannot be interrupted, and jax aborts if it finds a
    host dead: then the process ends here, with one line and the exit code of OutOfReach.

    Raises:
        OutOfReach: another host has given up, and so a collective has failed.
    """
    over = threading.Event()
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(_ABORTED, ctypes.c_void_p))
    threading.Thread(target=_watch, args=(over,), daemon=True).start()
    try:
        yield
        _Farewell.code = 0
    except GrokfetchError:
        raise
    except (RuntimeError, ValueError):
        # This is how a collective fails when a host has left. Which host is known once it has said
        # so, or once it has been silent for long enough and jax aborts.
        deadline = time.monotonic() + SILENCE_S + GRACE_S
        while time.monotonic() < deadline:
            check()
            time.sleep(POLL_S)
        raise
    finally:
        over.set()


def _watch(over: threading.Event) -> None:
    """End the process if another host has given up and the main thread continues anyway."""
    while not over.wait(POLL_S):
        try:
            check()
        except OutOfReach as error:
            if not over.wait(GRACE_S):
                _depart(error)
        except RuntimeError:
            # Host 0, which keeps the messages, is gone; jax notices too, and aborts.
            return


def _depart(error: OutOfReach) -> None:
    """End the process, but disconnect first: the others would wait for it at their end."""
    _Farewell.code = error.exit_code
    os.write(2, f"error: {error}\n".encode())

    def take_leave() -> None:
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()  # type: ignore[no-untyped-call]

    leaving = threading.Thread(target=take_leave, daemon=True)
    leaving.start()
    leaving.join(PARTING_S)
    os._exit(error.exit_code)


def _end(error: OutOfReach) -> None:
    os.write(2, f"error: {error}\n".encode())
    os._exit(error.exit_code)


class _Farewell:
    """The exit code of a process that is done or has given up, and only waits for the others."""

    code: int | None = None


def _aborted(_number: int) -> None:
    """What a thread of jax runs when it aborts."""
    if _Farewell.code is not None:
        os._exit(_Farewell.code)
    _end(
        OutOfReach(
            f"another host has died, or has not been heard of for {SILENCE_S} s",
            hint="see what it reports, then start all hosts again",
        )
    )


_ABORTED = ctypes.CFUNCTYPE(None, ctypes.c_int)(_aborted)


def give_up(why: str, code: int) -> None:
    """Tell the other processes, which call `meet` and `check`, that this one will not continue.

    Args:
        why: in a few words.
        code: with which it will exit.
    """
    _Farewell.code = code
    client = distributed.global_state.client
    # Host 0, which keeps the messages, may be the one that has died.
    with contextlib.suppress(RuntimeError):
        if client is not None:
            client.key_value_set(f"{FAILED}/{jax.process_index()}", why)


def is_first() -> bool:
    """Whether this process writes the output for all."""
    return jax.process_index() == 0


def local_share(mesh: Mesh) -> Share:
    """What the devices of this process hold on a mesh from `make_mesh`."""
    shape = MeshShape(**mesh.shape)
    ours = [it.process_index == jax.process_index() for it in mesh.devices.flat]
    return Share(shape, tuple(itertools.compress(positions(shape), ours)))
