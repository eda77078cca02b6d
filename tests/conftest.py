"""What must be settled before any test imports jax."""

import os
import tempfile

from hypothesis import settings

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Programs and measurements of a test are its own, not the user's.
_caches = tempfile.TemporaryDirectory(prefix="grokfetch-tests-")
os.environ["XDG_CACHE_HOME"] = _caches.name

# Time limits for single examples measure the machine, which may be busy, and not the code.
settings.register_profile("grokfetch", deadline=None)
settings.load_profile("grokfetch")
