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
    program = cli.main.make_context("grokfetch", [], resilient_parsing=True)
    sections = [INTRODUCTION, _section(program)]
    for name in cli.main.list_commands(program):
        command = cli.main.get_command(program, name)
        if command is not None:
            sections.append(
                _section(command.make_context(name, [], program, resilient_parsing=True))
            )
    return "\n".join(sections)


def _section(context: click.Context) -> str:
    context.terminal_width = context.max_content_width = WIDTH
    return f"## {context.command_path}\n\n```\n{context.get_help()}\n```\n"


if __name__ == "__main__":
    PAGE.write_text(page())
