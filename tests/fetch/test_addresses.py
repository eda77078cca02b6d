"""Addresses of mirrors: which are usable, where a file is at them, and where they may redirect."""

from pathlib import PurePosixPath

import pytest

from grokfetch.fetch.mirror.addresses import label, places, unusable
from grokfetch.fetch.mirror.answers import Faulty
from grokfetch.fetch.mirror.http import redirected


@pytest.mark.parametrize(
    ("address", "path", "expected"),
    [
        ("http://h/x", "top/a", ["http://h/x/top/a"]),
        ("http://h/x/", "top/a b#%", ["http://h/x/top/a%20b%23%25"]),
        ("http://h/one.bin", "one", ["http://h/one.bin"]),
        ("http://h/d/", "one", ["http://h/d/one"]),
        ("http://h/m/{path}?x=1", "top/c/a", ["http://h/m/c/a?x=1", "http://h/m/top/c/a?x=1"]),
        ("http://h/{path}", "one", ["http://h/one"]),
    ],
)
def test_where_a_file_lies(address, path, expected):
    assert list(places(address, PurePosixPath(path))) == expected


def test_what_is_no_address_of_a_mirror():
    for address in (
        "",
        "host/x",
        "ftp://h/",
        "http://",
        "http:///x",
        "http://h:port/",
        "http://a b",
    ):
        assert unusable(address, stranger=False), address
    assert unusable("http://localhost:80/?x", stranger=True)
    assert unusable("http://[::1]/?x", stranger=True)
    assert unusable("http://localhost:80/?x", stranger=False) is None
    assert unusable("https://h/{path}?x", stranger=True) is None
    assert label("https://user:pass@h:1/x?token=1#y") == "https://h:1/x"


@pytest.mark.parametrize(
    ("here", "there", "end"),
    [
        ("https://h/a", "http://h/a", "from https to http"),
        ("https://h/a", "ftp://h/a", "not HTTP"),
        ("https://h.example/a", "https://169.254.169.254/a", "private network"),
        ("http://h.example/a", "//localhost/a", "private network"),
        ("https://h/a/b", "../c?x=1", "https://h/c?x=1"),
        ("http://127.0.0.1:1/a", "http://127.0.0.1:2/b", "http://127.0.0.1:2/b"),
        ("http://h/a", "https://g.example/a", "https://g.example/a"),
    ],
)
def test_where_a_redirect_may_lead(here, there, end):
    if end.startswith("http"):
        assert redirected(here, there, None) == end
    else:
        with pytest.raises(Faulty, match=end):
            redirected(here, there, None)
