"""SentencePiece: text to token ids, and ids back to text as they arrive.

The reference puts no begin-of-sequence id before a prompt, and neither does this. The model config
defines the end of a sequence.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from grokfetch.errors import PromptInvalid, TokenizerMissing
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, TokenizerSource

__all__ = ["TextStream", "Tokenizer", "decoded", "is_named", "tokenizer_of"]

USUAL_NAME = "tokenizer.model"
"""File name of a tokenizer that no manifest names."""

EntryKind = Literal["normal", "unknown", "control", "unused", "byte"]

SPACE = "\u2581"
"""How SentencePiece writes a space inside a piece."""


class Tokenizer:
    """A SentencePiece model. Use `load`."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read a model from a file.

        Raises:
            TokenizerMissing: if there is none at `path`, or it is not a SentencePiece model.
        """
        try:
            serialized = Path(path).read_bytes()
        except OSError as error:
            raise TokenizerMissing(f"no tokenizer: {error.strerror}", path=path) from error
        if not serialized:
            raise TokenizerMissing("the file is empty", path=path)
        with warnings.catch_warnings():
            # SWIG's types lack __module__, which Python 3.12 deprecates.
            warnings.filterwarnings("ignore", "builtin type .*", DeprecationWarning)
            from sentencepiece import SentencePieceProcessor
        try:
            return cls(SentencePieceProcessor(model_proto=serialized))
        except (RuntimeError, ValueError) as error:
            raise TokenizerMissing("the file is not a SentencePiece model", path=path) from error

    @property
    def size(self) -> int:
        """Number of token ids."""
        return int(self._processor.get_piece_size())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without begin- or end-of-sequence ids.

        Raises:
            PromptInvalid: it has half a character, left by a wrong encoding or truncation.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptInvalid(
                f"character {error.start + 1:,} of the prompt is half a character",
                hint="is the terminal's encoding UTF-8?",
            ) from None
        return [int(token) for token in self._processor.encode(text)]

    def piece(self, token: int) -> str:
        """A token's name: its text with spaces, `<0xE2>` for a byte, `</s>` for an end."""
        if token >= self.size:
            return f"<{token}>"
        name: str = self._processor.id_to_piece(token)
        return name.replace(SPACE, " ")

    def special(self, token: int) -> bool:
        """Whether a token stands for no text, like the end of a sequence."""
        return token < self.size and bool(self._processor.is_control(token))

    def entries(self) -> Iterator[tuple[str, float, EntryKind]]:
        """Every token by its id: its piece as the model spells it, its score, and its kind.

        User-defined pieces count as normal: they have the score 0.
        """
        kinds: tuple[tuple[EntryKind, Any], ...] = (
            ("unknown", self._processor.is_unknown),
            ("control", self._processor.is_control),
            ("unused", self._processor.is_unused),
            ("byte", self._processor.is_byte),
        )
        for token in range(self.size):
            others: list[EntryKind] = [name for name, holds in kinds if holds(token)]
            kind: EntryKind = others[0] if others else "normal"
            yield self._processor.id_to_piece(token), self._processor.get_score(token), kind

    def stream(self) -> TextStream:
        """A decoder of the tokens that continue a text."""
        return TextStream(self._processor)


class TextStream:
    """Decodes ids one by one into the text that continues a prompt.

    Unlike the decoder of a separate sequence, it keeps the first piece's leading space. A character
    that spans several byte pieces appears once it is complete.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """The text that a token completes; empty for control ids and parts of a character.

        An id that the tokenizer lacks becomes a replacement character.
        """
        if token >= self._processor.get_piece_size():
            # A model's vocabulary may be padded beyond the tokenizer's.
            return self._bytes.decode("\ufffd".encode())
        if self._processor.is_control(token):
            return ""
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            # Written <0xE2>.
            return self._bytes.decode(bytes([int(piece[1:-1], 16)]))
        if self._processor.is_unknown(token):
            # SentencePiece's own surface for an unknown piece, "\u2047" between spaces.
            piece = self._processor.decode([token])
        return self._bytes.decode(piece.replace(SPACE, " ").encode())

    def finish(self) -> str:
        """What is left at the end: a replacement character if one stayed incomplete."""
        return self._bytes.decode(b"", final=True)


def decoded(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text that continues a prompt, in non-empty pieces."""
    stream = tokenizer.stream()
    for token in tokens:
        text = stream.push(token)
        if text:
            yield text
    tail = stream.finish()
    if tail:
        yield tail


def tokenizer_of(store: Store, alternative: str = "") -> Tokenizer:
    """The tokenizer beside the weights, if it is the right one.

    Args:
        store: the folder of a model.
        alternative: what else the user may do if there is none, as the end of a sentence.

    Raises:
        TokenizerMissing: there is none, or it is not the one that the manifest names.
        StateMissing: the folder has no manifest.
    """
    manifest = store.manifest()
    source = manifest.tokenizer
    path = store.root / (USUAL_NAME if source is None else source.path)
    if not path.exists():
        raise TokenizerMissing(
            "the tokenizer is not there",
            path=path,
            hint=_where(manifest, store.root) + alternative,
        )
    if source is not None and not is_named(path, source):
        raise TokenizerMissing(
            f"this is not the tokenizer of the model (its sha256 is not {source.sha256})",
            path=path,
            hint=_where(manifest, store.root) + alternative,
        )
    return Tokenizer.load(path)


def is_named(path: Path, source: TokenizerSource) -> bool:
    """Whether a file is the tokenizer that a manifest names.

    Raises:
        TokenizerMissing: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == source.sha256
    except OSError as error:
        raise TokenizerMissing(f"cannot be read: {error.strerror}", path=path) from error


def _where(manifest: Manifest, folder: Path) -> str:
    source = manifest.tokenizer
    if source is not None and any(file.path == source.path for file in manifest.files):
        return f"run: grokfetch fetch {folder}, which brings it"
    if source is None or source.url is None:
        return "put it there"
    return (
        f"run: grokfetch fetch {folder}, which brings it from {source.url} (sha256 {source.sha256})"
    )
