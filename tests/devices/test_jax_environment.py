"""JAX's variables: a wrong one is an error with its name, one for others' code changes no text."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support.demo import fetch_demo

from grokfetch.errors import OutOfReach

PROMPT = "Until then, have"
SETTINGS = {
    "JAX_NUMPY_DTYPE_PROMOTION": "strict",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    "JAX_ENABLE_X64": "1",
    "JAX_DEBUG_NANS": "1",
    "JAX_DEBUG_INFS": "1",
    "JAX_DEFAULT_PRNG_IMPL": "rbg",
    "JAX_DEFAULT_MATMUL_PRECISION": "bfloat16",
}
OPTIONS = ("--max-tokens", "6", "--temperature", "2", "--top-p", "0.95", "--seed", "5")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return fetch_demo(tmp_path_factory.mktemp("demo") / "grok")


def run(demo, options=OPTIONS, command="run", **variables):
    """The program under these variables."""
    arguments = [command, demo, *((PROMPT, *options) if command == "run" else options)]
    return subprocess.run(
        [sys.executable, "-m", "grokfetch", *arguments],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("command", "variable", "value", "reason"),
    [
        ("run", "JAX_PLATFORMS", "cuda", "here: "),
        pytest.param("run", "JAX_PLATFORMS", "tpu", "here: ", marks=pytest.mark.slow),
        pytest.param("serve", "JAX_PLATFORMS", "abacus", "'abacus'", marks=pytest.mark.slow),
        ("run", "XLA_FLAGS", "--xla_of_another_program=1", "--xla_of_another_program=1"),
        ("serve", "XLA_FLAGS", "/no/such/file", "/no/such/file"),
        pytest.param("run", "JAX_ENABLE_X64", "perhaps", "'perhaps'", marks=pytest.mark.slow),
    ],
)
def test_a_variable_that_jax_or_xla_refuses_is_our_error(demo, command, variable, value, reason):
    options = ("--port", "0") if command == "serve" else ()
    ended = run(demo, options, command, **{variable: value})
    assert ended.returncode == OutOfReach.exit_code, ended.stderr
    assert ended.stderr.startswith("error: ")
    assert variable.lower() in ended.stderr.lower()
    assert reason in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_settings_that_others_need_for_their_code_leave_the_text_as_it_is(demo):
    plain = run(demo)
    assert plain.returncode == 0, plain.stderr
    set_otherwise = run(demo, **SETTINGS)
    assert set_otherwise.returncode == 0, set_otherwise.stderr
    assert set_otherwise.stdout == plain.stdout


IN_PYTHON = """
import sys, jax
for name, value in {settings!r}.items():
    jax.config.update(name, value)
import loader
from loader.inference.sampling import Sampling
with loader.open_checkpoint({folder!r}) as checkpoint:
    engine = loader.load_model(checkpoint)
    sampling = Sampling(temperature=2.0, top_p=0.95, seed=5)
    sys.stdout.write("".join(engine.generate({prompt!r}, 6, sampling)))
assert jax.config.jax_numpy_rank_promotion == {settings!r}.get(
    "jax_numpy_rank_promotion", "allow"
)
"""


@pytest.mark.slow
def test_a_program_keeps_its_own_settings_and_gets_the_same_text(demo):
    texts = []
    strict = {
        "jax_numpy_dtype_promotion": "strict",
        "jax_numpy_rank_promotion": "raise",
        "jax_enable_x64": True,
        "jax_default_prng_impl": "rbg",
    }
    for settings in ({}, strict):
        code = IN_PYTHON.format(settings=settings, folder=str(demo), prompt=PROMPT)
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        texts.append(done.stdout)
    assert texts[0] == texts[1] != ""
