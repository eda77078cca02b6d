"""The program `grokfetch`: finds a command by name and turns its errors into exit codes.

The path from magnet link to tokens is `commands/fetch.py`, `commands/verify.py`,
`commands/run.py`; `commands/demo.py` runs all of it on one machine.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import click

from grokfetch import __version__
from grokfetch.errors import GrokfetchError, StorageFailed, storage_failed
from grokfetch.interruption import honour, settle
from grokfetch.output.reporting import failed, refused

__all__ = ["main"]

COMMANDS = {
    "plan": "Check whether a fetch can work, and what can run the model.",
    "fetch": "Download a checkpoint into a folder and prove every byte.",
    "status": "Show what is proven in a folder and what is missing.",
    "report": "Write the same as a page for a browser.",
    "verify": "Read everything back; fetch again what is wrong.",
    "inspect": "List the tensors of a shard or a checkpoint.",
    "manifest": "Describe a checkpoint that grokfetch did not fetch.",
    "publish": "Make a torrent, a magnet link and a manifest of a folder.",
    "seed": "Share proven files with others.",
    "run": "Continue a text.",
    "serve": "Answer OpenAI's completions API over HTTP.",
    "export": "Write the weights for llama.cpp, vLLM or SGLang.",
    "demo": "Do all of it on this machine, with a small model.",
}
"""Each command and its line in `grokfetch --help`, in the order of use. The lines are here so that
this help need not import every command."""

READER_GONE = 141

REFUSALS = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EIO),
    *(errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE),
}
"""Errors by which a file system refuses an operation; nothing is wrong with the program."""

MEANT = {
    **dict.fromkeys(("get", "download", "pull", "clone", "add"), "fetch"),
    **dict.fromkeys(("check", "test", "validate", "repair", "fix"), "verify"),
    **dict.fromkeys(("generate", "complete", "chat", "prompt", "infer"), "run"),
    **dict.fromkeys(("server", "api", "start"), "serve"),
    **dict.fromkeys(("list", "ls", "show", "info", "tensors"), "inspect"),
    **dict.fromkeys(("share", "upload"), "seed"),
    **dict.fromkeys(("create", "make", "torrent"), "publish"),
    **dict.fromkeys(("convert", "gguf"), "export"),
    **dict.fromkeys(("progress", "ps"), "status"),
    "help": "--help",
}
"""Names that other programs use for similar commands."""


class Program(click.Group):
    """A group whose commands are modules of `grokfetch.commands`, imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """The commands in the order of use, for `--help`."""
        return list(COMMANDS)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The list of `--help`."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that the arguments name; a mistyped name gets a suggestion."""
        name = args[0]
        if name not in COMMANDS and name[:1] != "-":
            import difflib

            near = [MEANT[name]] if name in MEANT else []
            near += ["fetch"] if name.lower().startswith(("magnet:", "http")) else []
            near += difflib.get_close_matches(name, COMMANDS, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            ctx.fail(f"No such command {name!r:.60}.{hint}")
        return super().resolve_command(ctx, args)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command with that name, or None."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"grokfetch.commands.{cmd_name}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run the program; an interruption within click, too, gives the signal's exit code."""
        try:
            return super().main(*args, **kwargs)
        except SystemExit as ended:
            aborted = ended.__context__
            if isinstance(aborted, click.Abort) and isinstance(
                aborted.__cause__, KeyboardInterrupt
            ):
                sys.exit(honour(aborted.__cause__))
            raise

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Parse the arguments; click would take an interruption here for an answer to a prompt."""
        try:
            return super().make_context(*args, **kwargs)
        except KeyboardInterrupt as error:
            raise click.exceptions.Exit(honour(error)) from None

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; print an error that a user can act on, and exit with its code."""
        _open_streams()
        try:
            return self._invoke(ctx)
        except click.exceptions.Exit:
            raise
        except GrokfetchError as error:
            _end(ctx, error)
        except OSError as error:
            if error.errno == errno.EPIPE:
                # The reader has closed the pipe; the code is what shells give for SIGPIPE.
                sys.stdout = _nowhere()
                ctx.exit(READER_GONE)
            if error.errno == errno.ENOSPC and error.filename is None:
                # An error on a file has its name; without one, it is stdout's disk that is full.
                sys.stdout = _nowhere()
                _end(ctx, storage_failed(error, Path("stdout")))
            if error.errno in REFUSALS and error.filename is not None:
                _end(ctx, StorageFailed(os.strerror(error.errno or 0), path=error.filename))
            failed(ctx, error)
            raise
        except Exception as error:
            failed(ctx, error)
            raise
        except KeyboardInterrupt as error:
            # Before any message: until then the same interruption may be raised again.
            code = honour(error)
            failed(ctx, error)
            click.echo("interrupted; finished work is kept, run the command again", err=True)
            ctx.exit(code)

    def _invoke(self, ctx: click.Context) -> Any:
        """Run the command; an interruption ends it, and has no other effect."""
        try:
            result = super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except Exception:
            # Interrupted code may raise an error of its own: numpy, when imported, ImportError.
            settle()
            raise
        settle()
        return result


def _end(ctx: click.Context, error: GrokfetchError) -> None:
    refused(ctx, error)
    ctx.exit(error.exit_code)


def _open_streams() -> None:
    """Make sure that any text can be written to stdout and stderr.

    Streams that the caller has closed are None in Python; they are replaced by /dev/null. A name
    that is not UTF-8 is written as its bytes, as `ls` does, and a character that the stream's
    encoding lacks as an escape.
    """
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    codecs.register_error("sayable", _sayable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="sayable")


def _sayable(error: UnicodeError) -> tuple[str | bytes, int]:
    """What to write instead of a character that cannot be encoded; see `codecs.register_error`."""
    assert isinstance(error, UnicodeEncodeError)
    error.end = error.start + 1
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w")


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """From the Grok-1 magnet link to tokens.

    Fetch the weights, see their status, verify, inspect and run them; demo does all of it with a
    small model.
    """
