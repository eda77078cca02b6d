"""Settings that must be made before any test imports jax."""

import gc
import os
import signal
import sys
import tempfile
from importlib.metadata import version

import pytest
from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"

# Small models take longer to compile than to run, so XLA is told to optimise little. Where the
# environment sets `XLA_FLAGS`, even to nothing, the tests run the programs that users run; so does
# `.ci/run` with all that is marked slow.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # Later versions have no other emitters, and fail at an unknown flag.
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", QUICK) + " --xla_force_host_platform_device_count=8"
)

# To write for each operation which lines of Python it came from takes a twentieth of the time in
# which a program is traced and compiled, and no test reads it.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

# Programs and measurements belong to this run of the tests, not to the user; workers share what is
# compiled.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _caches = tempfile.TemporaryDirectory(prefix="grokfetch-tests-")
    os.environ["XDG_CACHE_HOME"] = _caches.name
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_caches.name}/compiled"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# Programs that tests start read the bytecode that the first of them has written. Where none may be
# written, as in many containers, each compiles grokfetch again, which is half of its start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# If tests run in the background of a script, Ctrl-C is ignored, even by programs that they
# interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Time limits for single examples measure the machine, which may be busy, and not the code.
settings.register_profile("grokfetch", deadline=None)
settings.load_profile("grokfetch")

# jax, hypothesis and what they trace are hundreds of thousands of objects that live as long as the
# process; scanning them again and again took a twentieth of the suite's CPU time. Cycles that a
# test makes are still collected, but later, and a test that waits for that calls `gc.collect`.
gc.set_threshold(100_000, 50, 1000)


def pytest_collection_finish():
    """Exclude what was imported and collected from all later garbage collections."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _compiled_as_it_is_patched(request):
    """Keep tests that patch the code from sharing compiled programs with other tests."""
    patches = "monkeypatch" in request.fixturenames
    if patches:
        forget_programs()
    yield
    if patches:
        forget_programs()


def forget_programs():
    steps = sys.modules.get("loader.inference.steps")
    if steps is not None:
        steps.program.cache_clear()
