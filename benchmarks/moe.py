"""One layer of experts, routing included, forward and backward: `python -m benchmarks.moe`.

The router's bias is first moved by loss-free balancing until the load is even, as it is in a
trained model. Useful FLOPs are those of the copies that some expert takes.

    python -m benchmarks.moe --capacity-factors 1.0 1.05 1.25
"""

import dataclasses
import functools
import json
import pathlib
import shlex
import sys
import time
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from onerec_jax import cli
from onerec_jax.errors import require_at_least
from onerec_jax.files import write_text
from onerec_jax.models.moe import MoE, max_violation, update_router_bias
from onerec_jax.training.profile import peak_flops


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
    """Time a mixture-of-experts layer."""

    tokens: int = 32_768
    d_model: int = 1024
    hidden: int = 2816
    experts: int = 24
    experts_per_token: int = 2
    capacity_factors: tuple[float, ...] = (1.0, 1.05, 1.1, 1.25)
    weights: Literal["bfloat16", "float32"] = "bfloat16"
    """float32: the cast of the master weights is part of the time."""
    balancing_steps: int = 300
    steps: int = 20
    out: pathlib.Path = pathlib.Path("runs/benchmarks/moe.json")
    """JSON to write."""

    def __post_init__(self):
        require_at_least(self, "", tokens=1, d_model=1, hidden=1, experts=1, steps=1)


def main(config: BenchmarkConfig) -> None:
    """Balance, measure, print, write."""
    dtype = jnp.bfloat16
    x = jax.random.normal(jax.random.key(1), (4, config.tokens, config.d_model), dtype)
    rows = []
    variables = None
    for factor in config.capacity_factors:
        layer = MoE(
            config.experts, config.experts_per_token, config.hidden, factor, dtype, "sigmoid"
        )
        if variables is None:
            variables = nn.unbox(jax.jit(layer.init)(jax.random.key(0), x[0]))
            cast = jnp.dtype(config.weights)
            params = {
                k: v if k == "router" else v.astype(cast) for k, v in variables["params"].items()
            }
            router = balance(layer, params, variables["router"], x, config.balancing_steps)

        @functools.partial(jax.jit, donate_argnums=())
        def step(params, router, x, layer=layer):
            def loss(params, x):
                y, updated = layer.apply(
                    {"params": params, "router": router}, x, mutable=["router_stats"]
                )
                return (y.astype(jnp.float32) ** 2).sum(), updated["router_stats"]

            return jax.grad(loss, (0, 1), has_aux=True)(params, x)

        _, stats = jax.block_until_ready(step(params, router, x[0]))
        start = time.perf_counter()
        for i in range(config.steps):
            result = step(params, router, x[i % len(x)])
        jax.block_until_ready(result)
        seconds = (time.perf_counter() - start) / config.steps
        dropped = float(stats["dropped"])
        copies = config.tokens * config.experts_per_token * (1 - dropped)
        useful = 3 * 2 * copies * 3 * config.d_model * config.hidden
        rows.append(
            {
                "capacity_factor": factor,
                "milliseconds": 1e3 * seconds,
                "useful_tflops": useful / seconds / 1e12,
                "dropped": dropped,
                "max_violation": float(max_violation(stats["load"])),
            }
        )
        print("  ".join(f"{k} {v:.4g}" for k, v in rows[-1].items()), flush=True)
    device = jax.devices()[0]
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.moe", *sys.argv[1:]]),
        "device": device.device_kind,
        "jax": jax.__version__,
        "peak_flops": peak_flops(device),
        "settings": dataclasses.asdict(config),
        "results": rows,
    }
    config.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.out, json.dumps(record, indent=1, default=str) + "\n")


def balance(layer, params, router, batches, steps: int):
    """The router's bias after so many steps of loss-free balancing, by smaller steps at the end."""

    @jax.jit
    def move(router, x, rate):
        _, updated = layer.apply({"params": params, "router": router}, x, mutable=["router_stats"])
        return update_router_bias(router, updated["router_stats"], rate)

    for i in range(steps):
        router = move(router, batches[i % len(batches)], 1e-2 * 0.01 ** (i / steps))
    return router


if __name__ == "__main__":
    cli.run(main, BenchmarkConfig, prog="python -m benchmarks.moe")
