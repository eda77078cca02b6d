"""A model is read while it is fetched: readers wait for bytes, and for nothing else."""

from __future__ import annotations

import dataclasses
import json
import math
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import jax
import pytest
from support import golden
from support.fake_swarm import FakeSwarm
from support.program import grokfetch
from support.release import publish
from support.torrents import content, manifest_of, v1_torrent

from grokfetch.commands.streaming import Meanwhile, fetching
from grokfetch.commands.tokenizer import find_tokenizer
from grokfetch.errors import NotProven, OutOfReach, Stalled, StateLocked, StorageFailed
from grokfetch.events import Arrived, Outcome, Traffic
from grokfetch.fetch import Limits, fetch
from grokfetch.fetch import waiting_store as arriving
from grokfetch.fetch.swarm import SwarmSettings, seed
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.fetch.wanted import Network
from grokfetch.folder import history
from grokfetch.folder.journal import checks
from grokfetch.folder.store import Store
from grokfetch.manifest.selection import Request
from grokfetch.manifest.shipped import demo_folder
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.metainfo import encode_torrent
from loader.devices.arrangement import Arrangement, Loading
from loader.devices.placement import make_mesh
from loader.inference.engine import Engine
from loader.inference.loading import load_as_it_comes
from loader.inference.sampling import Sampling
from loader.weights.checkpoint import expect_checkpoint
from loader.weights.host_share import share_of_host
from loader.weights.schema import parameters

PATIENCE_S = 60
FILES = {name: content(40_000, number) for number, name in enumerate("abc")}
PIECE = 16384
AT_ONCE = Limits(save_s=0, stall_s=PATIENCE_S)


def path(name):
    return PurePosixPath("top", name)


class Gated(FakeSwarm):
    """Brings the pieces from `held` on only when `gate` opens, and nothing until then."""

    def __init__(self, torrent, files, held):
        super().__init__(torrent, files, stall_after=held, tick=self._wait)
        self.gate = threading.Event()

    def _wait(self):
        if self.gate.wait(0.05):
            self.stall_after = None


@pytest.fixture
def swarm():
    return Gated(v1_torrent(FILES, PIECE), dict(FILES), held=4)


def following(store, swarm, **options):
    """Run a block during a fetch, once it is known what will come."""
    options = {"manifest": manifest_of(FILES, None), "limits": AT_ONCE} | options
    return store.filled(fetch(store, swarm, **options))


def read(store, swarm, name, **options):
    with following(store, swarm, **options):
        store.require(path(name))


def test_reader_goes_on_as_soon_as_its_bytes_are_proven(swarm, tmp_path):
    store = Arriving(tmp_path)
    with following(store, swarm):
        store.require(path("a"))
        assert not swarm.gate.is_set()
        with ThreadPoolExecutor() as pool:
            last = pool.submit(store.require, path("c"))
            swarm.gate.set()
            last.result(PATIENCE_S)
    assert (tmp_path / "top/c").read_bytes() == FILES["c"]


def test_how_the_fetch_went_and_what_it_found_is_recorded(swarm, tmp_path):
    swarm.gate.set()
    swarm.corrupt = {2: 1}
    store = Arriving(tmp_path)
    with following(store, swarm):
        store.require(path("c"))
    assert history.read(store).samples[-1].proven == sum(map(len, FILES.values()))
    assert {found.piece for found in checks(store)["fetch"].findings} == {2}


def test_fetch_that_finds_no_metadata_is_told_to_who_waits_for_it(swarm, tmp_path):
    swarm.no_metadata = True
    with pytest.raises(Stalled):
        read(Arriving(tmp_path), swarm, "a", limits=Limits(metadata_s=0))


def test_what_is_asked_for_is_found_out_in_the_thread_that_sets_up_devices(swarm, tmp_path):
    asked_in = []

    def request(_manifest, _piece_length):
        asked_in.append(threading.current_thread())
        return Request()

    swarm.gate.set()
    read(Arriving(tmp_path), swarm, "a", request=request)
    assert asked_in == [threading.main_thread()]


def test_fetch_that_fails_is_told_to_who_waits_for_its_bytes(swarm, tmp_path):
    swarm.full_after = 3
    with pytest.raises(StorageFailed, match="full"):
        read(Arriving(tmp_path), swarm, "c")


def test_fetch_that_fails_is_told_at_the_end_if_nobody_waits(swarm, tmp_path):
    swarm.gate.set()
    swarm.full_after = 5
    with pytest.raises(StorageFailed, match="full"):
        read(Arriving(tmp_path), swarm, "a")


def test_what_is_not_asked_for_is_not_waited_for(swarm, tmp_path):
    swarm.gate.set()
    with pytest.raises(NotProven) as caught:
        read(Arriving(tmp_path), swarm, "c", request=Request(only=("*of a",)))
    assert "--all" in caught.value.hint


def test_who_waits_is_told_what_the_watch_finds(swarm, tmp_path, monkeypatch):
    def watch():
        raise OutOfReach("another host has given up")

    monkeypatch.setattr(arriving, "WATCH_S", 0.01)
    with pytest.raises(OutOfReach):
        read(Arriving(tmp_path, watch=watch), swarm, "c")


def test_folder_is_held_until_the_block_ends(swarm, tmp_path):
    store = Arriving(tmp_path)
    swarm.gate.set()
    with following(store, swarm):
        store.require(path("c"))
        with pytest.raises(StateLocked), Store(tmp_path).lock(exclusive=False):
            pass
    with Store(tmp_path).lock():
        pass


def test_block_that_is_interrupted_ends_the_fetch_and_the_next_one_goes_on(swarm, tmp_path):
    def interrupted(store):
        with following(store, swarm):
            store.require(path("a"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(Arriving(tmp_path))
    assert swarm.closed == 1
    Store(tmp_path).require(path("a"))
    again = FakeSwarm(v1_torrent(FILES, PIECE), dict(FILES))
    assert isinstance(list(fetch(Store(tmp_path), again))[-1], Outcome)
    assert again.fetched == [4, 5, 6, 7]


def test_ctrl_c_wakes_those_who_wait_in_other_threads(swarm, tmp_path):
    usual = signal.getsignal(signal.SIGINT)

    def interrupted(store, pool):
        with following(store, swarm):
            waiting = pool.submit(store.require, path("c"))
            try:
                signal.raise_signal(signal.SIGINT)
            finally:
                # The block, and with it the fetch, has not ended yet.
                assert isinstance(waiting.exception(PATIENCE_S), NotProven)

    with ThreadPoolExecutor() as pool, pytest.raises(KeyboardInterrupt):
        interrupted(Arriving(tmp_path), pool)
    assert signal.getsignal(signal.SIGINT) is usual


# --- a model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return root, *publish(root)


SLOW = 50_000
"""Bytes per second; the checkpoint then takes more than a minute."""

SECOND_LAYER = {spec.file for spec in parameters(golden.CONFIG) if "layer_1/" in spec.name}
EVERYTHING = share_of_host(golden.ONE, 0, 1)
LAST = ("layer_9/", "layer_10/", "layer_11/")
"""What is read last. Of these, the files of layer 9 are also the last files of the torrent."""


class Watched(Arriving):
    """Opens the gate once every file but the last ones is there and has been asked for."""

    def __init__(self, root, swarm):
        super().__init__(root)
        specs = parameters(golden.CONFIG)
        self.left = {spec.file for spec in specs if not any(name in spec.name for name in LAST)}
        self.swarm, self.opened_at = swarm, 0.0

    def require(self, path, start=0, length=None):
        super().require(path, start, length)
        self.left.discard(path.name)
        if not self.left and not self.swarm.gate.is_set():
            self.opened_at = time.time()
            self.swarm.gate.set()


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["mapped", "sharded"])
def test_tensors_are_placed_and_the_model_compiled_before_the_last_pieces_come(
    published, tmp_path, placement, caplog
):
    root, torrent, manifest = published
    layout = parse_info(torrent.info, torrent.piece_layers)
    held = min(layout.pieces_over(layout.file(PurePosixPath("release/ckpt-0/tensor00134_000"))))
    files = {
        str(file.path): root.joinpath("release", file.path).read_bytes() for file in manifest.files
    }
    swarm = Gated(torrent, files, held)
    store, mesh = Watched(tmp_path, swarm), make_mesh(golden.CONFIG, golden.ONE)
    prompt, wanted = golden.prompt("p1"), golden.arrays()["f32/p1_tokens"].tolist()
    there = Arrangement(mesh, placement, Loading("float32"))
    with following(store, swarm, manifest=manifest), jax.log_compiles():
        checkpoint = expect_checkpoint(store, EVERYTHING)
        engine = load_as_it_comes(there, checkpoint, prompt, Sampling())
        assert list(engine.generate(prompt, 6)) == wanted[:6]
    late = [it.getMessage() for it in caplog.records if it.created > store.opened_at > 0]
    late = [text for text in late if text.startswith("Finished XLA compilation")]
    # If experts are called one by one, a layer may give one a new number of tokens.
    assert len(late) <= {"mapped": 4, "sharded": 0}[placement]


class OnlyAsked(FakeSwarm):
    """Brings what readers wait for or will need next, and the rest when `gate` opens."""

    def __init__(self, torrent, files):
        super().__init__(torrent, files)
        self.gate = threading.Event()

    def download(self, order):
        self.orders.append(order)
        left, received = set(order.want), 0
        while left:
            urgent = (*order.demand.waited, *order.demand.ahead)
            urgent = [piece for piece in urgent if piece in left]
            if not urgent and not self.gate.wait(0.01):
                yield Traffic(received, 0.0, 1)
                continue
            piece = urgent[0] if urgent else min(left)
            left.remove(piece)
            self._write(order, piece, half=False)
            received += order.layout.piece_size(piece)
            yield Arrived((piece,))
        yield Traffic(received, 0.0, 1)


@pytest.fixture(scope="module")
def first_tokens(published, tmp_path_factory):
    """A prompt, its text, the choices of the routers, and the pieces that had arrived by then."""
    root, torrent, manifest = published
    layout = parse_info(torrent.info, torrent.piece_layers)
    files = {
        str(file.path): root.joinpath("release", file.path).read_bytes() for file in manifest.files
    }
    swarm, store = OnlyAsked(torrent, files), Arriving(tmp_path_factory.mktemp("first"))
    prompt = golden.prompt("p1")[:1]
    there = Arrangement(make_mesh(golden.CONFIG, golden.ONE), "mapped", Loading("float32"))
    limits = Limits(save_s=1000, stall_s=PATIENCE_S)
    with following(store, swarm, manifest=manifest, limits=limits, demand=store.demand):
        checkpoint = expect_checkpoint(store, by_parts=True)
        engine = load_as_it_comes(there, checkpoint, prompt, Sampling())
        chosen = engine.count_experts()
        tokens = list(engine.generate(prompt, 2))
        proven = store.demand.proven(range(layout.piece_count))
        swarm.gate.set()
    assert len(Store(store.root).record().pieces) == layout.piece_count
    return prompt, tokens, chosen.counts(), proven


def test_a_token_is_generated_as_soon_as_its_own_weights_are_there(published, first_tokens):
    _, torrent, manifest = published
    prompt, tokens, counts, proven = first_tokens
    assert tokens == list(golden.engine().generate(prompt, 2))
    layout = parse_info(torrent.info, torrent.piece_layers)
    idle = []
    for layer, row in enumerate(counts):
        for expert, count in enumerate(row):
            came = expert_pieces(manifest, layout, layer, expert) <= proven
            assert came or not count
            idle.append(not came)
    assert any(idle)


def expert_pieces(manifest, layout, layer, expert):
    """The pieces with one expert's weights."""
    found = set()
    for tensor in manifest.tensors:
        if f"layer_{layer}/moe/" in tensor.name and len(tensor.shape) == 3:
            each = math.prod(tensor.shape[1:])
            file = layout.file(PurePosixPath("release") / tensor.file)
            found.update(layout.pieces_over(file, tensor.offset + expert * each, each))
    return found


@pytest.mark.slow
def test_tensors_are_placed_before_the_last_piece_of_a_slow_swarm(published, tmp_path, monkeypatch):
    root, torrent, _ = published
    prompt = " ".join(map(str, golden.prompt("p1")))
    settings = dataclasses.replace(SwarmSettings.loopback(), up=SLOW)
    with seed(encode_torrent(torrent), root, settings) as peer:
        real = Arriving.require

        def watched(store, path, start=0, length=None):
            if path.name in SECOND_LAYER:
                peer.handle.set_upload_limit(-1)
            real(store, path, start, length)

        monkeypatch.setattr(Arriving, "require", watched)
        arguments = (
            *("run", tmp_path / "grok", "--tokens", prompt, "--max-tokens", 4, "--json"),
            *("--while-fetching", "--source", root / "tiny.json", "--no-mirrors"),
            *("--peer", f"127.0.0.1:{peer.port}", "--listen", "127.0.0.1:0", "--no-discovery"),
            *("--dtype", "float32", "--mesh", "model=1", "--placement", "sharded"),
        )
        text = grokfetch(*arguments)
    events = [json.loads(line) for line in text.splitlines()]
    kinds = [event.get("phase", event["event"]) for event in events]
    last = max(index for index, kind in enumerate(kinds) if kind == "piece")
    assert "loading" in kinds[:last]
    tokens = [event["id"] for event in events if event["event"] == "token"]
    assert tokens == golden.arrays()["f32/p1_tokens"][:4].tolist()


def test_run_writes_tokens_though_a_seed_has_only_their_weights_and_ctrl_c_ends_it(
    published, first_tokens, tmp_path, monkeypatch
):
    root, torrent, _ = published
    prompt, tokens, _, proven = first_tokens
    real = Engine.generate

    def interrupted(self, *arguments):
        yield from real(self, *arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "generate", interrupted)
    with seed(encode_torrent(torrent), root, SwarmSettings.loopback(), have=proven) as peer:
        text = grokfetch(
            *("run", tmp_path / "grok", "--tokens", prompt[0], "--max-tokens", 2, "--json"),
            *("--while-fetching", "--source", root / "tiny.json", "--no-mirrors"),
            *("--peer", f"127.0.0.1:{peer.port}", "--listen", "127.0.0.1:0", "--no-discovery"),
            *("--dtype", "float32", "--mesh", "model=1", "--placement", "mapped"),
            code=130,
        )
    events = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    assert [event["id"] for event in events if event["event"] == "token"] == tokens
    assert Store(tmp_path / "grok").record().pieces == proven


def test_a_tokenizer_that_is_one_of_the_fetched_files_is_waited_for(tmp_path):
    shipped = demo_folder()
    with seed(shipped.joinpath("grok-demo.torrent").read_bytes(), shipped) as peer:
        settings = SwarmSettings.loopback((f"127.0.0.1:{peer.port}",))
        source = str(shipped / "grok-demo.json")
        meanwhile = Meanwhile(source, Network(settings, mirrors=False))
        store = Arriving(tmp_path / "grok")
        with fetching(meanwhile, store, Request(), threading.Event()):
            words = find_tokenizer(store, None)
            assert words.size == store.manifest().model["vocab_size"]


@pytest.mark.parametrize("options", [["--source", "x"], ["--while-fetching", "--unproven"]])
def test_options_that_go_together_or_not(options):
    grokfetch("run", "x", "--tokens", "1", *options, code=2)
