"""`plan --on` says whether devices that are not present can run the model."""

from __future__ import annotations

import json

import jax
import pytest
from support import golden
from support.program import invoke
from support.torrents import content, v1_torrent

from grokfetch.errors import MeshInvalid, NoModel, OutOfReach
from grokfetch.manifest.shipped import grok_1
from grokfetch.torrent.metainfo import encode_torrent
from loader.devices import absent
from loader.inference import ahead
from loader.weights.accelerators import prospect, slice_of


def on(*names):
    return [argument for name in names for argument in ("--on", name)]


def test_devices_that_can_run_the_model_are_a_success(tmp_path):
    text = invoke("plan", "--to", tmp_path, *on("h100x8", "v5p-8")).stdout
    assert max(map(len, text.splitlines())) <= 80
    assert [line.split()[-1] for line in text.splitlines() if "expert=" in line] == ["yes", "yes"]
    # Nothing is said about this machine.
    assert "free disk" not in text


def test_what_does_not_fit_is_told_with_what_would_and_ends_as_run_would(tmp_path):
    done = invoke("plan", "--to", tmp_path, *on("h100x8", "v5e-16"), code=OutOfReach.exit_code)
    assert "NO" in done.stdout
    assert "32 such devices would do" in done.stderr


def test_a_count_that_divides_nothing_is_told_beside_the_others(tmp_path):
    done = invoke("plan", "--to", tmp_path, *on("v5p-24", "h100x8"), code=MeshInvalid.exit_code)
    assert "no mesh divides" in done.stdout
    assert "expert=1,model=8" in done.stdout


def test_machines_are_told_bytes(tmp_path):
    arguments = ("--to", tmp_path, *on("h100x8", "v5e-16", "v5p-24"), "--json")
    done = invoke("plan", *arguments, code=OutOfReach.exit_code)
    found = json.loads(done.stdout)
    assert (found["schema"], found["name"], found["possible"]) == (1, grok_1().name, False)
    first, second, third = found["on"]
    assert (first["devices"], first["mesh"], first["fits"]) == (8, "expert=1,model=8", True)
    assert first["weights"] + first["cache"] + first["work"] < first["memory"]
    assert (second["fits"], second["compiled"]) == (False, False)
    assert "32 such devices" in second["hint"]
    assert (third["fits"], third["mesh"], third["weights"]) == (False, "", None)


def test_names_of_no_device_are_refused_with_those_that_are_known(tmp_path):
    done = invoke("plan", "--to", tmp_path, *on("abacus"), code=2)
    assert "v5p" in done.stderr
    assert "h100" in done.stderr


def test_files_that_are_no_model_run_nowhere(tmp_path):
    torrent = tmp_path / "x.torrent"
    torrent.write_bytes(encode_torrent(v1_torrent({"a": content(40_000)}, 32768)))
    done = invoke("plan", torrent, *on("h100x8"), code=NoModel.exit_code)
    assert "does not describe a model" in done.stderr


def test_only_devices_that_are_named_can_be_compiled_for(tmp_path):
    assert "--on" in invoke("plan", "--to", tmp_path, "--compile", code=2).stderr


def test_a_compiler_that_is_not_here_is_named_with_what_brings_it(tmp_path, monkeypatch):
    def none(**_):
        raise NotImplementedError("topology not implemented")

    monkeypatch.setattr(absent, "prepare", lambda _: None)
    monkeypatch.setattr(absent.topologies, "get_topology_desc", none)
    arguments = ("--to", tmp_path, *on("v5p-8"), "--compile")
    done = invoke("plan", *arguments, code=OutOfReach.exit_code)
    assert "compiling for v5p-8" in done.stderr
    assert "pip install 'grokfetch[tpu]'" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["h100x8", "v5e-4"])
def test_the_compilers_figures_take_the_place_of_the_estimates(monkeypatch, name):
    """Compile for the CPU devices of this machine."""
    monkeypatch.setattr(ahead, "absent", lambda _, count: jax.devices()[:count])
    estimated = prospect(golden.CONFIG, slice_of(name), golden.CONFIG.sequence_len)
    found = ahead.confirmed(estimated)
    assert found.compiled
    assert not estimated.compiled
    assert (found.need.weights, found.need.cache) == (estimated.need.weights, estimated.need.cache)
    assert 0 < found.need.work != estimated.need.work
    assert found.read >= estimated.read
