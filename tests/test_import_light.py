"""A plain CUDA image with JAX and Flax only can import the model and serve it."""

import subprocess
import sys

import pytest

HEAVY = ("grain", "tyro", "polars", "pandas", "matplotlib", "sklearn", "orbax.checkpoint.v1")


@pytest.mark.parametrize(
    "modules",
    [
        "onerec_jax",
        "onerec_jax.models.onerec, onerec_jax.generation.beam, onerec_jax.losses.ntp, "
        "onerec_jax.sharding, onerec_jax.training.step, onerec_jax.training.optimizer",
    ],
)
def test_import_is_light(modules):
    code = f"import sys, {modules}\nprint(*(m for m in {HEAVY} if m in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert result.stdout.split() == []
