"""Where the prompts of `run` come from, and the options for that; not a command."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import click

from grokfetch.commands.options import bundle
from grokfetch.commands.value_types import Integer
from grokfetch.errors import PromptInvalid, storage_failed

__all__ = ["Entry", "Listed", "Prompt", "Session", "prompt_options", "read_entries"]

SLOTS = 16


WAYS = "give either a PROMPT, --tokens, --prompt-file or --prompts"

FORM = 'each line must be an object: {"prompt": "a text", "id": "any name"}'


@dataclasses.dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: a text, or else token ids."""

    text: str | None
    ids: tuple[int, ...] = ()

    @property
    def needs_tokenizer(self) -> bool:
        """Whether it is a text."""
        return self.text is not None


@dataclasses.dataclass(frozen=True, slots=True)
class Session:
    """Prompts that somebody types, one after another."""

    needs_tokenizer: ClassVar[bool] = True


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """A prompt of the file: its number, counted from 0, a text or token ids, and its id."""

    index: int
    prompt: str | tuple[int, ...]
    name: Any = None


@dataclasses.dataclass(frozen=True, slots=True)
class Listed:
    """The prompts in a file, the file for their texts, and how many are continued at once."""

    prompts: Path
    entries: tuple[Entry, ...]
    output: Path
    slots: int

    @property
    def needs_tokenizer(self) -> bool:
        """Whether one of them is a text."""
        return any(isinstance(entry.prompt, str) for entry in self.entries)


def _asked(
    *,
    prompt: str | None,
    tokens: str | None,
    prompt_file: Path | None,
    prompts: Path | None,
    output: Path | None,
    slots: int | None,
) -> Prompt | Session | Listed:
    """What the options ask for; reads the prompt where it comes from stdin or a file."""
    if sum(way is not None for way in (prompt, tokens, prompt_file, prompts)) > 1:
        raise click.UsageError(WAYS)
    if (prompts is None) != (output is None):
        raise click.UsageError("--prompts and --output must be given together")
    if prompts is not None and output is not None:
        return Listed(prompts, read_entries(_read(prompts), prompts), output, slots or SLOTS)
    if slots is not None:
        raise click.UsageError("--slots requires --prompts")
    if tokens is not None:
        return Prompt(None, _ids(tokens))
    if prompt_file is not None:
        return Prompt(_as_text(_read(prompt_file), prompt_file))
    if prompt is not None and prompt != "-":
        return Prompt(prompt)
    return _of_stdin(named=prompt == "-")


def _of_stdin(*, named: bool = False) -> Prompt | Session:
    """What to use in place of a PROMPT; `named` is whether it was given as -."""
    if not named and sys.stdin is not None and sys.stdin.isatty():
        return Session()
    text = _piped()
    if not text and not named:
        raise click.UsageError(f"{WAYS}, or a text on stdin")
    return Prompt(text)


def _piped() -> str:
    # A stdin that the caller has closed is None in Python.
    data = b"" if sys.stdin is None else sys.stdin.buffer.read()
    return _as_text(data, Path("stdin"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise storage_failed(error, path, reading=True) from error


def _as_text(data: bytes, path: Path) -> str:
    """The text of a file, without the newline at its end, as `$(cat FILE)` gives it.

    Raises:
        PromptInvalid: it is not UTF-8.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PromptInvalid(
            f"is not UTF-8 (byte {error.start:,})", path=path, hint="convert it with iconv"
        ) from None
    return text.removesuffix("\n").removesuffix("\r")


# --- the file of prompts -------------------------------------------------------------------------


def read_entries(data: bytes, path: Path) -> tuple[Entry, ...]:
    """The prompts in a file of JSON lines; empty lines are skipped. Pure.

    Raises:
        PromptInvalid: a line has no prompt; the message names it.
    """
    entries: list[Entry] = []
    for number, line in enumerate(_as_text(data, path).split("\n"), 1):
        if line.strip():
            entries.append(_entry(line, len(entries), f"line {number:,}", path))
    if not entries:
        raise PromptInvalid("contains no prompt", path=path, hint=FORM)
    return tuple(entries)


def _entry(line: str, index: int, where: str, path: Path) -> Entry:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PromptInvalid(f"{where} is not valid JSON: {error}", path=path, hint=FORM) from None
    fields = value if isinstance(value, dict) else {"prompt": value}
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        prompt = tuple(prompt)
    if not isinstance(prompt, str | tuple):
        what = "has no prompt" if prompt is None else "has a prompt that is not a string"
        raise PromptInvalid(f"{where} {what}", path=path, hint=FORM)
    return Entry(index, prompt, fields.get("id"))


# --- the options ---------------------------------------------------------------------------------


def _ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise click.BadParameter(f"not token ids: {text!r:.80}", param_hint="--tokens") from None


_file = click.Path(exists=True, dir_okay=False, path_type=Path)

prompt_options = bundle(
    "wanted",
    _asked,
    click.argument("prompt", required=False),
    click.option(
        "--tokens", metavar="IDS", help='The prompt as token ids, "181 13 437"; prints ids.'
    ),
    click.option("--prompt-file", metavar="FILE", type=_file, help="Read the prompt from a file."),
    click.option(
        "--prompts",
        metavar="FILE.jsonl",
        type=_file,
        help='Continue many prompts together; each line is {"prompt": "..."}.',
    ),
    click.option(
        "--output",
        metavar="FILE.jsonl",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Where to write their texts, each when it is done; run again to resume.",
    ),
    click.option(
        "--slots",
        type=Integer(1, 256),
        help=f"How many texts of --prompts to continue at once; by default {SLOTS}.",
    ),
)
