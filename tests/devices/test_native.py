"""The C program's products equal those of plain JAX, which is used if there is no compiler."""

import contextlib
import functools
import platform
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import c_program, golden
from support.parity import check_bfloat16, check_parity

from grokfetch.c_program import COMPILERS
from loader.devices import native
from loader.devices.kernels import Tuning
from loader.devices.placement import make_mesh, share
from loader.inference.engine import Engine
from loader.weights.partition import MeshShape

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, COMPILERS)), reason="this machine has no C compiler"
)


@pytest.fixture(scope="module")
def multiply():
    """The product, built as a user's first run builds it."""
    assert c_program.build(pytest.fail)
    return jax.jit(native.product, static_argnames="integers")


@pytest.fixture
def unbuilt(monkeypatch):
    """Pretend that this process has built nothing; jax registers a function's name only once."""
    monkeypatch.setattr(native, "LOADED", [])
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_args, **_more: None)


@needs_compiler
@pytest.mark.parametrize("integers", [False, True])
@settings(max_examples=15)
@given(
    st.integers(1, 40),
    st.sampled_from([(1, 1), (7, 1), (96, 4), (130, 2), (256, 8), (1034, 2)]),
    st.integers(1, 300),
    st.tuples(st.integers(0, 70), st.integers(0, 70)),
    st.integers(0, 2**32 - 1),
)
def test_product_of_any_part_is_that_of_the_scaled_matrix(  # noqa: PLR0917 - what is drawn
    multiply, integers, tokens, height, width, beside, seed
):
    (rows, groups), (left, right) = height, beside
    part = left, left + width + right
    check(multiply, (tokens, rows, width, groups), part, seed, integers=integers)


def check(multiply, sizes, part, seed, *, integers):
    """Compare the product of some columns of a random matrix with NumPy's."""
    left, stride = part
    tokens, rows, width, groups = sizes
    random = np.random.default_rng(seed)
    matrix = random.integers(-127, 128, (rows, stride), np.int8)
    flat = np.concatenate([np.full(5, 99, np.int8), matrix.reshape(-1)])
    scales = random.uniform(0.5, 2, (groups, width)).astype(np.float32)
    x = random.standard_normal((tokens, rows), np.float32) * 10.0 ** random.integers(-20, 20)
    place = np.array([5, left, stride], np.int32)
    found = multiply(x, flat, place, scales, integers=integers)
    wide = matrix[:, left : left + width] * np.repeat(scales, rows // groups, axis=0).astype(float)
    bound = np.abs(x) @ np.abs(wide) * 1e-6
    if integers:
        bound += 1.01 * 2**-16 * np.abs(x).max(axis=1, keepdims=True) * np.abs(wide).sum(axis=0)
    assert (np.abs(found - x @ wide) <= bound).all()


@needs_compiler
@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([(1, 1, 1, 4, 20), (2, 2, 6, 128, 600), (3, 1, 7, 70, 130), (1, 3, 2, 16, 64)]),
    st.sampled_from([1, 5, 40]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
    st.integers(0, 2**32 - 1),
)
@pytest.mark.usefixtures("multiply")
def test_attention_is_that_of_numpy_and_writes_the_step_into_the_cache(sizes, tokens, dtype, seed):
    rows, heads, group, size, places = sizes
    sizes = (rows, min(tokens, places), heads, group, size, places)
    check_attention(jax.jit(native.attention, static_argnums=(3, 4)), sizes, dtype, seed)


def check_attention(attention, sizes, dtype, seed):
    """Compare a step of rows of random lengths, with pads and padding tokens, with NumPy's."""
    rows, tokens, heads, group, size, places = sizes
    random = np.random.default_rng(seed)
    drawn = lambda *shape: random.standard_normal(shape, np.float32) * 3  # noqa: E731
    cache = [jnp.asarray(drawn(rows, places, heads, size), dtype) for _ in "kv"]
    queries = drawn(rows, tokens, heads * group, size)
    step = [drawn(rows, tokens, heads, size) for _ in "kv"]
    starts = random.integers(0, places - tokens + 1, rows)
    positions = (starts[:, None] + np.arange(tokens)).astype(np.int32)
    counts = random.integers(0, tokens + 1, rows)
    positions[np.arange(tokens) >= counts[:, None]] = -1
    visible = random.random((rows, places)) < 0.7
    asked = native.Step(queries, *step, positions, visible, np.bool_(False))
    mixed, *filled = attention(asked, *cache, 0.2, 30.0)
    mixed = np.asarray(mixed)
    wanted = [np.array(part.astype(jnp.float32)) for part in cache]
    for row, count in enumerate(counts):
        for part, new in zip(wanted, step, strict=True):
            part[row, starts[row] : starts[row] + count] = jnp.asarray(new[row, :count], dtype)
    for found, part in zip(filled, wanted, strict=True):
        assert (np.asarray(found.astype(jnp.float32)) == part).all()
    for row, count in enumerate(counts):
        assert not mixed[row, count:].any()
        for token in range(count):
            seen = visible[row].copy()
            seen[positions[row, token] + 1 :] = False
            seen[positions[row, token]] |= not seen.any()
            for head in range(heads * group):
                keys, values = (part[row, seen, head // group].astype(float) for part in wanted)
                scores = 30 * np.tanh(keys @ queries[row, token, head] * 0.2 / 30)
                weights = np.exp(scores - scores.max())
                expected = weights @ values / weights.sum()
                np.testing.assert_allclose(mixed[row, token, head], expected, atol=2e-4)


def built_for(processor, folder, monkeypatch):
    """Build the program for an older processor of this kind, without a warning, and use it."""
    monkeypatch.setattr(native, "LOADED", [])
    monkeypatch.setattr(native, "NAME", f"{native.NAME}{processor}")
    monkeypatch.setattr(native, "VERSION", f"{native.VERSION}{processor}{folder.name}")
    monkeypatch.setattr(native, "PROCESSOR", (processor,))
    monkeypatch.setattr(native, "OPTIONS", (*native.OPTIONS, "-Wall", "-Wextra", "-Werror"))
    assert native.built(folder, pytest.fail)


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these processors are of another kind")
@pytest.mark.slow
@pytest.mark.parametrize("processor", ["-march=x86-64", "-march=x86-64-v3"])
def test_compiled_for_an_older_processor_it_is_the_same_and_without_a_warning(
    tmp_path, monkeypatch, processor
):
    built_for(processor, tmp_path, monkeypatch)
    for tokens in (1, 6, 20):
        for integers in (False, True):
            sizes, part = (tokens, 96, 130, 4), (3, 140)
            check(native.product, sizes, part, tokens, integers=integers)
        for dtype in ("bfloat16", "float16"):
            check_attention(native.attention, (2, tokens, 3, 2, 70, 90), dtype, tokens)


def flags():
    """The instruction sets of this processor, if Linux reports them."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("flags"):
                return set(line.split())
    return set()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "needed"),
    [
        ("-march=x86-64-v3", {"avx2", "fma"}),
        ("-march=x86-64-v4", {"avx512f", "avx512bw"}),
        ("-march=cascadelake", {"avx512f", "avx512_vnni"}),
    ],
)
def test_products_in_integers_are_the_same_to_the_bit_on_every_processor(
    multiply, tmp_path, monkeypatch, processor, needed
):
    if not needed <= flags():
        pytest.skip("this processor has fewer instructions")
    random = np.random.default_rng(3)
    cases = []
    for tokens, rows, width, groups in ((13, 514, 70, 2), (40, 1300, 300, 1), (100, 96, 64, 8)):
        x = random.standard_normal((tokens, rows), np.float32)
        flat = random.integers(-128, 128, rows * width, np.int8)
        place = np.array([0, 0, width], np.int32)
        scales = random.uniform(0.5, 2, (groups, width)).astype(np.float32)
        cases.append((x, flat, place, scales))
    here = [np.asarray(multiply(*case, integers=True)) for case in cases]
    built_for(processor, tmp_path, monkeypatch)
    for case, found in zip(cases, here, strict=True):
        # Columns that do not fill a tile are summed in float32.
        whole = found.shape[1] // 64 * 64
        other = np.asarray(native.product(*case, integers=True))
        np.testing.assert_array_equal(other[:, :whole], found[:, :whole])


@needs_compiler
@pytest.mark.parametrize("count", [0, 1, 12, 30])
def test_tokens_of_zeros_behind_the_others_are_left_out(multiply, count):
    random = np.random.default_rng(0)
    x = np.zeros((40, 300), np.float32)
    x[:count] = random.standard_normal((count, 300))
    flat, place = random.integers(-127, 128, 300 * 130, np.int8), np.array([0, 0, 130], np.int32)
    # If they had been multiplied, some results would be NaN.
    scales = np.full((1, 130), np.inf, np.float32)
    scales[0, :100] = 1
    alone, padded = (
        np.asarray(multiply(part, flat, place, scales, integers=True)) for part in (x[:count], x)
    )
    np.testing.assert_array_equal(padded[:count], alone)
    assert not padded[count:].any()


@needs_compiler
@pytest.mark.usefixtures("multiply")
@pytest.mark.parametrize("by_rows", [True, False], ids=["one token", "many tokens"])
def test_every_float16_is_read_as_it_is_and_the_nearest_is_written(by_rows):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = np.sort(every[np.isfinite(every)]).astype(np.float32)
    between = (every[1:] + every[:-1]) / 2
    beside = [np.nextafter(between, np.float32(end)) for end in (-np.inf, np.inf)]
    large = np.array([65519, 65520, 1e30, -1e30, np.inf, -np.inf], np.float32)
    values = np.concatenate([every, between, *beside, large])
    values = np.resize(values, (-(-len(values) // 128), 128))
    wanted = np.clip(values, -65504, 65504).astype(np.float16)
    # A token that may see nothing sees itself, so the result is what it has written.
    rows, tokens = (len(values), 1) if by_rows else (1, len(values))
    step = values.reshape(rows, tokens, 1, 128)
    zeros, cache = np.zeros_like(step), [jnp.zeros(step.shape, jnp.float16) for _ in "kv"]
    places = np.tile(np.arange(tokens, dtype=np.int32), (rows, 1))
    asked = native.Step(zeros, zeros, step, places, np.zeros((rows, tokens), bool), np.bool_(False))
    attention = jax.jit(native.attention, static_argnums=(3, 4))
    mixed, _, written = attention(asked, *cache, 0.2, 30.0)
    np.testing.assert_array_equal(np.asarray(written).reshape(wanted.shape), wanted)
    np.testing.assert_array_equal(np.asarray(mixed).reshape(wanted.shape), wanted)


@needs_compiler
@pytest.mark.parametrize("integers", [False, True])
def test_largest_sums_are_exact_and_what_is_no_number_stays_none(multiply, integers):
    # The sums are of 512 rows whose products all have the largest size and the same sign.
    matrix, x = np.full((512, 64), -128, np.int8), np.full((16, 512), -3e38, np.float32)
    x[1] = 1e-38
    x[2:5, 7] = np.nan, np.inf, -np.inf
    place, scales = np.array([0, 0, 64], np.int32), np.full((1, 64), 1e-6, np.float32)
    x[0] /= 1e6
    found = multiply(x, matrix.reshape(-1), place, scales, integers=integers)
    np.testing.assert_allclose(found[0], 512 * 128 * 3e26, rtol=1e-4)
    np.testing.assert_allclose(found[1], 0, atol=1e-30)
    assert not np.isfinite(found[2:5]).any()


@needs_compiler
@pytest.mark.parametrize(("tokens", "integers"), [(1, False), (6, False), (20, False), (20, True)])
def test_sums_do_not_depend_on_which_thread_was_faster(multiply, tokens, integers):
    random = np.random.default_rng(0)
    flat = jnp.asarray(random.integers(-127, 128, 3000 * 4096, np.int8))
    x = jnp.asarray(random.standard_normal((tokens, 3000), np.float32))
    place, scales = np.array([0, 0, 4096], np.int32), np.ones((1, 4096), np.float32)
    compute = functools.partial(multiply, x, flat, place, scales, integers=integers)
    first, *others = (np.asarray(compute()) for _ in range(6))
    assert all((first == other).all() for other in others)


@pytest.fixture
def engine_over(multiply):  # what it has built is used
    """An engine that uses the C program over mapped weights, on `devices` devices."""

    def made(devices, dtype):
        mesh = make_mesh(golden.CONFIG, MeshShape(1, devices))
        params = share(golden.CHECKPOINT, mesh, Tuning(native=True, integers=True))
        return Engine(golden.CONFIG, params, mesh, dtype)

    return made


@needs_compiler
def test_model_over_mapped_weights_gives_the_references_logits_and_tokens(engine_over):
    check_parity(engine_over(2, "float32"), ["p1", "pz"], steps=6)


@needs_compiler
@pytest.mark.slow
def test_in_bfloat16_it_is_no_further_from_float32_than_the_reference_is(engine_over):
    check_bfloat16(engine_over(1, "bfloat16"), ["p2", "pz"])


@needs_compiler
@pytest.mark.parametrize("place", [(1, 0, 4), (0, 1, 4), (-1, 0, 4), (0, 0, 5)], ids=str)
def test_matrix_that_reaches_beyond_its_file_is_refused(multiply, place):
    x, scales = np.ones((1, 3), np.float32), np.ones((1, 4), np.float32)
    flat, place = np.ones(12, np.int8), np.array(place, np.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="beyond its file"):
        multiply(x, flat, place, scales, integers=False).block_until_ready()


@needs_compiler
def test_what_was_built_is_used_again_and_half_a_file_is_not(tmp_path, unbuilt, monkeypatch):
    source, tmp_path = tmp_path / "short.c", tmp_path / "folder"
    source.write_text("\n".join(f"void {name}(void) {{}}" for name in native.FUNCTIONS))
    monkeypatch.setattr(native, "SOURCES", (source,))
    assert native.built(tmp_path, pytest.fail)
    (file,) = tmp_path.iterdir()
    monkeypatch.setenv("CC", "/nowhere/cc")
    native.LOADED.clear()
    assert native.built(tmp_path, pytest.fail)
    native.LOADED.clear()
    # A copy is truncated, because the file itself is mapped.
    half = tmp_path / "half"
    half.mkdir()
    (half / file.name).write_bytes(file.read_bytes()[:1000])
    assert not native.built(half, [].append)
    monkeypatch.delenv("CC")
    assert native.built(half, pytest.fail)
    assert (half / file.name).read_bytes() == file.read_bytes()


REFUSES = """#!/bin/sh
echo product.c: In function >&2
echo "product.c:300:5: error: unknown type" >&2
echo compilation terminated >&2
exit 4
"""


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("/nowhere/cc", "No such file or directory: '/nowhere/cc'"),
        ("false", "false: exit code 1"),
        ("refuses", "refuses: product.c:300:5: error: unknown type"),
    ],
)
def test_program_that_does_not_build_is_reported_and_leaves_nothing(
    tmp_path, unbuilt, monkeypatch, compiler, reason
):
    tmp_path.joinpath("refuses").write_text(REFUSES)
    tmp_path.joinpath("refuses").chmod(0o700)
    monkeypatch.setenv("CC", str(tmp_path / compiler) if compiler == "refuses" else compiler)
    reasons = []
    assert not native.built(tmp_path / "folder", reasons.append)
    (reported,) = reasons
    assert reported.startswith(
        "product.c and attention.c cannot be built or used, hence slower tokens: "
    )
    assert reported.endswith(reason)
    assert list((tmp_path / "folder").iterdir()) == []


def test_without_a_compiler_nothing_is_built_and_nothing_said(tmp_path, unbuilt, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not native.built(tmp_path / "folder", pytest.fail)
    assert not list(tmp_path.iterdir())


def test_folder_that_cannot_be_made_is_no_reason_to_fail(tmp_path, unbuilt, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CC", "cc")
    assert not native.built(tmp_path / "file" / "folder", [].append)
