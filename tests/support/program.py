"""The program as tests run it: in this process, and what a fresh interpreter imports for it."""

import subprocess
import sys

from click.testing import CliRunner

from grokfetch.cli import main

HEAVY = {"jax", "jaxlib", "numpy", "libtorrent"}


def grokfetch(*arguments, code=0):
    """Run the program in this process; stdout, or both streams where it is to fail."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output if code else result.stdout


def imported_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after running `code`."""
    probe = f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())
