"""`python -m grokfetch` is the program `grokfetch`."""

from grokfetch.cli import main

if __name__ == "__main__":
    main(prog_name="grokfetch")
