"""What suits a processor is measured once, kept, and used only for that processor."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader.devices import tuning
from loader.devices.kernels import Tuning
from loader.devices.tuning import WORTH_TUNING, decode, encode, measure, suited


@pytest.fixture(scope="module", autouse=True)
def _small_matrices():
    """Here times are invented, or do not matter; a matrix of 100 MB takes half a second to make."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "ROWS", 48)
        patch.setattr(tuning, "COLUMNS", 64)
        yield


KNOWN = Tuning(256, 8, 16, 4, 1024, 1024, halves=True)


def test_what_was_measured_is_read_back():
    assert decode(encode(KNOWN, "this one"), "this one") == KNOWN
    assert decode(encode(KNOWN, "this one"), "another") is None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema", 1),
        ("wide_rows", 0),
        ("wide_rows", "8"),
        ("halves", 1),
        ("native", 1),
        ("few_tokens", True),
        ("more", 1),
        ("block_rows", 1e9),
    ],
)
def test_what_is_not_sound_counts_as_absent(field, value):
    fields = json.loads(encode(KNOWN, "x")) | {field: value}
    assert decode(json.dumps(fields).encode(), "x") is None


@given(st.binary(max_size=40))
def test_no_bytes_raise(data):
    assert decode(data, "x") is None


def test_fastest_of_each_kind_is_chosen():
    def seconds(_flat, tokens, _rows, columns, tried):
        if tokens == 1 and columns == tuning.COLUMNS:
            return abs(tried.vector_width - 256) + abs(tried.wide_rows - 16)
        if tokens == 1:
            return abs(tried.narrow_rows - 8)
        if tokens == tuning.MANY:
            return abs(tried.block_columns - 2048)
        return (tried.few_tokens < tokens) == (tokens <= 8)

    found = measure(seconds=seconds)
    assert (found.vector_width, found.wide_rows, found.narrow_rows) == (256, 16, 8)
    assert (found.block_rows, found.block_columns, found.halves) == (512, 2048, False)
    assert found.few_tokens == 8


@pytest.mark.parametrize(
    ("built", "slower", "chosen"),
    [(True, None, True), (False, None, False), (True, 1, False), (True, tuning.MANY, False)],
)
def test_c_program_is_chosen_where_it_is_built_and_faster_for_one_token_and_many(
    monkeypatch, tmp_path, built, slower, chosen
):
    def seconds(_flat, tokens, _rows, _columns, tried):
        return 1 if tried.native == (tokens != slower) else 2

    monkeypatch.setattr(tuning.native, "built", lambda folder, _: built and folder == tmp_path)
    assert measure(tmp_path, seconds=seconds).native == chosen
    assert not measure(seconds=seconds).native


@pytest.mark.parametrize("faster", [True, False])
def test_integers_are_chosen_where_they_are_faster_for_many_tokens(monkeypatch, tmp_path, faster):
    def seconds(_flat, tokens, _rows, _columns, tried):
        assert tokens != 1 or not tried.integers
        return 2 - tried.native - (0.5 if faster else -0.5) * tried.integers

    monkeypatch.setattr(tuning.native, "built", lambda _folder, _report: True)
    assert measure(tmp_path, seconds=seconds).integers == faster


def test_kept_choice_of_the_c_program_is_measured_anew_where_it_cannot_be_built(monkeypatch):
    for found in (Tuning(native=True), Tuning(wide_rows=8)):
        monkeypatch.setattr(tuning, "measure", lambda _folder, _report, found=found: found)
        assert suited(WORTH_TUNING, print) == found
        monkeypatch.setattr(tuning.native, "built", lambda _folder, _report: False)
    monkeypatch.setattr(tuning, "measure", None)
    assert suited(WORTH_TUNING, print) == found


@pytest.mark.slow
def test_products_are_really_timed(monkeypatch):
    # The first device of several hosts is not ours on all of them.
    monkeypatch.setattr(tuning.jax, "devices", lambda: ["another host's"])
    assert measure() in {
        Tuning(width, rows, narrow, few, height, columns, halves)
        for width, rows in tuning.ONE_TOKEN
        for narrow in (8, 16, 32)
        for few in {Tuning().few_tokens, *tuning.SEVERAL}
        for height, columns, halves in tuning.BLOCKS
    }
