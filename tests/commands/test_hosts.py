"""Several hosts: each needs, fetches, requires and reads its share of the bytes and no more."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import golden
from support.program import grokfetch, with_devices
from support.release import PIECE, publish

from grokfetch.errors import MeshInvalid, NotProven, OutOfReach, SelectionInvalid
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.folder.store import Store
from grokfetch.folder.survey import survey
from grokfetch.manifest.schema import ManifestTensor
from grokfetch.manifest.selection import (
    Extract,
    Request,
    Selection,
    decode,
    encode,
    pieces_of,
    spans,
)
from grokfetch.manifest.shipped import grok_1
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import encode_torrent
from loader.devices import placement
from loader.weights.checkpoint import open_checkpoint
from loader.weights.host_share import Share, file_spans, share_of_host, tensor_spans
from loader.weights.inventory import expected
from loader.weights.partition import MeshShape, positions, weight_block
from loader.weights.schema import GrokConfig, ParamSpec, parameters
from loader.weights.synthetic import write_checkpoint

MESH = MeshShape(2, 4)
MIB_16 = 16 * 2**20
MOST_S = 30.0
"""Seconds within which the other hosts end when one has died."""
PLACE = PurePosixPath("release/ckpt-0")


# --- which bytes ---------------------------------------------------------------------------------


@st.composite
def cases(draw):
    """A tensor in its file, and a share of some mesh that divides it."""
    mesh = MeshShape(*(draw(st.sampled_from(counts)) for counts in ([1, 2, 4], [1, 2, 4], [1, 2])))
    axes = draw(
        st.sampled_from(
            [
                ("expert", "embed", "ff"),
                ("expert", "ff", "embed"),
                ("q_heads", "embed"),
                ("embed",),
                ("vocab", "embed"),
            ]
        )
    )
    # The vocabulary is split over both axes.
    shape = tuple((16 if axis == "vocab" else 4) * draw(st.integers(1, 3)) for axis in axes)
    dtype = draw(st.sampled_from(["int8", "float32"]))
    spec = ParamSpec("t", 0, shape, dtype, axes)
    head, tail = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    entry = ManifestTensor("t", PurePosixPath("t"), dtype, shape, head)
    held = draw(st.sets(st.sampled_from(list(positions(mesh))), min_size=1))
    return spec, entry, head + next(entry.spans())[1] + tail, Share(mesh, tuple(sorted(held)))


def needed(spec, entry, size, share):
    """For each byte of the file, whether it is outside the array, or in a block of the share."""
    item = 4 if spec.dtype == "float32" else 1
    array = np.zeros((*spec.shape, item), bool)
    for place in share.positions:
        array[weight_block(spec, share.mesh, place)] = True
    whole = np.ones(size, bool)
    whole[entry.offset : entry.offset + array.size] = array.reshape(-1)
    return whole


@given(cases(), st.integers(1, 60))
def test_spans_are_the_blocks_and_what_surrounds_the_array(case, gap):
    wanted = needed(*case)
    exact, near = (np.zeros(len(wanted), bool) for _ in range(2))
    for spans_, marks in ((tensor_spans(*case, 1), exact), (tensor_spans(*case, gap), near)):
        for start, stop in spans_:
            assert not marks[start:stop].any()
            marks[start:stop] = True
    assert (exact == wanted).all()
    # No piece of that length fits into a gap that was bridged.
    assert not (wanted & ~near).any()
    pieces = [slice(at, at + gap) for at in range(0, len(wanted), gap)]
    assert [near[p].any() for p in pieces] == [wanted[p].any() for p in pieces]


@given(
    st.sampled_from([(1, 8), (2, 4), (4, 2), (8, 1)]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(["moe/linear/w", "embeddings"]),
)
def test_hosts_together_need_every_byte(mesh, hosts, name):
    spec = next(s for s in parameters(golden.CONFIG) if s.name.endswith(name))
    entry = ManifestTensor(spec.name, PurePosixPath("t"), spec.dtype, spec.shape, 7)
    size = 7 + next(entry.spans())[1] + 3
    shares = [share_of_host(MeshShape(*mesh), host, hosts) for host in range(hosts)]
    marks = sum(needed(spec, entry, size, share).astype(int) for share in shares)
    assert (marks > 0).all()
    # Every weight is on one host only; bytes around the array are on all.
    assert (marks[7:-3] == 1).all()


@pytest.mark.parametrize(
    ("mesh", "hosts", "part"),
    [((8, 1), 8, 0.141), ((2, 4), 2, 0.509), ((2, 8), 4, 0.422), ((1, 8), 2, 0.829)],
)
def test_official_checkpoint_is_divided_where_experts_are(mesh, hosts, part):
    manifest, config = grok_1(), GrokConfig()
    share = share_of_host(MeshShape(*mesh), hosts - 1, hosts)
    found = file_spans(manifest, config, share, MIB_16)
    size = sum(stop - start for parts in found.values() for start, stop in parts)
    assert abs(size / manifest.size - part) < 0.001


def test_host_with_a_copy_of_the_weights_needs_what_the_other_copies_hosts_need():
    first, second = (share_of_host(MeshShape(1, 4, data=2), host, 2) for host in range(2))
    assert str(second) == "devices 4-7 of data=2,expert=1,model=4"
    specs = [spec for spec, _, _ in shards()]
    blocks = [
        [weight_block(spec, it.mesh, at) for at in it.positions]
        for it in (first, second)
        for spec in specs
    ]
    assert blocks[: len(specs)] == blocks[len(specs) :]


@pytest.mark.parametrize(("host", "hosts"), [(2, 2), (0, 3)])
def test_hosts_that_cannot_share_alike_are_refused(host, hosts):
    with pytest.raises(MeshInvalid):
        share_of_host(MESH, host, hosts)


def test_mesh_stands_in_the_order_of_the_hosts_with_equally_many_devices_of_each():
    devices = [types.SimpleNamespace(process_index=it % 2, id=it) for it in range(6)]
    assert [it.id for it in placement.of_each_host(devices, 4)] == [0, 2, 1, 3]
    with pytest.raises(MeshInvalid, match="2 hosts cannot have equally many of 3 devices"):
        placement.of_each_host(devices, 3)


# --- what is asked for ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return root, *publish(root)


@pytest.fixture(scope="module")
def fetched(published, tmp_path_factory):
    """The folders of two hosts, each with the pieces of its share."""
    root, torrent, _ = published
    folders = [tmp_path_factory.mktemp(f"host{number}") for number in range(2)]
    with seed(encode_torrent(torrent), root, SwarmSettings.loopback()) as peer:
        for number, folder in enumerate(folders):
            grokfetch(
                *("fetch", root / "tiny.json", "--to", folder, "--peer", f"127.0.0.1:{peer.port}"),
                *("--listen", "127.0.0.1:0", "--no-discovery", "--no-mirrors"),
                *("--num-hosts", 2, "--host-id", number, "--mesh", "expert=2,model=4"),
            )
    return folders


def host_spans(number, gap=1):
    """For each shard by name, the bytes that a host needs."""
    share = share_of_host(MESH, number, 2)
    return share, {
        spec.file: tensor_spans(spec, entry, size, share, gap) for spec, entry, size in shards()
    }


def shards():
    files, tensors = expected(golden.CONFIG, PLACE)
    return list(zip(parameters(golden.CONFIG), tensors, (file.size for file in files), strict=True))


def test_host_fetches_the_pieces_of_its_share_and_the_folder_remembers(published, fetched):
    _, torrent, manifest = published
    layout = parse_info(torrent.info, torrent.piece_layers)
    for number, folder in enumerate(fetched):
        share, wanted = host_spans(number)
        by_path = {PLACE / name: tuple(parts) for name, parts in wanted.items()}
        pieces = pieces_of(layout, by_path)
        assert Store(folder).record().pieces == pieces
        assert str(share) == f"devices {4 * number}-{4 * number + 3} of expert=2,model=4"
        assert str(share) in grokfetch("status", folder)
        assert f"bytes of {share} proven" in grokfetch("verify", folder)
        found = survey(Store(folder)).asked
        assert found.proven == found.total
    assert manifest.model
    # Whole pieces of 16 KiB with the other host's experts are left out.
    assert len(Store(fetched[0]).record().pieces) < layout.piece_count


def test_only_the_share_is_required(fetched):
    share, _ = host_spans(0)
    assert len(open_checkpoint(Store(fetched[0]), share=share)) == len(shards())
    with pytest.raises(NotProven):
        open_checkpoint(Store(fetched[0]))


def test_extract_survives_the_disk_and_asks_for_no_more(published):
    _, _, manifest = published
    extract = Extract("a bit", ((PurePosixPath("ckpt-0/tensor00002_000"), ((5, 9), (20, 31))),))
    selection = Selection((Request(extract=extract), Request(layers=(1,))))
    assert decode(encode(selection)) == selection
    assert str(selection) == "a bit; layers 1"
    assert spans(manifest, Selection(selection.requests[:1])) == dict(extract.spans)


@pytest.mark.parametrize("place", ["ckpt-0/tensor00002_000", "../tensor00002_000"])
def test_extract_of_another_checkpoint_is_refused(published, place):
    extract = Extract("too much", ((PurePosixPath(place), ((0, 10**9),)),))
    with pytest.raises(SelectionInvalid, match="another checkpoint"):
        spans(published[2], Selection((Request(extract=extract),)))


@pytest.mark.parametrize(
    "options",
    [
        ("fetch", "--host-id", "0", "--num-hosts", "2"),
        ("fetch", "--host-id", "0", "--num-hosts", "2", "--mesh", "expert=2", "--layers", "1"),
        ("run", "x", "--tokens", "1", "--host-id", "0", "--num-hosts", "2"),
        ("run", "x", "--tokens", "1", "--coordinator", "nowhere"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options):
    grokfetch(*options, code=2)


# --- two processes -------------------------------------------------------------------------------


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_hosts(folders):
    """Two processes of four devices each; exit code, stdout and stderr of both."""
    processes = start_hosts(folders, golden.prompt("p1"), 5)
    outputs = [process.communicate(timeout=200) for process in processes]
    return [(it.returncode, *both) for it, both in zip(processes, outputs, strict=True)]


def start_hosts(folders, prompt, tokens_to_come, at=None):
    """`at`: the number of a host, and the point that it reports."""
    tokens = ",".join(map(str, prompt))
    coordinator = f"127.0.0.1:{free_port()}"
    return [
        subprocess.Popen(
            [
                *(
                    sys.executable,
                    Path(__file__).parents[1] / "support" / "host_process.py",
                    "run",
                    folder,
                ),
                *("--tokens", tokens, "--max-tokens", str(tokens_to_come), "--dtype", "float32"),
                *("--mesh", "expert=2,model=4", "--coordinator", coordinator),
                *("--num-hosts", "2", "--host-id", str(number)),
            ],
            env=with_devices(4) | ({"HOST_AT": at[1]} if at and at[0] == number else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number, folder in enumerate(folders)
    ]


def spoil_all_but(folder, wanted):
    """Overwrite what a host does not need, in a way that the record does not notice."""
    for name, parts in wanted.items():
        path = folder / PLACE / name
        before, data = path.stat(), path.read_bytes()
        spoilt = bytearray(b"\x55" * len(data))
        for start, stop in parts:
            spoilt[start:stop] = data[start:stop]
        path.write_bytes(spoilt)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.slow
def test_two_hosts_give_the_references_tokens_and_each_reads_only_its_share(fetched, tmp_path):
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in fetched]
    for number, folder in enumerate(folders):
        spoil_all_but(folder, host_spans(number)[1])
    results = run_hosts(folders)
    for number, (code, _, errors) in enumerate(results):
        assert code == 0, errors
        near = host_spans(number, PIECE)[1]
        asked = sum(stop - start for parts in near.values() for start, stop in parts)
        assert f"asked for {asked} bytes" in errors
    wanted = golden.arrays()["f32/p1_tokens"][:5].tolist()
    assert results[0][1] == " ".join(map(str, wanted)) + "\n"
    assert results[1][1] == ""


@pytest.mark.slow
def test_host_that_lacks_bytes_ends_the_other_one_too(fetched):
    (first, _, told), (second, _, errors) = run_hosts([fetched[0], fetched[0]])
    assert second == NotProven.exit_code, errors
    assert first == OutOfReach.exit_code
    assert "host 1 has given up" in told


@pytest.fixture(scope="module")
def talkative(tmp_path_factory):
    """A checkpoint whose text continues for minutes."""
    root = tmp_path_factory.mktemp("talkative")
    config = dataclasses.replace(golden.CONFIG, sequence_len=20_000)
    write_checkpoint(root / "ckpt-0", config)
    root.joinpath("config.json").write_text(json.dumps(dataclasses.asdict(config)))
    grokfetch("manifest", root, "--config", root / "config.json")
    return root


KILLED = (signal.SIGKILL, -signal.SIGKILL, "another host has died")
PRESSED = (signal.SIGINT, 128 + signal.SIGINT, "host {} has given up: it was interrupted")
TOLD = (signal.SIGTERM, 128 + signal.SIGTERM, "host {} has given up: it was interrupted")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("number", "ending", "place"),
    [
        *((0, KILLED, "text"), (1, KILLED, "text"), (0, PRESSED, "text"), (1, TOLD, "text")),
        *((1, KILLED, "prompt"), (0, PRESSED, "prompt")),
        *((0, KILLED, "loaded"), (1, TOLD, "loaded")),
    ],
    ids=lambda it: it[0].name if isinstance(it, tuple) else str(it),
)
def test_a_host_that_ends_after_it_has_loaded_ends_the_other(talkative, number, ending, place):
    how, code, said = ending
    other = 1 - number
    prompt = golden.prompt("p1") * (1000 if place == "prompt" else 1)
    processes = start_hosts([talkative, talkative], prompt, 10_000, (number, place))
    try:
        if place == "text":
            assert processes[0].stdout.read(1), processes[0].stderr.read()
        else:
            assert f"it is {place}\n" in iter(processes[number].stderr.readline, "")
            # Then it computes with the others, or waits.
            assert any(it.startswith("loaded") for it in iter(processes[other].stderr.readline, ""))
        processes[number].send_signal(how)
        struck = time.monotonic()
        outputs = [process.communicate(timeout=120) for process in processes]
        seconds = time.monotonic() - struck
    finally:
        for process in processes:
            process.kill()
    assert processes[number].returncode == code, outputs[number][1]
    assert processes[other].returncode == OutOfReach.exit_code, outputs[other][1]
    assert said.format(number) in outputs[other][1]
    assert seconds < MOST_S
    assert "Traceback" not in outputs[0][1] + outputs[1][1]
    if how != signal.SIGKILL:
        # jax waits in vain for a host that ended without telling it, and aborts.
        assert "Check failure" not in outputs[0][1] + outputs[1][1]
