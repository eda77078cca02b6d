"""Runs the program for tests, in this process or in a separate one, and lists what it imports."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from grokfetch.cli import main

SIMPLEST = ("--dtype", "float32", "--mesh", "model=1", "--placement", "sharded")
"""How to hold a model if that is not what is tested: with the fewest programs to compile."""

HEAVY = {"jax", "jaxlib", "numpy", "libtorrent"}


def invoke(*arguments, code=0, **options):
    """Run the program in this process; with `code` 1 it may raise an unexpected exception."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], **options)
    foreseen = result.exception is None or isinstance(result.exception, SystemExit)
    if not foreseen and code != 1:
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def grokfetch(*arguments, code=0):
    """Run the program in this process; returns stdout, or both streams if it should fail."""
    result = invoke(*arguments, code=code)
    return result.output if code else result.stdout


def with_devices(count):
    """The environment of a program that sees `count` devices and compiles as this process does."""
    devices = f"--xla_force_host_platform_device_count={count}"
    return os.environ | {"XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {devices}"}


@contextlib.contextmanager
def started(*arguments, until):
    """The program in another process, and its lines on stderr up to one that contains `until`."""
    command = [sys.executable, "-m", "grokfetch", *map(str, arguments)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
        try:
            lines = []
            while not lines or until not in lines[-1]:
                lines.append(child.stderr.readline())
                if not lines[-1]:
                    pytest.fail(f"ended with {child.wait()}: {''.join(lines)}")
            yield child, lines
        finally:
            child.kill()


KILLED = """
import importlib, os, signal, sys
place, name, times, *arguments = sys.argv[1:]
module = importlib.import_module(place)
real, left = getattr(module, name), int(times)
def counted(*given, **named):
    global left
    result = real(*given, **named)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(module, name, counted)
from grokfetch.cli import main
main(arguments)
"""


def killed(module, function, times, *arguments):
    """Run the program in a process killed by SIGKILL when a function has returned `times` times."""
    command = [sys.executable, "-c", KILLED, module, function, *map(str, (times, *arguments))]
    assert subprocess.run(command, check=False, timeout=200).returncode == -signal.SIGKILL


def imported_by(code: str) -> set[str]:
    """The top-level modules that a new interpreter has imported after running `code`."""
    probe = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())
