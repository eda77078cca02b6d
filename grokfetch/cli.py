"""The program `grokfetch`: finds a command by name and turns its errors into exit codes.

The road from magnet to token is `commands/fetch.py`, `commands/verify.py`, `commands/run.py`;
`commands/demo.py` walks all of it on one machine.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import click

from grokfetch import __version__
from grokfetch.commands.reporting import failed
from grokfetch.errors import GrokfetchError

__all__ = ["main"]

COMMANDS = (
    "plan",
    "fetch",
    "status",
    "report",
    "verify",
    "inspect",
    "manifest",
    "publish",
    "seed",
    "run",
    "serve",
    "demo",
)
INTERRUPTED = 130


class Program(click.Group):
    """A group whose commands are modules of `grokfetch.commands`, imported when they are named."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """The commands in the order of the road, for `--help`."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """The command of that name, None if there is none."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"grokfetch.commands.{cmd_name}")
        command = getattr(module, cmd_name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error that a person can act on is printed and gives its exit code."""
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except GrokfetchError as error:
            failed(ctx, error)
            click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except Exception as error:
            failed(ctx, error)
            raise
        except KeyboardInterrupt as error:
            failed(ctx, error)
            click.echo("interrupted; what is done is kept, run the command again", err=True)
            ctx.exit(INTERRUPTED)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """From the Grok-1 magnet link to tokens.

    fetch the weights, see their status, verify them, look into them, run them; demo does it all on
    a small model.
    """
