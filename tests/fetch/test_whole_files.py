"""Whole files from mirrors by a manifest's sha256, without a torrent: real HTTP on 127.0.0.1."""

import contextlib
import dataclasses
import hashlib
import json
import signal
import subprocess
import sys
import time
from pathlib import PurePosixPath

import pytest
from support.patience import wait_for
from support.program import grokfetch
from support.torrents import content
from support.web_server import WebServer

from grokfetch import errors
from grokfetch.events import Finding, Notice, Origin, Outcome, Status
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch.mirror import Mirrors, MirrorSettings
from grokfetch.folder.store import Store
from grokfetch.folder.survey import survey
from grokfetch.manifest.schema import Manifest, ManifestFile, encode

FILES = {
    "a b": content(300_000),
    "deep/c": content(100),
    "empty": b"",
    "large": content(3_000_000),
}
SIZE = sum(map(len, FILES.values()))
SERVED = {f"main/{name}".replace(" ", "%20"): data for name, data in FILES.items()}
MANIFEST = Manifest(
    "model",
    tuple(
        ManifestFile(PurePosixPath("model", name), len(data), hashlib.sha256(data).hexdigest())
        for name, data in FILES.items()
    ),
)
SETTINGS = MirrorSettings(connections=3, patience_s=20, rest_s=0.01, attempts=3)
LIMITS = Limits(stall_s=60)


@pytest.fixture
def web():
    with WebServer(dict(SERVED)) as server:
        yield server


@pytest.fixture
def other():
    with WebServer(dict(SERVED)) as server:
        yield server


def address(server):
    return f"{server.url}/main/{{path}}"


def bring(root, *servers, manifest=MANIFEST, **kwargs):
    mirrors = Mirrors(tuple(map(address, servers)), SETTINGS)
    return list(fetch(Store(root), mirrors, manifest=manifest, limits=LIMITS, **kwargs))


def bring_until_it_fails(root, *servers):
    """The events, and the error."""
    events = []
    mirrors = Mirrors(tuple(map(address, servers)), SETTINGS)
    with pytest.raises(errors.GrokfetchError) as caught:
        events.extend(fetch(Store(root), mirrors, manifest=MANIFEST, limits=LIMITS))
    return caught.value


def whole(root):
    Store(root).require_all()
    return {name: (root / "model" / name).read_bytes() for name in FILES} == FILES


def findings(events):
    return [event for event in events if isinstance(event, Finding)]


def test_a_mirror_alone_brings_and_proves_every_file(tmp_path, web):
    events = bring(tmp_path, web)
    assert events[-1] == Outcome(SIZE, len(FILES), 0)
    assert events[-2].sent == {Origin("mirror", address(web)): SIZE}
    assert not findings(events)
    assert whole(tmp_path)
    assert survey(Store(tmp_path)).by_sha256 == SIZE
    web.asked.clear()
    assert bring(tmp_path, web)[-1] == Outcome(SIZE, 0, 0)
    assert not web.asked


def test_a_limit_holds_for_all_mirrors_together(tmp_path, web, other):
    mirrors = Mirrors((address(web), address(other)), dataclasses.replace(SETTINGS, down=2 * SIZE))
    began = time.monotonic()
    events = list(fetch(Store(tmp_path), mirrors, manifest=MANIFEST, limits=LIMITS))
    assert time.monotonic() - began > 0.3
    done = [event.done for event in events if isinstance(event, Status)]
    assert max(done) == SIZE
    assert whole(tmp_path)


def test_several_mirrors_share_the_files(tmp_path, web, other):
    events = bring(tmp_path, web, other)
    assert {origin.name for origin in events[-2].sent} == {address(web), address(other)}
    assert whole(tmp_path)


def test_an_interrupted_file_has_no_name_and_no_proof_and_goes_on_where_it_ended(tmp_path, web):
    web.halt.add("main/large")
    mirrors = Mirrors((address(web),), SETTINGS)
    events = fetch(Store(tmp_path), mirrors, manifest=MANIFEST, limits=LIMITS)
    part = tmp_path / "model/large.part"
    with contextlib.closing(events):
        # The others are complete, so that only this one counts below.
        while not (
            part.exists()
            and part.stat().st_size >= 1 << 20
            and survey(Store(tmp_path)).by_sha256 == SIZE - len(FILES["large"])
        ):
            assert isinstance(next(events), Status | Notice)
    there = part.stat().st_size
    assert not part.with_name("large").exists()
    with pytest.raises(errors.NotProven):
        Store(tmp_path).require(PurePosixPath("model/large"), 0, 1)
    assert survey(Store(tmp_path)).files[PurePosixPath("model/large")] == "begun"
    web.halt.clear()
    events = bring(tmp_path, web)
    assert events[-2].sent == {Origin("mirror", address(web)): len(FILES["large"]) - there}
    assert whole(tmp_path)
    assert not part.exists()


def test_answers_that_break_off_are_continued(tmp_path, web):
    web.cut_after = 0.6
    events = bring(tmp_path, web)
    assert events[-2].received == SIZE
    assert whole(tmp_path)


@pytest.mark.parametrize("ranges", [True, False])
def test_what_is_left_of_another_file_is_brought_anew_and_nobody_is_blamed(tmp_path, web, ranges):
    web.no_range = not ranges
    part = tmp_path / "model/large.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"x" * 1000)
    events = bring(tmp_path, web)
    told = [finding.detail for finding in findings(events)]
    assert len(told) == (1 if ranges else 0)
    assert all("an earlier fetch" in detail for detail in told)
    assert whole(tmp_path)


def test_a_wrong_file_is_reported_with_its_mirror_and_brought_from_another(tmp_path, web, other):
    web.spoil.add("main/large")
    other.spoil.add("main/a%20b")
    events = bring(tmp_path, web, other)
    for finding in findings(events):
        wrong = {"large": web, "a b": other}[finding.path.name]
        assert finding.detail.endswith(f"it came from {address(wrong)}")
    assert whole(tmp_path)


def test_a_wrong_file_of_the_only_mirror_is_asked_for_once_more_and_then_given_up(tmp_path, web):
    web.spoil.add("main/large")
    error = bring_until_it_fails(tmp_path, web)
    assert isinstance(error, errors.Contradiction)
    assert f"{address(web)} sends another file" in str(error)
    # Its length is also requested each time.
    assert web.asked.count("main/large") == 4
    web.spoil.clear()
    assert bring(tmp_path, web)[-1].fetched == 1
    assert whole(tmp_path)


def test_a_file_that_a_mirror_lacks_comes_from_another(tmp_path, web, other):
    del web.files["main/large"]
    del other.files["main/deep/c"]
    events = bring(tmp_path, web, other)
    assert not findings(events)
    assert whole(tmp_path)
    del web.files["main/a%20b"]
    error = bring_until_it_fails(tmp_path / "elsewhere", web)
    assert isinstance(error, errors.OutOfReach)
    assert "404" in str(error)


@pytest.mark.parametrize("status", [429, 503])
def test_a_mirror_that_only_has_us_wait_is_given_up_for_another(tmp_path, web, other, status):
    web.status, web.headers = status, {"Retry-After": "0"}
    mirrors = Mirrors((address(web), address(other)), SETTINGS)
    events = fetch(Store(tmp_path), mirrors, manifest=MANIFEST, limits=Limits(stall_s=1))
    said = [event.text for event in events if isinstance(event, Notice)]
    assert all(f"{address(web)}: model/" in text for text in said)
    assert all(f"it answers {status}, and has us wait for 1.00 s or more" in text for text in said)
    assert said
    assert whole(tmp_path)


def test_of_a_mirror_alone_that_only_has_us_wait_the_error_says_what_it_answers(tmp_path, web):
    web.status, web.headers = 429, {"Retry-After": "0"}
    mirrors = Mirrors((address(web),), SETTINGS)
    with pytest.raises(
        errors.Stalled, match=r"it answers 429, and has us wait for 1\.00 s or more"
    ):
        list(fetch(Store(tmp_path), mirrors, manifest=MANIFEST, limits=Limits(stall_s=1)))


def test_files_that_are_there_already_are_proven_and_a_wrong_one_is_replaced(tmp_path, web):
    bring(tmp_path, web)
    tmp_path.joinpath(".grokfetch/record.json").unlink()
    large = tmp_path / "model/large"
    large.write_bytes(b"x" * len(FILES["large"]))
    events = bring(tmp_path, web)
    assert [finding.path.name for finding in findings(events)] == ["large"]
    assert (events[-1].fetched, events[-1].rehashed) == (1, len(FILES) - 1)
    assert whole(tmp_path)


def test_a_part_is_asked_for_by_the_names_of_files(tmp_path, web):
    manifest = tmp_path / "m.json"
    manifest.write_bytes(encode(dataclasses.replace(MANIFEST, mirrors=(address(web),))))
    folder = tmp_path / "there"
    grokfetch("fetch", manifest, "--to", folder, "--only", "*deep*")
    assert not folder.joinpath("model/large").exists()
    grokfetch("fetch", folder, "--all")
    assert whole(folder)


def test_the_command_resumes_after_sigkill_and_verify_status_and_repair_know_the_result(
    tmp_path, web
):
    manifest = tmp_path / "m.json"
    manifest.write_bytes(encode(MANIFEST))
    folder = tmp_path / "there"
    command = ["fetch", str(manifest), "--to", str(folder), "--web-seed", address(web)]
    web.halt.add("main/large")
    part = folder / "model/large.part"
    program = [sys.executable, "-m", "grokfetch", *command]
    with subprocess.Popen(program, stderr=subprocess.DEVNULL) as child:
        wait_for(lambda: part.exists() and part.stat().st_size >= 1 << 20)
        wait_for(lambda: survey(Store(folder)).proven == SIZE - len(FILES["large"]))
        child.send_signal(signal.SIGKILL)
        child.wait(60)
    web.halt.clear()
    web.asked.clear()
    grokfetch(*command)
    assert set(web.asked) == {"main/large"}
    assert f"{SIZE:,} of {SIZE:,} bytes proven, by the manifest's sha256" in grokfetch(
        "verify", folder
    )
    assert json.loads(grokfetch("status", folder, "--json"))["bytes"]["by_sha256"] == SIZE
    folder.joinpath("model/a b").write_bytes(b"damaged")
    grokfetch("verify", folder, code=errors.Damaged.exit_code)
    grokfetch("fetch", folder, "--repair", "--web-seed", address(web))
    assert whole(folder)


def test_without_a_mirror_or_a_sha256_it_is_refused_before_anything_is_written(tmp_path, web):
    manifest = tmp_path / "m.json"
    manifest.write_bytes(encode(MANIFEST))
    folder = tmp_path / "there"
    code = errors.SourceInvalid.exit_code
    assert "--web-seed" in grokfetch("fetch", manifest, "--to", folder, code=code)
    unknown = dataclasses.replace(MANIFEST.files[0], sha256=None)
    manifest.write_bytes(encode(dataclasses.replace(MANIFEST, files=(unknown,))))
    seed = ("--web-seed", address(web))
    assert "sha256" in grokfetch("fetch", manifest, "--to", folder, *seed, code=code)
    assert not folder.joinpath("model").exists()
