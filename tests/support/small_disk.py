"""A small file system, which is soon full, if mounting is allowed."""

import contextlib
import os
import subprocess

import pytest


@contextlib.contextmanager
def small_disk(folder, options):
    """A separate file system in memory; the test is skipped if mounting is not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if os.getuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root and permission")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)
