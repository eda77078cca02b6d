"""`python -m grokfetch` is the program `grokfetch`."""

from __future__ import annotations

import sys

__all__ = ["start"]


def start() -> None:
    """Run the program; an interruption before the first command prints one line."""
    try:
        # First, because somebody may press Ctrl-C during the imports that follow.
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
        # Interrupted code may have raised an error of its own.
        settle()
        raise


if __name__ == "__main__":
    start()
