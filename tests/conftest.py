"""Eight CPU devices and a persistent compilation cache for every test."""

import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile far more than they compute: LLVM's optimiser is not worth its time here.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import chex
import jax
import pytest

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"

chex.set_n_cpu_devices(8)  # before anything touches a JAX backend
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Folder of real data sets beyond MovieLens (environment variable ONEREC_DATA)."""
    folder = os.environ.get("ONEREC_DATA")
    if not folder:
        pytest.skip("ONEREC_DATA is not set: give the folder that holds amazon-beauty and others")
    return pathlib.Path(folder)
