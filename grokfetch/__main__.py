"""`python -m grokfetch` is the program `grokfetch`."""

from __future__ import annotations

import sys

__all__ = ["start"]


def start() -> None:
    """Run the program; whatever is interrupted before its first command says so in one line."""
    try:
        # First of all: what is imported next takes a moment in which somebody may press Ctrl-C.
        from grokfetch.interruption import honour, install, uninstall

        install()
        try:
            _run()
        except KeyboardInterrupt as error:
            code = honour(error)
            sys.stderr.write("interrupted\n")
            sys.exit(code)
        finally:
            uninstall()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


def _run() -> None:
    from grokfetch.interruption import settle

    try:
        from grokfetch.cli import main

        main(prog_name="grokfetch")
    except Exception:
        # What was interrupted may have failed in its own way.
        settle()
        raise


if __name__ == "__main__":
    start()
