"""A file system that is soon full, where this may be mounted."""

import contextlib
import os
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, options):
    """A real file system of its own, where this may be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if os.getuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting takes root and the right to")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
