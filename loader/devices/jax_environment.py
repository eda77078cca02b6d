"""JAX's own environment variables; a wrong one becomes our error that names it.

JAX itself answers with an assertion or a traceback, and XLA ends the process. Importing this module
does not import jax.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from importlib import import_module

from grokfetch.errors import OutOfReach
from loader.devices.present import devices

__all__ = ["open_devices", "require_jax"]

PARSE = "from jaxlib import xla_client; xla_client.CompileOptions()"
"""Has XLA read its flags, and does nothing else."""

PARSING_TIMEOUT_S = 60


def require_jax() -> None:
    """Import jax, whose settings come from the environment.

    Raises:
        OutOfReach: XLA does not know a flag, or JAX a value; the message names the variable.
    """
    flags = os.environ.get("XLA_FLAGS", "").strip()
    refusal = _refused(flags) if flags else ""
    if refusal:
        raise OutOfReach(
            f"XLA refuses XLA_FLAGS={flags}: {refusal}",
            hint="remove the flag that it does not know, or unset XLA_FLAGS",
        )
    try:
        import_module("jax")
    except ValueError as error:
        raise OutOfReach(
            f"JAX refuses a variable of the environment: {error}",
            hint="correct it, or unset it: env | grep JAX_",
        ) from error


def open_devices() -> None:
    """Have JAX open the devices that JAX_PLATFORMS names, or else all that it finds.

    Raises:
        OutOfReach: there are none; the message says what is here.
    """
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        named = os.environ.get("JAX_PLATFORMS", "")
        reason = str(error).partition("(set JAX_PLATFORMS")[0].strip().rstrip(".")
        wanted = f"JAX cannot open the devices of JAX_PLATFORMS={named}"
        here = ", ".join([*(device.name for device in devices()), "the CPU"])
        raise OutOfReach(
            f"{wanted}{reason and f': {reason}'}; here: {here}",
            hint="unset JAX_PLATFORMS, or set it to cpu; what JAX needs for GPUs and TPUs comes "
            "with grokfetch's extras `cuda` and `tpu`",
        ) from error


@functools.cache
def _refused(flags: str) -> str:
    """Why XLA ends a process with these flags, empty if it does not; tries it in a new process."""
    tried = subprocess.run(  # noqa: S603 - this interpreter
        [sys.executable, "-c", PARSE],
        env=os.environ | {"XLA_FLAGS": flags},
        capture_output=True,
        text=True,
        timeout=PARSING_TIMEOUT_S,
        check=False,
    )
    # Other failures of that process do not matter here.
    refusals = [line for line in tried.stderr.splitlines() if "XLA_FLAGS" in line]
    return refusals[0].rpartition("] ")[2] if tried.returncode and refusals else ""
