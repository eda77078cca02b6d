"""The C program's products are those of plain JAX, and do without it where there is no compiler."""

import platform
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import golden

from loader.devices import native
from loader.devices.kernels import Tuning
from loader.devices.placement import make_mesh, share
from loader.inference.engine import Engine
from loader.weights.partition import MeshShape

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, native.COMPILERS)), reason="this machine has no C compiler"
)


@pytest.fixture(scope="module")
def multiply(tmp_path_factory):
    """The product, built as a user's first run builds it."""
    assert native.built(tmp_path_factory.mktemp("native"), pytest.fail)
    return jax.jit(native.product)


@pytest.fixture
def unbuilt(monkeypatch):
    """As if this process had built nothing yet; jax takes a function of a name only once."""
    monkeypatch.setattr(native, "LOADED", [])
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_args, **_more: None)


@needs_compiler
@settings(max_examples=25)
@given(
    st.integers(1, 40),
    st.sampled_from([(1, 1), (7, 1), (96, 4), (130, 2), (256, 8)]),
    st.integers(1, 300),
    st.tuples(st.integers(0, 70), st.integers(0, 70)),
    st.integers(0, 2**32 - 1),
)
def test_product_of_any_part_is_that_of_the_scaled_matrix(  # noqa: PLR0917 - what is drawn
    multiply, tokens, height, width, beside, seed
):
    (rows, groups), (left, right) = height, beside
    check(multiply, (tokens, rows, width, groups), left, left + width + right, seed)


def check(multiply, sizes, left, stride, seed):
    """Compare the product of some columns of a random matrix with NumPy's."""
    tokens, rows, width, groups = sizes
    random = np.random.default_rng(seed)
    matrix = random.integers(-127, 128, (rows, stride), np.int8)
    flat = np.concatenate([np.full(5, 99, np.int8), matrix.reshape(-1)])
    scales = random.uniform(0.5, 2, (groups, width)).astype(np.float32)
    x = random.standard_normal((tokens, rows), np.float32)
    found = multiply(x, flat, np.array([5, left, stride], np.int32), scales)
    wide = matrix[:, left : left + width] * np.repeat(scales, rows // groups, axis=0).astype(float)
    bound = np.abs(x) @ np.abs(wide) * 1e-6 + 1e-6
    assert (np.abs(found - x @ wide) <= bound).all()


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="these processors are of another kind")
@pytest.mark.parametrize("processor", ["-march=x86-64", "-march=x86-64-v3"])
def test_compiled_for_an_older_processor_it_is_the_same_and_without_a_warning(
    tmp_path, monkeypatch, processor
):
    monkeypatch.setattr(native, "LOADED", [])
    monkeypatch.setattr(native, "NAME", f"{native.NAME}{processor}")
    monkeypatch.setattr(native, "PROCESSOR", (processor,))
    monkeypatch.setattr(native, "OPTIONS", (*native.OPTIONS, "-Wall", "-Wextra", "-Werror"))
    assert native.built(tmp_path, pytest.fail)
    for tokens in (1, 6, 20):
        check(native.product, (tokens, 96, 130, 4), 3, 140, tokens)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 6, 20])
def test_sums_do_not_depend_on_which_thread_was_faster(multiply, tokens):
    random = np.random.default_rng(0)
    flat = jnp.asarray(random.integers(-127, 128, 3000 * 4096, np.int8))
    x = jnp.asarray(random.standard_normal((tokens, 3000), np.float32))
    place, scales = np.array([0, 0, 4096], np.int32), np.ones((1, 4096), np.float32)
    first, *others = (np.asarray(multiply(x, flat, place, scales)) for _ in range(6))
    assert all((first == other).all() for other in others)


@needs_compiler
@pytest.mark.usefixtures("multiply")
def test_model_over_mapped_weights_gives_the_references_tokens():
    mesh = make_mesh(golden.CONFIG, MeshShape(1, 2))
    params = share(golden.CHECKPOINT, mesh, Tuning(native=True))
    made = Engine(golden.CONFIG, params, mesh, "float32").generate(golden.prompt("p1"), 6)
    assert list(made) == golden.arrays()["f32/p1_tokens"][:6].tolist()


@needs_compiler
@pytest.mark.parametrize("place", [(1, 0, 4), (0, 1, 4), (-1, 0, 4), (0, 0, 5)], ids=str)
def test_matrix_that_reaches_beyond_its_file_is_refused(multiply, place):
    x, scales = np.ones((1, 3), np.float32), np.ones((1, 4), np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="beyond its file"):
        multiply(x, np.ones(12, np.int8), np.array(place, np.int32), scales).block_until_ready()


@needs_compiler
def test_what_was_built_is_used_again_and_half_a_file_is_not(tmp_path, unbuilt, monkeypatch):
    assert native.built(tmp_path, pytest.fail)
    (file,) = tmp_path.iterdir()
    monkeypatch.setenv("CC", "/nowhere/cc")
    native.LOADED.clear()
    assert native.built(tmp_path, pytest.fail)
    native.LOADED.clear()
    # A copy is cut, since the file itself is mapped.
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
    assert reported.startswith("product.c cannot be built or used, hence slower products: ")
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
