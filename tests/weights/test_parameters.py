"""The table of tensors agrees with the listing of the official checkpoint and the golden one."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path, PurePosixPath

import pytest

from grokfetch.errors import ManifestInvalid
from grokfetch.manifest.schema import encode, parse
from grokfetch.manifest.shipped import grok_1, shipped
from loader.devices.placement import Layer, Params
from loader.weights.inventory import expected
from loader.weights.schema import LAYER, OUTER, GrokConfig, parameters

DATA = Path(__file__).parents[1] / "data"
ROOT = Path(__file__).parents[2]
TINY = GrokConfig.from_mapping(json.loads((DATA / "tiny/config.json").read_text()))
OFFICIAL = [
    json.loads(line) for line in (DATA / "grok-1-parameters.jsonl").read_text().splitlines()
]


def test_the_official_config_gives_the_770_official_tensors_in_file_order():
    specs = parameters(GrokConfig())
    assert len(specs) == len(OFFICIAL) == 770
    for spec, official in zip(specs, OFFICIAL, strict=True):
        assert (spec.index, spec.file, spec.name) == tuple(
            official[key] for key in ("index", "file", "name")
        )
        assert list(spec.shape) == official["shape"]
        assert official["scales_shape"] == (
            None if spec.scale_shape is None else list(spec.scale_shape)
        )
        assert spec.dtype == ("float32" if spec.scale_shape is None else "int8")


def test_the_models_parameters_have_the_fields_of_the_table():
    fields = {field.name for field in dataclasses.fields(Layer)}
    assert fields == {kind.field for kind in LAYER}
    outer = {field.name for field in dataclasses.fields(Params)}
    assert outer - {"layers"} == {kind.field for kind in OUTER}


def test_layers_sort_as_strings():
    layers = [spec.name for spec in parameters(TINY) if spec.name.endswith("router/w")]
    assert [name.split("/")[1].removeprefix("decoder_layer_") for name in layers] == sorted(
        map(str, range(12))
    )


def test_every_axis_has_a_meaning_and_scales_follow_the_contracted_axis():
    for spec in parameters(GrokConfig()):
        assert len(spec.axes) == len(spec.shape)
        if spec.scale_groups is not None:
            assert spec.shape[-2] % spec.scale_groups == 0
            assert math.prod(spec.scale_shape) == spec.scale_groups * math.prod(
                (*spec.shape[:-2], spec.shape[-1])
            )


def test_the_config_survives_the_way_through_json():
    assert GrokConfig.from_mapping(json.loads(json.dumps(TINY.to_mapping()))) == TINY
    assert (TINY.ff_size, len(parameters(TINY))) == (112, 146)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("num_layers", 2.0),
        ("emb_size", "64"),
        ("num_q_heads", 12),
        ("num_selected_experts", 9),
        ("key_size", 15),
        ("widening_factor", float("nan")),
        ("pad_token", 512),
        ("attn_output_multiplier", True),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_field(field, value):
    with pytest.raises(ManifestInvalid, match=rf"model\.{field}"):
        GrokConfig.from_mapping({**TINY.to_mapping(), field: value})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(GrokConfig)])
def test_a_missing_field_is_named_unless_it_is_bos(field):
    mapping = {**TINY.to_mapping()}
    del mapping[field]
    if field == "bos_token":
        assert GrokConfig.from_mapping(mapping) == TINY
    else:
        with pytest.raises(ManifestInvalid, match=rf"model\.{field} is missing"):
            GrokConfig.from_mapping(mapping)


def test_the_shipped_manifest_is_what_its_generator_writes():
    names: dict[str, object] = {"__file__": str(ROOT / "manifests/generate.py"), "__name__": "x"}
    exec((ROOT / "manifests/generate.py").read_text(), names)
    written = encode(names["grok_1"]())
    assert (ROOT / "manifests/grok-1.json").read_bytes() == written


def test_the_shipped_manifest_has_the_official_sizes():
    manifest = grok_1()
    assert manifest in list(shipped())
    assert manifest.size == 318_239_886_140
    assert [file.size for file in manifest.files] == [line["file_bytes"] for line in OFFICIAL]
    assert GrokConfig.from_mapping(manifest.model) == GrokConfig()
    assert parse(encode(manifest), "again") == manifest


def test_the_golden_files_have_the_sizes_that_the_schema_foretells():
    files, _ = expected(TINY, PurePosixPath("ckpt-0"))
    for file in files:
        assert (DATA / "tiny" / file.path).stat().st_size == file.size
