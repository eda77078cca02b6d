"""Small C programs, compiled for this processor when they are first used, and kept.

Without a compiler, callers do without them. A kept program is loaded without further checks, so it
is kept in a folder that only the user may write.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["COMPILERS", "OPTIONS", "PROCESSOR", "CProgram", "digest_of", "processor"]

OPTIONS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-Wno-psabi")
PROCESSOR = ("-march=native", "-mcpu=native")
"""Options that let compilers use all of this processor; some compilers for ARM need the second."""

COMPILERS = ("cc", "gcc", "clang")
PATIENCE_S = 60


@dataclasses.dataclass(frozen=True, slots=True)
class CProgram:
    """A program: its sources and how they are compiled.

    Attributes:
        name: of the compiled file; each version of the sources must have its own.
        sources: files that are compiled together.
        options: for the compiler.
        processors: options that name the processor. If one is refused, the next is tried, and
            finally none.
    """

    name: str
    sources: tuple[Path, ...]
    options: tuple[str, ...] = OPTIONS
    processors: tuple[str, ...] = PROCESSOR

    def kept(self, folder: Path) -> Path | None:
        """The file compiled earlier. Its name holds its digest: loading half a file could crash."""
        with contextlib.suppress(OSError):
            for file in folder.glob(f"{self.name}-*.so"):
                if file.name == self._file_name(file.read_bytes()):
                    return file
        return None

    def compiled(self, folder: Path) -> Path | None:
        """Compile the sources into the folder; None if there is no compiler.

        Raises:
            OSError: the compiler refuses the sources, does not exist or takes too long, or the
                folder cannot be written.
        """
        import subprocess

        compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
        if compiler is None:
            return None
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as work:
            made = Path(work) / "made.so"
            for processor in (*self.processors, ""):
                command = [*compiler.split(), *self.options, *filter(None, [processor])]
                try:
                    ran = subprocess.run(  # noqa: S603 - the compiler that the user has chosen
                        [*command, *map(str, self.sources), "-o", str(made)],
                        capture_output=True,
                        text=True,
                        timeout=PATIENCE_S,
                        env=os.environ | {"TMPDIR": work},
                        check=False,
                    )
                except subprocess.SubprocessError as error:
                    raise OSError(f"{compiler}: {error}") from error
                if ran.returncode == 0:
                    return made.replace(folder / self._file_name(made.read_bytes()))
        raise OSError(f"{compiler}: {_first_error(ran.stderr) or f'exit code {ran.returncode}'}")

    def _file_name(self, content: bytes) -> str:
        return f"{self.name}-{hashlib.sha256(content).hexdigest()[:16]}.so"


def digest_of(files: Sequence[Path]) -> str:
    """A digest that distinguishes versions of some source files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def processor() -> str:
    """The processor's model and a digest of its instructions, usable as a file name."""
    model, flags = platform.processor(), ""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = value.strip()
            elif not key.strip():
                break  # All processors are like the first.
    # Virtual machines with the same model name can offer different instructions.
    text = f"{model or platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text)


def _first_error(text: str) -> str:
    """The first line of a compiler's output that names an error, or else the last line."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in lines if "error:" in line), lines[-1]).strip()
