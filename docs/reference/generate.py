"""Writes commands.md beside it: every command with its help, as the program itself prints it.

Run: python docs/reference/generate.py. A test compares the page with the program.
"""

from __future__ import annotations

from pathlib import Path

import click

from grokfetch import cli

PAGE = Path(__file__).with_name("commands.md")

WIDTH = 100
"""Columns of the printed help."""

INTRODUCTION = """# Commands and options

What `grokfetch COMMAND --help` prints. This page is generated: `python docs/reference/generate.py`.
"""


def page() -> str:
    """The whole page."""
    sections = [INTRODUCTION, _section("grokfetch", cli.main)]
    context = click.Context(cli.main, info_name="grokfetch")
    for name in cli.main.list_commands(context):
        command = cli.main.get_command(context, name)
        if command is not None:
            sections.append(_section(f"grokfetch {name}", command))
    return "\n".join(sections)


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    return f"## {name}\n\n```\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page())
