"""SentencePiece: text to token ids, and ids back to text as they arrive.

The reference puts no begin-of-sequence id before a prompt, and neither does this. The end of a
sequence is the model config's business.
"""

from __future__ import annotations

import codecs
import os
import warnings
from pathlib import Path
from typing import Any

from grokfetch.errors import PromptInvalid, TokenizerMissing

__all__ = ["TextStream", "Tokenizer"]

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
            # The types that SWIG generates lack __module__, which Python 3.12 deprecates.
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
            PromptInvalid: it holds half a character, as a wrong encoding or a cut one leaves it.
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
        """What a token is called: its text with spaces, `<0xE2>` for a byte, `</s>` for an end."""
        if token >= self.size:
            return f"<{token}>"
        name: str = self._processor.id_to_piece(token)
        return name.replace(SPACE, " ")

    def special(self, token: int) -> bool:
        """Whether a token stands for no text, as the end of a sequence does."""
        return token < self.size and bool(self._processor.is_control(token))

    def stream(self) -> TextStream:
        """A decoder of the tokens that continue a text."""
        return TextStream(self._processor)


class TextStream:
    """Decodes ids one by one into the text that continues a prompt.

    Unlike decoding a sequence of its own, it keeps the first piece's leading space. A character
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
