"""The manifest: what it accepts, how it refuses, how it finds its files in a torrent."""

from __future__ import annotations

import dataclasses
import json
from pathlib import PurePosixPath as Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from grokfetch.errors import Contradiction, ManifestInvalid
from grokfetch.manifest.schema import (
    Manifest,
    ManifestFile,
    ManifestTensor,
    Scales,
    TokenizerSource,
    bind,
    encode,
    parse,
    plain,
)
from grokfetch.torrent.names import unsafe_name

SMALL = Manifest(
    name="small",
    licence="Apache-2.0",
    info_hash="5f" * 20,
    magnet="magnet:?xt=urn:btih:" + "5f" * 20,
    mirrors=("https://mirror.example/{path}",),
    files=(
        ManifestFile(Path("ckpt-0/tensor00000_000"), 500, "ab" * 32),
        ManifestFile(Path("ckpt-0/tensor00001_000"), 170),
    ),
    tensors=(
        ManifestTensor("embed", Path("ckpt-0/tensor00000_000"), "float32", (10, 8), 151),
        ManifestTensor(
            "w", Path("ckpt-0/tensor00001_000"), "int8", (8, 4), 120, Scales((1, 4), 160)
        ),
    ),
    model={"num_layers": 1, "widening_factor": 2.5},
    tokenizer=TokenizerSource(Path("tokenizer.model"), 9, "cd" * 32, "https://x.example/t"),
    measured="2026-11-23",
)


def changed(path: str, value: object) -> bytes:
    """SMALL as JSON with one field replaced; `path` is like files.0.size."""
    document = json.loads(encode(SMALL))
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target = document
    for part in parents:
        target = target[part]
    target[last] = value
    return json.dumps(document).encode()


def test_what_is_written_is_read_back_equal():
    assert parse(encode(SMALL), "x") == SMALL


def test_a_plain_torrent_has_a_manifest_without_a_model():
    manifest = plain("anything", "00" * 20, None, [ManifestFile(Path("top/a.txt"), 3)])
    assert parse(encode(manifest), "x") == manifest
    assert manifest.model is None


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("schema", 2, "schema"),
        ("schema", True, "schema"),
        ("name", "", "name"),
        ("info_hash", "XYZ", "info_hash"),
        ("info_hash", "AB" * 20, "info_hash"),
        ("magnet", "http://x", "magnet"),
        ("mirrors", ["ftp://x"], "mirrors[0]"),
        ("mirrors", "https://x", "mirrors"),
        ("files", {}, "files"),
        ("files.0", 3, "files[0]"),
        ("files.0.path", "../up", "files[0].path"),
        ("files.0.path", "/etc/passwd", "files[0].path"),
        ("files.0.path", ".grokfetch/record.json", "files[0].path"),
        ("files.1.path", "CKPT-0/tensor00000_000", "files[1].path"),
        ("files.1.size", -1, "files[1].size"),
        ("files.1.size", 1.5, "files[1].size"),
        ("files.1.size", 2**63, "files[1].size"),
        ("files.0.sha256", "ab", "files[0].sha256"),
        ("tensors.0.file", "elsewhere", "tensors[0].file"),
        ("tensors.0.dtype", "complex64", "tensors[0].dtype"),
        ("tensors.0.shape", [10, -8], "tensors[0].shape[1]"),
        ("tensors.0.shape", [2**62, 2**62], "tensors[0]"),
        ("tensors.0.offset", 400, "tensors[0]"),
        ("tensors.1.scales.offset", 169, "tensors[1]"),
        ("tensors.1.name", "embed", "tensors[1].name"),
        ("measured", "yesterday", "measured"),
        ("model", [], "model"),
        ("model.num_layers", "many", "model.num_layers"),
        ("tokenizer.sha256", None, "tokenizer.sha256"),
    ],
)
def test_a_malformed_field_is_named(field, value, named):
    with pytest.raises(ManifestInvalid) as caught:
        parse(changed(field, value), "here.json")
    assert caught.value.path == "here.json"
    assert caught.value.what.startswith((named + " ", named + ":", named + "."))


@pytest.mark.parametrize("field", ["schema", "name", "files"])
def test_a_missing_field_is_named(field):
    document = json.loads(encode(SMALL))
    del document[field]
    with pytest.raises(ManifestInvalid, match=f"^x: {field} is missing"):
        parse(json.dumps(document).encode(), "x")


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_any_json_is_a_manifest_or_a_typed_refusal(value):
    with pytest.raises(ManifestInvalid):
        parse(json.dumps(value).encode(), "x")


@given(st.binary(max_size=60))
def test_any_bytes_are_a_typed_refusal(text):
    with pytest.raises(ManifestInvalid):
        parse(text, "x")


def test_nesting_too_deep_for_the_parser_is_refused():
    with pytest.raises(ManifestInvalid):
        parse(b"[" * 200_000, "x")


@pytest.mark.parametrize(
    "name", ["a/../b", "/a", "a//b", "a\\b", "C:/a", "a\x00b", "./a", ".GROKFETCH/x"]
)
def test_names_that_leave_the_folder_are_unsafe(name):
    assert unsafe_name(name)


def test_ordinary_names_are_safe():
    assert unsafe_name("grok-1/ckpt-0/tensor00000_000") is None
    assert unsafe_name("notes ...v1 (ü).txt") is None


def test_files_are_found_in_whatever_folder_the_torrent_puts_them():
    bound = bind(
        SMALL, [(Path("top/x/tensor00001_000"), 170), (Path("top/x/tensor00000_000"), 500)]
    )
    assert [file.path for file in bound.files] == [
        Path("top/x/tensor00000_000"),
        Path("top/x/tensor00001_000"),
    ]
    assert bound.files[0].sha256 == SMALL.files[0].sha256
    assert [tensor.file for tensor in bound.tensors] == [file.path for file in bound.files]


def test_extra_files_of_the_torrent_are_listed_after_the_manifests_own():
    there = [(file.path, file.size) for file in SMALL.files]
    bound = bind(SMALL, [(Path("README"), 12), *there])
    assert bound.files == (*SMALL.files, ManifestFile(Path("README"), 12))


def test_of_two_files_of_one_name_the_one_with_the_longer_common_path_is_meant():
    there = [(file.path, file.size) for file in SMALL.files]
    bound = bind(SMALL, [(Path("old/tensor00000_000"), 500), *there])
    assert bound.tensors[0].file == Path("ckpt-0/tensor00000_000")


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ([(Path("ckpt-0/tensor00000_000"), 500)], "tensor00001_000 of the manifest is missing"),
        (
            [(Path("a/tensor00000_000"), 499), (Path("a/tensor00001_000"), 170)],
            "must have 500 bytes",
        ),
        (
            [
                (Path(f"{top}/tensor0000{i}_000"), size)
                for top in "ab"
                for i, size in ((0, 500), (1, 170))
            ],
            "both",
        ),
    ],
)
def test_a_torrent_that_contradicts_the_manifest_is_refused(there, said):
    with pytest.raises(Contradiction, match=said):
        bind(SMALL, there)


def test_binding_twice_changes_nothing():
    bound = bind(SMALL, [(Path("top") / file.path, file.size) for file in SMALL.files])
    assert bind(bound, [(file.path, file.size) for file in bound.files]) == bound


def test_size_is_the_sum_over_all_files():
    assert SMALL.size == 670
    assert dataclasses.replace(SMALL, files=()).size == 0
