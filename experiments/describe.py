"""What `python -m experiments.pretrain --describe` prints: sizes, FLOPs and memory of a model."""

import dataclasses

import jax
import rich.console
import rich.table

from onerec_jax.config import ModelConfig
from onerec_jax.models.onerec import OneRec
from onerec_jax.sharding import MeshConfig
from onerec_jax.tokenizer.config import TokenizerConfig
from onerec_jax.training.flops import (
    VOCABULARIES,
    abstract_batch,
    count_parameters,
    forward_flops,
    nominal_spec,
)
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.memory import step_memory
from onerec_jax.training.optimizer import OptimizerConfig, make_optimizer


def describe_model(
    name: str,
    model: ModelConfig,
    tokenizer: TokenizerConfig,
    train: LoopConfig,
    optimizer: OptimizerConfig,
    mesh: MeshConfig,
    *,
    targets: int,
) -> None:
    """Prints parameters and FLOPs by part, and memory a device; allocates nothing.

    Args:
      name: of the preset, for the title.
      targets: of a user.
    """
    spec = nominal_spec(tokenizer)
    init, batch = OneRec(model, spec).init, abstract_batch(model, spec)
    parameters = count_parameters(jax.eval_shape(init, jax.random.key(0), batch)["params"])
    flops = forward_flops(model, spec, targets)
    named = sum(size for part, size in parameters.items() if part not in VOCABULARIES)
    table = rich.table.Table(
        title=f"{name}: {named:,} parameters and {sum(parameters.values()) - named:,} of "
        f"vocabularies, {3 * sum(flops.values()) / 1e9:,.3f} GFLOP a user in training"
    )
    for column in ("part", "parameters", "forward MFLOP a user"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for part in sorted(parameters | flops):
        count, work = parameters.get(part), flops.get(part)
        table.add_row(
            part,
            "" if count is None else f"{count:,}",
            "" if work is None else f"{work / 1e6:,.2f}",
        )
    memory = step_memory(
        model,
        spec,
        make_optimizer(optimizer, train.steps),
        mesh,
        users=train.batch_size,
        targets=targets,
        accumulate=train.accumulate,
    )
    sizes = rich.table.Table("GiB a device", "", title="memory of a training step")
    for part in ("parameters", "optimizer", "gradients", "activations", "total"):
        sizes.add_row(part, f"{getattr(memory, part) / 2**30:,.2f}")
    console = rich.console.Console(soft_wrap=True)
    console.print(table)
    console.print(sizes)
    axes = dataclasses.asdict(mesh) | {"data": mesh.data or 1}
    print(
        f"{spec.levels} x {spec.codebook_size} codes, full histories with all seven interaction "
        "features; embedding tables of a data set (items, authors, tags, users) apart. Memory for "
        f"{train.batch_size} users a step over mesh "
        f"{' x '.join(f'{k} {v}' for k, v in axes.items())}; activations are an estimate."
    )
