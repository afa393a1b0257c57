"""Peaks of known chips, and where a traced step spends its time."""

import pathlib
import re
from typing import NamedTuple

import jax

BF16_PEAK = {
    # Dense, from the data sheets.
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""bf16 FLOP/s of one chip, by a part of `device_kind`; the first that fits counts."""


def peak_flops(device) -> float | None:
    """Dense bf16 peak of a device, FLOP/s; None for one that is not in the table."""
    return next((peak for name, peak in BF16_PEAK.items() if name in device.device_kind), None)


ONE_BY_ONE = "--xla_gpu_enable_command_buffer="
"""XLA flag: kernels are launched one by one, so that a trace knows which operation each is of."""


class Kernel(NamedTuple):
    """What one operation of a compiled step costs on the first GPU."""

    milliseconds: float  # a step
    operation: str  # of the compiled program
    kernel: str
    source: str  # op_name: the path of modules, and the JAX primitive
    result: str  # types and shapes


PARTS = {
    "unnamed": r"^$",
    "optimizer": r"^(?!.*OneRec)",
    "feature lookups": r"encoder/(features|static_features)|decoder_input",
    "pathway MLPs": r"encoder/(static|short|positive|lifelong)/",
    "lifelong QFormer": r"encoder/qformer",
    "encoder": r"encoder",
    "experts": r"experts",
    "decoder": r"decoder",
    "heads and loss": r"",
}
"""Parts of a step by a pattern in `source`; the first that fits counts."""


def kernels(folder: pathlib.Path, program: str, *, steps: int) -> list[Kernel]:
    """Operations of a traced step on the first GPU, the longest first.

    Args:
      folder: of `jax.profiler.trace`; the newest trace in it counts.
      program: text of the compiled step, `compiled.as_text()`; compiled under `ONE_BY_ONE`.
      steps: that the trace holds.
    """
    path = max(pathlib.Path(folder).rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    planes = jax.profiler.ProfileData.from_file(str(path)).planes
    plane = next((p for p in planes if "/device:GPU" in p.name), None)
    total: dict[tuple[str, str], float] = {}
    for line in plane.lines if plane is not None else ():
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            key = str(dict(event.stats).get("hlo_op", "")), event.name
            total[key] = total.get(key, 0) + event.duration_ns / 1e6 / steps
    defined = {
        match["name"]: (match["result"], match["source"] or "")
        for match in re.finditer(
            r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<result>\(.*?\)|\S+) [\w-]+\("
            r'.*?(?:op_name="(?P<source>[^"]*)".*)?$',
            program,
            re.MULTILINE,
        )
    }
    found = []
    for (operation, kernel), milliseconds in total.items():
        if operation not in defined:  # a kernel of a fusion is named after it
            operation = re.sub(r"_(\d+)$", r".\1", kernel)
        result, source = defined.get(operation, ("", ""))
        found.append(Kernel(milliseconds, operation, kernel, source, result))
    return sorted(found, reverse=True)


def by_part(found: list[Kernel]) -> dict[str, float]:
    """Milliseconds a step of each of PARTS."""
    total = dict.fromkeys(PARTS, 0.0)
    for kernel in found:
        part = next(p for p, pattern in PARTS.items() if re.search(pattern, kernel.source))
        total[part] += kernel.milliseconds
    return total
