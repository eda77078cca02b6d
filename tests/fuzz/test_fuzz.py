"""Whatever bytes come from outside are understood, or refused with an error of ours.

The ordinary suite tries the treacherous cases of tests/data/fuzz and a few hundred variants of
good input; the slow tests try new variants for 30 seconds each, or as many as `FUZZ_SECONDS` says,
and say where they leave a find, which is then to be kept among the cases.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import PurePosixPath

import pytest
from support import golden
from support.fuzzing import try_a_few, try_for_a_while
from support.serving import SERVED
from support.torrents import content, manifest_of, v1_torrent, v2_torrent

from grokfetch.errors import GrokfetchError
from grokfetch.fetch.mirror.rate_limit import rest_asked_for
from grokfetch.folder import record
from grokfetch.manifest import schema, selection
from grokfetch.serving.fields import Refused
from grokfetch.serving.requests import read_completion
from grokfetch.torrent.info_dictionary import parse_info
from grokfetch.torrent.magnet import parse_magnet
from grokfetch.torrent.metainfo import encode_torrent, parse_torrent
from loader.export import gguf
from loader.weights.inventory import expected
from loader.weights.shard_reader import read_slices

FILES = {"a/b": content(100_000), "c": content(10), "empty": b""}
MAGNET = (
    b"magnet:?xt=urn:btih:5f5e8848426129ab63cb4db717bb54193c1c1ad7&xt=urn:btmh:1220"
    + b"ab" * 32
    + b"&dn=a%20b&tr=udp://h:1&tr=http%3A%2F%2Fh%2Fa&x.pe=127.0.0.1:1&x.pe=[::1]:2&so=0,3-4&xl=12"
)
BODY = {
    "model": "golden",
    "prompt": ["a", "b"],
    "max_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "stop": ["x"],
    "logit_bias": {"5": -3.0},
    "n": 2,
    "logprobs": 3,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def torrent(data, _folder):
    known = parse_torrent(data)
    parse_info(known.info, known.piece_layers)


def shard(data, _folder):
    read_slices(data, "shard")


def manifest(data, _folder):
    schema.parse(data, "manifest")


def magnet(data, _folder):
    parse_magnet(data.decode("latin-1"))


def state(data, _folder):
    for decode in (record.decode, selection.decode):
        with contextlib.suppress(GrokfetchError, record.RecordDamaged):
            decode(data)


def limits(data, _folder):
    text = data.decode("latin-1")
    for name in ("retry-after", "ratelimit", "ratelimit-reset", "x-ratelimit-reset", "date"):
        rest = rest_asked_for({name: text}, 1.7e9)
        assert rest is None or 0 <= rest <= 600


def gguf_file(data, folder):
    file = folder / "fuzzed.gguf"
    file.write_bytes(data)
    gguf.read(file)


def completion(data, _folder):
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        return
    with contextlib.suppress(Refused):
        wanted = read_completion(body, SERVED)
        assert all(token < SERVED.vocabulary for token in wanted.generation.logit_bias)


def torrents():
    return [encode_torrent(v1_torrent(FILES, 32768)), v2_torrent(FILES, 32768)]


def shards():
    files = sorted((golden.TINY / "ckpt-0").iterdir(), key=lambda file: file.stat().st_size)
    return [file.read_bytes() for file in (files[0], files[40], files[100])]


def manifests():
    return [schema.encode(manifest_of(FILES, "ab" * 20)), schema.encode(tiny_manifest())]


def tiny_manifest():
    files, tensors = expected(golden.CONFIG, PurePosixPath("ckpt-0"))
    return schema.Manifest("tiny", files, tensors=tensors, model=golden.CONFIG.to_mapping())


def states():
    some = selection.Selection((selection.Request(layers=(1, 2), experts=(3,)),))
    return [record.encode(record.Record("ab" * 20, frozenset({1, 5}))), selection.encode(some)]


def rests():
    date = b"Wed, 21 Oct 2026 07:28:00 GMT"
    return [b"30", date, b'"api";r=0;t=20, "b";r=1;t=3', b"limit=1, remaining=0, reset=7"]


def ggufs():
    fields = {"general.architecture": gguf.Field("str", "grok"), "n": gguf.Field("u32", 5)}
    tensors = [gguf.Entry("a.weight", (4, 32), "Q8_0", 0)]
    return [gguf.written(fields, tensors) + bytes(4 * 34)]


def bodies():
    return [json.dumps(BODY).encode(), b'{"prompt": [[1, 2], [3]], "echo": true}']


SEEDS = {
    torrent: torrents,
    shard: shards,
    manifest: manifests,
    magnet: lambda: [MAGNET],
    state: states,
    limits: rests,
    gguf_file: ggufs,
    completion: bodies,
}
"""The functions that are tried, each with well-formed input."""

each_target = pytest.mark.parametrize("target", SEEDS, ids=lambda it: it.__name__)


@each_target
def test_well_formed_input_is_understood(target, tmp_path):
    for data in SEEDS[target]():
        target(data, tmp_path)


def held(target, folder):
    """A function that tries one input: errors of ours are answers, any other is a failure."""

    def attempt(data):
        with contextlib.suppress(GrokfetchError):
            target(data, folder)

    return attempt


@each_target
def test_treacherous_cases_and_a_few_variants_are_refused_as_they_should_be(target, tmp_path):
    try_a_few(held(target, tmp_path), target.__name__, SEEDS[target]())


@pytest.mark.slow
@each_target
def test_half_a_minute_of_new_variants_is_refused_as_it_should_be(target, tmp_path):
    try_for_a_while(held(target, tmp_path), target.__name__, SEEDS[target](), tmp_path)
