"""Names: which ones we accept from strangers, and our own names, which fit a file system."""

from pathlib import PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokfetch.torrent.names import LONGEST_NAME, look_alikes, unsafe_name, with_ending

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=LONGEST_NAME).filter(
    lambda it: len(it.encode()) <= LONGEST_NAME
)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a\\b", "backslash"),
        ("top/new\nline", "control character (U+000A)"),
        ("top/\x7f", "control character (U+007F)"),
        ("top/\udcff", "not UTF-8"),
        ("C:x", "drive"),
        ("/etc", "absolute"),
        ("top/../x", ".. part"),
        (".GROKFETCH/x", "own folder"),
    ],
)
def test_the_reason_names_what_is_wrong(path, reason):
    assert reason in str(unsafe_name(path))


@given(names, st.sampled_from([".part", ".4194304.new", ".torrent"]))
def test_a_name_with_an_ending_fits_and_is_as_it_was_where_it_can_be(name, ending):
    whole = with_ending(name, ending)
    assert whole.endswith(ending)
    assert len(whole.encode()) <= LONGEST_NAME
    if len((name + ending).encode()) <= LONGEST_NAME:
        assert whole == name + ending


def test_long_names_that_begin_alike_keep_apart_with_an_ending():
    one, two = ("é" * 126 + letter for letter in "ab")
    assert with_ending(one, ".part") != with_ending(two, ".part")


def test_paths_that_differ_in_case_or_composition_only_look_alike():
    paths = [PurePosixPath(it) for it in ("top/A/x", "top/a/y", "top/b", "top/é", "top/e\u0301")]
    assert look_alikes(paths) == [
        (PurePosixPath("top/A"), PurePosixPath("top/a")),
        (PurePosixPath("top/e\u0301"), PurePosixPath("top/é")),
    ]
