"""Text becomes ids, and ids become text that never shows half a character."""

from __future__ import annotations

import io
import warnings

import pytest

from grokfetch.errors import TokenizerMissing
from loader.inference.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A small model like the real one: byte pair encoding, byte fallback, no normaliser."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "builtin type .*", DeprecationWarning)
        from sentencepiece import SentencePieceTrainer
    text = ["the answer to life the universe and everything is of course 42"] * 50
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_writer=model,
        vocab_size=310,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def tokenizer(path):
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    "text", ["the answer is 42", "the  life", "caf\u00e9 \U0001f680\U0001f680 \u6c34", " the\n"]
)
def test_streamed_text_is_the_text(tokenizer, text):
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join(parts) + stream.finish() == " " + text
    assert not any("\ufffd" in part for part in parts)


def test_no_begin_id_is_added(tokenizer):
    assert len(tokenizer.encode("the")) == 1
    assert tokenizer.encode("") == []


def test_character_appears_when_its_last_byte_does(tokenizer):
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in tokenizer.encode("\U0001f680")]
    assert parts == [" ", "", "", "", "\U0001f680"]


def test_character_cut_short_becomes_one_replacement(tokenizer):
    tokens = tokenizer.encode("\U0001f680")
    stream = tokenizer.stream()
    cut = [stream.push(token) for token in tokens[1:-1]]
    assert cut == ["", "", ""]
    assert stream.push(tokenizer.encode("the")[0]) == "\ufffd the"
    for token in tokens[1:-1]:
        stream.push(token)
    assert stream.finish() == "\ufffd"


def test_control_ids_print_nothing_and_unknown_ids_something(tokenizer):
    stream = tokenizer.stream()
    assert stream.push(1) == ""
    assert stream.push(0) == " \u2047 "
    assert stream.push(tokenizer.size + 5) == "\ufffd"


def test_size_counts_ids(tokenizer):
    assert tokenizer.size == 310


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(TokenizerMissing, match=r"tokenizer\.model"):
        Tokenizer.load(tmp_path / "tokenizer.model")


@pytest.mark.parametrize("content", [b"", b"no model at all", b"\x00" * 100])
def test_file_that_is_no_model_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(TokenizerMissing, match=r"empty|not a SentencePiece model"):
        Tokenizer.load(tmp_path / "tokenizer.model")


def test_damaged_model_is_refused(path, tmp_path):
    (tmp_path / "cut.model").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TokenizerMissing, match="not a SentencePiece model"):
        Tokenizer.load(tmp_path / "cut.model")
