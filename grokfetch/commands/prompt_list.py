"""`run --prompts`: many texts continued together, each written when it is done; not a command.

A line of the output identifies its prompt by number and by a digest of everything that its text
depends on, so that an interrupted run resumes with what is missing, and lines made with other
settings are never mixed in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from grokfetch.commands.prompt_options import Entry, Listed
from grokfetch.errors import Contradiction, PromptInvalid, StateLocked, storage_errors
from grokfetch.events import Progress
from grokfetch.output.reporting import ended, reporter
from grokfetch.units import count_text, seconds_text, speed_text
from loader.devices.meter import Meter
from loader.inference.tokenizer import Tokenizer
from loader.weights.schema import GrokConfig

if TYPE_CHECKING:
    from loader.inference.engine import Engine, Sampling

__all__ = ["Settings", "Work", "already_done", "work_on"]

HEAD = b'{"index": '
"""The beginning of every line of the output."""


@dataclasses.dataclass(frozen=True, slots=True)
class Settings:
    """What else a text depends on: the model's name, and the settings of generation."""

    model: str
    max_tokens: int
    sampling: Sampling

    def key(self, entry: Entry) -> str:
        """A digest of a prompt and these settings, 16 hexadecimal digits."""
        whole = [entry.prompt, self.model, self.max_tokens, dataclasses.astuple(self.sampling)]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()[:16]


def _encoded(
    entry: Entry, tokenizer: Tokenizer | None, config: GrokConfig, path: Path
) -> tuple[Entry, list[int]]:
    """A prompt with its token ids.

    Raises:
        PromptInvalid: the model cannot read it, or it fills the context; the message names it.
    """
    from loader.inference.prompts import check_room

    try:
        if isinstance(entry.prompt, str):
            assert tokenizer is not None
            ids = tokenizer.encode(entry.prompt)
        else:
            ids = list(entry.prompt)
        check_room(config, ids)
    except PromptInvalid as error:
        raise PromptInvalid(
            f"prompt {entry.index + 1:,}: {error.what}", path=path, hint=error.hint
        ) from None
    return entry, ids


# --- the file of texts ---------------------------------------------------------------------------


def already_done(data: bytes, keys: Sequence[str], path: Path) -> tuple[set[int], int]:
    """Which prompts an earlier run has continued. Pure.

    Args:
        data: what is in the output.
        keys: of the prompts, in order.
        path: of the output.

    Returns:
        Their numbers, and the length of the complete lines in bytes; a truncated line may follow.

    Raises:
        Contradiction: a line is from another prompt or other settings, or not ours.
    """
    whole, _, rest = data.rpartition(b"\n")
    texts = whole.split(b"\n") if whole else []
    done = set()
    for number, line in enumerate(texts, 1):
        fields = _fields(line)
        index = fields.get("index")
        if type(index) is not int or not 0 <= index < len(keys) or fields.get("key") != keys[index]:
            raise Contradiction(
                f"line {number:,} was not made from these prompts and settings",
                path=path,
                hint=_ELSEWHERE,
            )
        done.add(index)
    if rest and not (rest.startswith(HEAD) or HEAD.startswith(rest)):
        raise Contradiction(
            "contains data that grokfetch did not write", path=path, hint=_ELSEWHERE
        )
    return done, len(data) - len(rest)


_ELSEWHERE = "name another --output, or move this file away"


def _fields(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The output, locked for this process and opened for appending.

    Raises:
        StateLocked: another process is writing it.
        StorageFailed: it cannot be written.
    """
    with storage_errors(path), path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateLocked("another process is writing this file", path=path) from None
        except OSError:
            # A file system without locks: assume that nobody else writes there.
            pass
        yield file


# --- the texts -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """The prompts that are left, with their ids, and the file for their texts."""

    listed: Listed
    tokenizer: Tokenizer | None
    settings: Settings
    file: IO[bytes]
    left: tuple[tuple[Entry, list[int]], ...]

    def run(self, engine: Engine, meter: Meter) -> None:
        """Continue what is left, write each text when it is done, and print a summary."""
        from loader.inference.batching import Batch, Job
        from loader.inference.prompts import check_room

        start, compiled, tokens = time.perf_counter(), meter.compile_s, 0
        batch = Batch(engine, self.listed.slots)
        texts: dict[int, tuple[Entry, list[int]]] = {}
        for entry, prompt in self.left:
            most = min(self.settings.max_tokens, check_room(engine.config, prompt))
            batch.add(entry.index, Job(prompt, most, self.settings.sampling))
            texts[entry.index] = entry, []
        with reporter("run") as sink:
            while batch.busy:
                sink.take(self._progress(len(texts)))
                for emission in batch.step():
                    entry, ids = texts[emission.number]
                    if emission.token is not None and emission.finished != "stop":
                        ids.append(emission.token.token)
                    if emission.finished is not None:
                        self._write(entry, ids, emission.finished)
                        tokens += len(ids)
                        del texts[emission.number]
            sink.take(self._progress(0))
        self.tell(tokens, time.perf_counter() - start, meter.compile_s - compiled)

    def tell(self, tokens: int, seconds: float, compile_s: float) -> None:
        """Print that all is done, what this run did, and how long compiling took."""
        count, before = len(self.left), len(self.listed.entries) - len(self.left)
        said = []
        if count:
            speed = speed_text(tokens / max(seconds - compile_s, 1e-3))
            said.append(
                f"{count_text(count, 'text')} in {seconds_text(seconds)}, "
                f"{seconds_text(compile_s)} of it compiling, then {speed} together"
            )
        if before:
            said.append(f"{before:,} done before")
        ended(
            f"{self.listed.output}: {'; '.join(said)}",
            seconds,
            texts=count,
            before=before,
            tokens=tokens,
            compile_s=round(compile_s, 3),
        )

    def _progress(self, left: int) -> Progress:
        total = len(self.listed.entries)
        return Progress(total - left, total, "prompts", "text")

    def _write(self, entry: Entry, ids: list[int], finished: str) -> None:
        with storage_errors(self.listed.output):
            self.file.write(_line(entry, ids, finished, self.tokenizer, self.settings))
            self.file.flush()


@contextlib.contextmanager
def work_on(
    listed: Listed, tokenizer: Tokenizer | None, config: GrokConfig, settings: Settings
) -> Iterator[Work]:
    """The prompts of a list that are left; the output is locked while the block runs.

    Raises:
        PromptInvalid: the model cannot read one of them.
        Contradiction: the output contains other texts.
        StateLocked: another process is writing it.
        StorageFailed: it cannot be read or written.
    """
    entries = [_encoded(entry, tokenizer, config, listed.prompts) for entry in listed.entries]
    with _opened(listed.output) as file:
        file.seek(0)
        keys = [settings.key(entry) for entry in listed.entries]
        done, length = already_done(file.read(), keys, listed.output)
        file.truncate(length)
        left = tuple(it for it in entries if it[0].index not in done)
        yield Work(listed, tokenizer, settings, file, left)


def _line(
    entry: Entry, ids: list[int], finished: str, tokenizer: Tokenizer | None, settings: Settings
) -> bytes:
    fields: dict[str, Any] = {"index": entry.index}
    if entry.name is not None:
        fields["id"] = entry.name
    fields["prompt"] = entry.prompt
    if tokenizer is None:
        fields["ids"] = ids
    else:
        stream = tokenizer.stream()
        fields["text"] = "".join([*map(stream.push, ids), stream.finish()])
    fields |= {"tokens": len(ids), "finish_reason": finished, "key": settings.key(entry)}
    return json.dumps(fields, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
