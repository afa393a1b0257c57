"""Memory that XLA plans for an update of post-training, on a GPU that need not be there.

The joint step is compiled for a described card, from shapes alone; the largest arrays at the peak
of the plan are printed, and the estimate beside the sum. Kernels cannot be tried where there is no
card: those that are chosen there may want more memory than is planned here.
Needs the CUDA plugin of JAX (`pip install "jax[cuda12]"`) in the environment, and a minute.

    JAX_PLATFORMS=cpu python -m benchmarks.plan --users 128 --rollout.group 512 --rollout.parts 4
"""

import dataclasses
import os
import pathlib
import re
import tempfile
from typing import Literal
from unittest import mock

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from benchmarks import results
from benchmarks.posttrain import BenchmarkConfig, make_trainer, needed_memory
from benchmarks.random_data import large_spec, random_users
from onerec_jax.posttraining.step import PolicyBatch
from onerec_jax.sharding import AXES

MEMORY = {"h100": 84_929_347_584, "h200": 150_121_545_728}
"""Bytes of a card: what XLA plans for is a share of them."""
CARD = """
gpu_device_info {{
  cuda_compute_capability {{ major: 9 }}
  core_count: 132
  fpus_per_core: 128
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  device_memory_size: {memory}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 7 }}
runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{name}"
"""
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
"""There is no card to try kernels on."""


@dataclasses.dataclass(frozen=True)
class PlanConfig(BenchmarkConfig):
    """Plan the memory of an update."""

    card: Literal["h100", "h200"] = "h100"
    largest: int = 30
    """Arrays to print."""


def shapes_of(config: PlanConfig, spec) -> PolicyBatch:
    """The batch of an update, as shapes."""
    one = random_users(config.model, spec, 1)

    def shape(dtype, *sizes):
        return jax.ShapeDtypeStruct(sizes, dtype)

    def users(number):
        return jax.tree.map(lambda x: shape(x.dtype, number, *x.shape[1:]), one)

    r, g, levels = config.users, config.rollout.group, spec.levels
    return PolicyBatch(
        users(config.tuned_users),
        users(r),
        user=shape(np.int32, r),
        position=shape(np.int32, r),
        sid=shape(np.int32, r, g, levels),
        logp=shape(np.float32, r, g, levels),
        alive=shape(bool, r, g),
        reward=shape(np.float32, r, g),
        first=shape(bool, r, g),
    )


def described_mesh(card: str) -> Mesh:
    """A mesh of one card that is only described."""
    target = CARD.format(memory=MEMORY[card], name=card)
    devices = topologies.get_topology_desc(
        card, "cuda", target_config=target, topology="1x1x1"
    ).devices
    return Mesh(
        np.reshape(devices, (1,) * len(AXES)), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def at_the_peak(text: str) -> list[tuple[int, str]]:
    """Bytes and names of what lives at the peak, from XLA's dump of live ranges."""
    section = text.split("(peak):", 1)[1].split("breakdown", 1)[0]
    return [(int(size), name) for name, size in re.findall(r"^ +(\S+): (\d+) bytes", section, re.M)]


def main(config: PlanConfig) -> None:
    """Compile, and print what the compiler says."""
    spec = large_spec(
        items=config.items, authors=config.authors, tags=500, codebook_size=config.codebook_size
    )
    with tempfile.TemporaryDirectory() as folder:
        dump = f"--xla_dump_to={folder} --xla_dump_hlo_as_text"
        dump += " --xla_dump_hlo_module_re=.*policy_step.*"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS} {dump}"
        mesh = described_mesh(config.card)
        # "auto" of attention and compute type is to mean what it means on that card.
        with mock.patch.object(jax, "default_backend", return_value="gpu"):
            trainer = make_trainer(config, spec, mesh, random_users(config.model, spec, 1))
            step = trainer.step.lower(trainer.abstract_state, shapes_of(config, spec)).compile()
        (ranges,) = pathlib.Path(folder).glob("*live-range.txt")
        living = at_the_peak(ranges.read_text())
    for size, name in living[: config.largest]:
        print(f"{size / 2**30:8.2f} GiB  {name}")
    plan = step.memory_analysis()
    state, rest = plan.argument_size_in_bytes / 2**30, plan.temp_size_in_bytes / 2**30
    print(
        f"{config.preset} on one {config.card}, {config.users} users x {config.rollout.group} "
        f"items in {config.rollout.parts} parts: state and batch {state:.1f} GiB, temporaries "
        f"{rest:.1f}, together {state + rest:.1f}; estimated "
        f"{needed_memory(config, spec).total / 2**30:.1f}"
    )


if __name__ == "__main__":
    results.run_with_preset(main, PlanConfig, prog="python -m benchmarks.plan")
