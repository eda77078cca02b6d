"""What must be settled before any test imports jax."""

import os
import signal
import tempfile
from importlib.metadata import version

from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"

# Small models take longer to compile than to run, so XLA is told to optimise little. Where the
# environment sets `XLA_FLAGS`, even to nothing, the tests run the programs that users run; so does
# `.ci/run` with all that is marked slow.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # Later ones know no other emitters, and end at a flag that they do not know.
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", QUICK) + " --xla_force_host_platform_device_count=8"
)

# Programs and measurements are those of this run of the tests, not the user's, and one worker
# uses what another has compiled.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _caches = tempfile.TemporaryDirectory(prefix="grokfetch-tests-")
    os.environ["XDG_CACHE_HOME"] = _caches.name
    os.environ["JAX_COMPILATION_CACHE_DIR"] = f"{_caches.name}/compiled"
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

# In the background of a script Ctrl-C is ignored, also by the programs that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Time limits for single examples measure the machine, which may be busy, and not the code.
settings.register_profile("grokfetch", deadline=None)
settings.load_profile("grokfetch")
