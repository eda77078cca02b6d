"""If nobody answers, one message says what else works; the disk is checked before that."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.fake_swarm import FakeSwarm, TickingClock
from support.fetched import FILES, SIZE, V1, run
from support.torrents import manifest_of

from grokfetch.errors import Stalled, StorageFailed
from grokfetch.events import Notice, Status, Traffic
from grokfetch.fetch import Limits, fetch, preflight
from grokfetch.fetch.silence import QUIET_S, Silence, other_ways
from grokfetch.folder.store import Store
from grokfetch.manifest.selection import Request
from grokfetch.manifest.shipped import grok_1

MANIFEST = manifest_of(FILES, V1.info_hash)
MIRRORED = dataclasses.replace(MANIFEST, mirrors=("https://mirror.example/{path}",))


@pytest.fixture
def clock():
    return TickingClock()


@pytest.fixture
def silent(clock):
    return FakeSwarm(V1, dict(FILES), no_metadata=True, tick=clock.tick)


def said(silence, clock, *moments):
    """The messages at some moments, each a time and the traffic then."""
    texts = []
    for clock.now, traffic in moments:
        texts += [(clock.now, notice.text) for notice in silence.after(traffic)]
    return texts


NOBODY = Traffic(0, 0.0, 0)


def test_silence_is_told_once(clock):
    silence = Silence("pigeons", clock)
    moments = [(0.0, NOBODY), (QUIET_S - 1, NOBODY), (QUIET_S, NOBODY), (99.0, NOBODY)]
    [(when, text)] = said(silence, clock, *moments)
    assert when == QUIET_S
    assert "may be blocked" in text
    assert text.endswith("pigeons")


@pytest.mark.parametrize("heard", [Traffic(0, 0.0, 1), Traffic(5, 0.0, 0)], ids=["peer", "byte"])
def test_a_peer_or_a_byte_of_a_mirror_is_no_silence(clock, heard):
    silence = Silence("pigeons", clock)
    assert not said(silence, clock, (0.0, NOBODY), (3.0, heard), (50.0, NOBODY), (99.0, NOBODY))


def test_of_grok_1_it_is_told_that_the_files_are_on_the_web():
    ways = other_ways(Path("grok-1"), grok_1(), metadata=False)
    assert "hf download xai-org/grok-1 --local-dir grok-1" in ways
    assert "grokfetch manifest grok-1" in ways
    assert "--peer" in ways
    assert ".torrent" in ways
    assert ".torrent" not in other_ways(Path("grok-1"), grok_1(), metadata=True)
    assert "hf download" not in other_ways(Path("x"), None, metadata=False)


def heard_until_it_ends(swarm, root, error, **kwargs):
    """The events of a fetch that fails, and its error."""
    events = []

    def listen():
        for event in fetch(Store(root), swarm, **kwargs):
            events.append(event)  # noqa: PERF402  # what came before the error is wanted

    with pytest.raises(error) as failed:
        listen()
    return events, failed.value


def texts(events):
    return [event.text for event in events if isinstance(event, Notice)]


def test_a_fetch_that_finds_no_peer_says_so_and_then_ends_with_the_same_advice(
    tmp_path, clock, silent
):
    limits = Limits(metadata_s=60)
    events, error = heard_until_it_ends(silent, tmp_path, Stalled, limits=limits, clock=clock)
    [text] = [text for text in texts(events) if "no peer within 20 s" in text]
    assert "--proxy" in text
    assert "--proxy" in error.hint
    at = next(number for number, it in enumerate(events) if isinstance(it, Notice))
    assert sum(isinstance(it, Status) for it in events[:at]) == QUIET_S - 1


def test_a_download_without_a_peer_says_so_too(tmp_path, clock):
    class Lonely(FakeSwarm):
        def download(self, _order):
            while True:
                clock.tick()
                yield NOBODY

    swarm = Lonely(V1, dict(FILES))
    limits = Limits(stall_s=60)
    events, _ = heard_until_it_ends(swarm, tmp_path, Stalled, limits=limits, clock=clock)
    [text] = texts(events)
    assert "no peer within 20 s" in text
    assert ".torrent" not in text


def test_where_there_are_mirrors_it_is_said_at_the_start_that_metadata_comes_from_peers(tmp_path):
    swarm = FakeSwarm(V1, dict(FILES), magnet=f"magnet:?xt=urn:btih:{V1.info_hash}")
    first, *_ = run(tmp_path, swarm, manifest=MIRRORED)
    assert isinstance(first, Notice)
    assert "only a BitTorrent peer can give" in first.text
    assert not texts(run(tmp_path, swarm, manifest=MIRRORED))


# --- the disk is looked at before the metadata ---------------------------------------------------


def with_room(monkeypatch, root, free):
    here = preflight.probe(root, 0)
    monkeypatch.setattr(preflight, "probe", lambda *_: dataclasses.replace(here, free=free))


@pytest.mark.parametrize(("request_", "free"), [(None, SIZE - 1), (Request(only=("a",)), 90_000)])
def test_a_disk_that_is_too_small_is_refused_before_anybody_is_asked(
    tmp_path, silent, monkeypatch, request_, free
):
    with_room(monkeypatch, tmp_path, free)
    with pytest.raises(StorageFailed, match="still to come"):
        run(tmp_path, silent, manifest=MANIFEST, request=request_)
    assert not silent.metadata_asked


def test_only_what_is_asked_for_needs_room(tmp_path, monkeypatch):
    with_room(monkeypatch, tmp_path, 2 * len(FILES["a"]))
    run(tmp_path, FakeSwarm(V1, dict(FILES)), manifest=MANIFEST, request=Request(only=("a",)))


def test_what_lies_in_the_folder_under_other_names_counts_as_there(tmp_path, monkeypatch):
    swarm = FakeSwarm(V1, dict(FILES))
    for name, data in FILES.items():
        tmp_path.joinpath(name).write_bytes(data)
    with_room(monkeypatch, tmp_path, 1000)
    run(tmp_path, swarm, manifest=MANIFEST)
    assert not swarm.fetched
