"""Small C programs, compiled for the processor at hand where they are first used, and kept.

Without a compiler whoever asks does without them. What is kept runs as it is when it is loaded,
hence in a folder of the user's, who alone may write it.
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
"""How compilers are told to use all that this processor has; the second is that of some for ARM."""

COMPILERS = ("cc", "gcc", "clang")
PATIENCE_S = 60


@dataclasses.dataclass(frozen=True, slots=True)
class CProgram:
    """A program, as its sources and how they are compiled.

    Attributes:
        name: of the compiled file that is kept, which is found by no other version of the sources.
        sources: what is compiled together.
        options: for the compiler.
        processors: options that name the processor; the next is tried where one is refused, and
            none of them at last.
    """

    name: str
    sources: tuple[Path, ...]
    options: tuple[str, ...] = OPTIONS
    processors: tuple[str, ...] = PROCESSOR

    def kept(self, folder: Path) -> Path | None:
        """What was compiled earlier; half a file would end the process, so its name is a digest."""
        with contextlib.suppress(OSError):
            for file in folder.glob(f"{self.name}-*.so"):
                if file.name == self._file_name(file.read_bytes()):
                    return file
        return None

    def compiled(self, folder: Path) -> Path | None:
        """What the compiler makes of the sources, in the folder; None if there is no compiler.

        Raises:
            OSError: it refuses the sources, does not exist, takes too long, or the folder cannot
                be written.
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
    """What tells one version of some source files from another."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def processor() -> str:
    """The processor's model and a digest of its instructions, in letters that file names have."""
    model, flags = platform.processor(), ""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = value.strip()
            elif not key.strip():
                break  # The others are as the first.
    # Virtual machines of one model name differ in what they let through.
    text = f"{model or platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"
    return "".join(letter if letter.isalnum() or letter in ".-" else "_" for letter in text)


def _first_error(text: str) -> str:
    """The first line in which a compiler names an error, or else its last one."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in lines if "error:" in line), lines[-1]).strip()
