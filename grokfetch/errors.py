"""Every error, one class per cause, each with its own exit code.

docs/reference/exit-codes.md prints this table; a test compares the two. Codes 0, 1 and 2 are
success, an unforeseen failure and click's own usage error; 130 is Ctrl-C.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

__all__ = [
    "TOO_MANY_OPEN",
    "CheckpointInvalid",
    "Contradiction",
    "Damaged",
    "GrokfetchError",
    "Inexact",
    "ManifestInvalid",
    "MeshInvalid",
    "NoModel",
    "NotProven",
    "OutOfReach",
    "PromptInvalid",
    "SelectionInvalid",
    "ShardInvalid",
    "SourceInvalid",
    "Stalled",
    "StateLocked",
    "StateMissing",
    "StorageFailed",
    "TokenizerMissing",
    "TorrentInvalid",
    "exit_code_of",
]

TOO_MANY_OPEN = (errno.EMFILE, errno.ENFILE)


class GrokfetchError(Exception):
    """An error that a user can act on.

    Args:
        what: what happened, in one sentence without a full stop.
        path: the file or folder it happened to.
        hint: what to do next, as a command if there is one; `next_step` by default.
    """

    exit_code: ClassVar[int] = 1
    next_step: ClassVar[str] = ""
    """What helps with most errors of a class."""

    def __init__(
        self, what: str, *, path: str | os.PathLike[str] | None = None, hint: str = ""
    ) -> None:
        self.what = what
        self.path = None if path is None else os.fspath(path)
        self.hint = hint or self.next_step
        super().__init__(what)

    def __str__(self) -> str:
        text = self.what if self.path is None else f"{self.path}: {self.what}"
        return f"{text}\n  {self.hint}" if self.hint else text


class SourceInvalid(GrokfetchError):
    """The SOURCE argument is not a magnet link, torrent, manifest or checkpoint folder."""

    exit_code = 10
    next_step = (
        "SOURCE is a magnet link, an info hash, the path or https address of a .torrent or a "
        "manifest, or the folder of an earlier fetch; leave it out for Grok-1"
    )


class TorrentInvalid(GrokfetchError):
    """A torrent's metadata is malformed, unsafe, or does not match its info hash."""

    exit_code = 11
    next_step = "get the torrent or the link again from whoever published it"


class ManifestInvalid(GrokfetchError):
    """A manifest is malformed; the message names the field."""

    exit_code = 12
    next_step = "correct it, or create it again: grokfetch manifest DIR"


class Contradiction(GrokfetchError):
    """A torrent is not what the manifest says it must be."""

    exit_code = 13
    next_step = "name another SOURCE, another --manifest, or another folder: --to DIR"


class StateMissing(GrokfetchError):
    """A folder holds nothing that says what it must contain."""

    exit_code = 14
    next_step = "run: grokfetch fetch SOURCE --to DIR"


class StateLocked(GrokfetchError):
    """Another process is writing this checkpoint folder."""

    exit_code = 15
    next_step = "wait until it has ended, or stop it"


class StorageFailed(GrokfetchError):
    """The disk is full, read-only, gone, or failing."""

    exit_code = 16
    next_step = (
        "check that it exists, that you may read and write it and that the disk works, then run "
        "the same command again"
    )


class Stalled(GrokfetchError):
    """No peer or mirror sent anything for longer than the time allowed."""

    exit_code = 17
    next_step = "what has arrived is kept; run the same command again"


class OutOfReach(GrokfetchError):
    """What the command needs is not available here: libtorrent, the memory, the other hosts."""

    exit_code = 18
    next_step = "fix that, or run it where it is available"


class SelectionInvalid(GrokfetchError):
    """The part of a checkpoint that is asked for is malformed, or not in it."""

    exit_code = 19
    next_step = "list what there is: grokfetch inspect DIR; --all asks for everything"


class Damaged(GrokfetchError):
    """Verification found something wrong."""

    exit_code = 20
    next_step = "list what is wrong: grokfetch verify DIR"


class NotProven(GrokfetchError):
    """Bytes are needed that no hash has verified since they were last written."""

    exit_code = 21
    next_step = "run: grokfetch verify DIR"


class ShardInvalid(GrokfetchError):
    """A shard file is not a pickled array in the official format.

    Args:
        what: what is wrong.
        path: the shard file.
        offset: the byte offset of the opcode that is wrong.
        opcode: its name in `pickletools`, or its value in hexadecimal.
    """

    exit_code = 22

    def __init__(
        self, what: str, *, path: str | os.PathLike[str], offset: int, opcode: str
    ) -> None:
        self.offset = offset
        self.opcode = opcode
        super().__init__(
            f"not a Grok-1 shard: {what} (byte {offset}, opcode {opcode})",
            path=path,
            hint="nothing in the file was executed; fetch it again with: grokfetch fetch DIR",
        )


class CheckpointInvalid(GrokfetchError):
    """The shards are well formed but are not the tensors that the model needs."""

    exit_code = 23
    next_step = "list what else is wrong: grokfetch verify DIR"


class NoModel(GrokfetchError):
    """The folder's manifest describes files only, no model."""

    exit_code = 24
    next_step = (
        "name the folder or the manifest of a model; fetch, verify and seed work with any files"
    )


class MeshInvalid(GrokfetchError):
    """The devices cannot be arranged so that every sharded dimension divides."""

    exit_code = 25
    next_step = "see which meshes divide the model: grokfetch plan --to DIR"


class TokenizerMissing(GrokfetchError):
    """There is no tokenizer, or it is not the one that the manifest names."""

    exit_code = 26
    next_step = "name another with --tokenizer FILE"


class PromptInvalid(GrokfetchError):
    """A prompt is empty, too long for the model, or has ids outside its vocabulary."""

    exit_code = 27
    next_step = "give another prompt"


class Inexact(GrokfetchError):
    """Weights cannot be written in a format without loss, or read back from it unchanged."""

    exit_code = 28
    next_step = "choose another --type, or another --format"


@contextlib.contextmanager
def storage_errors(path: Path, *, reading: bool = False) -> Iterator[None]:
    """Raise an `OSError` of the block as the error that explains it to a user.

    Args:
        path: the file or folder that the block uses.
        reading: whether the block only reads it.
    """
    try:
        yield
    except OSError as error:
        raise storage_failed(error, path, reading=reading) from error


def storage_failed(
    error: OSError, path: Path | None = None, *, reading: bool = False
) -> GrokfetchError:
    """The error that explains an `OSError` of the file system to a user."""
    where = path or error.filename
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageFailed(
            "the disk is full", path=where, hint="make room and run the same command again"
        )
    if error.errno in TOO_MANY_OPEN:
        return StorageFailed(
            "cannot be opened, because too many files are open",
            path=where,
            hint="raise the limit (ulimit -n; ulimit -Hn prints the maximum), and run the same "
            "command again",
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return StorageFailed(
            f"cannot be {'read' if reading else 'written'} ({error.strerror})",
            path=where,
            hint="allow this user to read it"
            if reading
            else "choose a folder that you may write to, or keep the state elsewhere: --state DIR",
        )
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return StorageFailed(
            "is a file where a folder is needed", path=where, hint="choose another folder"
        )
    if error.errno == errno.ENOENT and where is not None:
        return gone(Path(where))
    return StorageFailed(error.strerror or str(error), path=where)


def gone(path: Path) -> StorageFailed:
    """The error for a file or folder of ours that has disappeared."""
    return StorageFailed(
        "has disappeared: it was removed or unmounted",
        path=path,
        hint="restore it, or run the same command again to continue with what is still there",
    )


def exit_code_of(error: BaseException) -> int:
    """The exit code of the program for an error."""
    code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
    assert isinstance(code, int)
    return code
