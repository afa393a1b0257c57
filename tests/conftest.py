"""Eight CPU devices and a persistent compilation cache for every test."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import chex
import jax
import pytest
from xdist.scheduler import LoadFileScheduling

# Tests compile far more than they compute: LLVM's optimiser is not worth its time here.
# Nor are 32 threads for each module, beside a process on every core.
QUICK = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if jax.__version_info__ < (0, 11):
    # XLA's older code generator compiles a model in a quarter of the time. It is on its way out,
    # and XLA dies of flags that it does not know.
    QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(QUICK))

# Tracing makes objects by the million, few of them in cycles: at Python's threshold of 700 a tenth
# of the time of these tests is a search for what nobody holds.
gc.set_threshold(50_000, 20, 20)

CACHE = pathlib.Path(__file__).resolve().parent.parent / ".jax_cache"

chex.set_n_cpu_devices(8)  # before anything touches a JAX backend
if os.environ["JAX_PLATFORMS"] != "cpu":
    # Elsewhere float32 products are rounded to tf32 or bfloat16 by default.
    jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


FIRST = ("experiments", "training")
"""Folders of the longest files: one that begins last leaves the other processes idle."""

SHARED_RUN = ("distributed", "evaluate", "pretrain", "recommend", "serve", "train_reward")
"""Files of `experiments` whose fixture `trained` is a run of half a minute: one process has them
all, so that it is trained once."""


def pytest_collection_modifyitems(items):
    def place(item):
        folder = item.path.parent.name
        return FIRST.index(folder) if folder in FIRST else len(FIRST)

    items.sort(key=place)


class Files(LoadFileScheduling):
    """A file goes to one process, in the order of collection."""

    def _split_scope(self, nodeid):
        file = super()._split_scope(nodeid)
        shared = any(file.endswith(f"experiments/test_{name}.py") for name in SHARED_RUN)
        return "experiments on one run" if shared else file


def pytest_xdist_make_scheduler(config, log):
    config.option.loadscopereorder = False  # not by the number of tests
    return Files(config, log) if config.option.dist == "loadfile" else None


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """Folder of real data sets beyond MovieLens (environment variable ONEREC_DATA)."""
    folder = os.environ.get("ONEREC_DATA")
    if not folder:
        pytest.skip("ONEREC_DATA is not set: give the folder that holds amazon-beauty and others")
    return pathlib.Path(folder)
