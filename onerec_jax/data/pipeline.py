"""The training stream: a Grain pipeline whose elements are whole batches.

Batch k is a function of (seed, k) alone, so a run resumes at step k by asking for batch k, whatever
the number of worker processes or hosts then and now.
"""

import dataclasses
from collections.abc import Iterator

import jax
import numpy as np

from onerec_jax.data.batches import BatchBuilder
from onerec_jax.data.examples import (
    Examples,
    ShuffledBatches,
    bucket_sizes,
    check_batch_size,
)
from onerec_jax.data.mapped import MappedBatches
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.inputs import Batch


@dataclasses.dataclass(frozen=True)
class PipelineConfig:
    """How training batches are made."""

    targets_per_user: int = 1
    """Targets that share one pass of the encoder: the user's next ones, with the history of the
    first. More targets a second, from histories that are up to so many actions old."""
    length_buckets: bool = True
    """Batch users with lifelong histories of similar length, so that short ones cost little."""
    workers: int = 0
    """Processes that assemble batches, from the log as memory maps; 0: a thread, from memory."""

    def __post_init__(self):
        require_at_least(self, "pipeline.", targets_per_user=1, workers=0)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStream:
    """Endless, shuffled training batches; `stream(step)` iterates from that step on.

    Attributes:
      builder: of the whole log in memory.
      mapped: the same log for worker processes; needed if `config.workers`.
      target_end: int `[U]`, position of each user before which targets lie.
      positive_targets: `examples` are positive actions, further targets too.

    Raises:
      InputError: more examples a batch than there are, or several targets a user where the examples
        name theirs.
    """

    builder: BatchBuilder
    examples: Examples
    config: PipelineConfig
    batch_size: int
    seed: int
    target_end: np.ndarray
    positive_targets: bool = False
    mapped: MappedBatches | None = None

    def __post_init__(self):
        check_batch_size(self.batch_size, self.examples)
        if self.examples.rows is not None and self.config.targets_per_user > 1:
            raise InputError(
                f"--pipeline.targets-per-user {self.config.targets_per_user}: session lists are "
                "targets of their own; leave it out"
            )

    def __call__(self, step: int = 0) -> Iterator[Batch]:
        """Grain iterator over this process's share of batch `step` and all later ones."""
        import grain
        from absl import flags

        assemble = self.assembler()
        dataset = grain.MapDataset.range(step, np.iinfo(np.int32).max).map(assemble)
        stream = dataset.to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 if self.config.workers else 4)
        )
        if self.config.workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain's workers read absl flags
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(self.config.workers, per_worker_buffer_size=2)
            )
        return iter(stream)

    def assembler(self) -> "Assembler":
        """What makes batch k, in this process."""
        processes, process = jax.process_count(), jax.process_index()
        sizes, lengths = (self.builder.cfg.slots("lifelong"),), None
        if self.config.length_buckets:
            sizes = bucket_sizes(sizes[0])
            lengths = self.builder.lifelong_lengths(self.examples)
        examples = self.examples
        batches = ShuffledBatches(len(examples), self.batch_size, self.seed, lengths, sizes)
        share = slice(
            process * self.batch_size // processes, (process + 1) * self.batch_size // processes
        )
        return Assembler(
            self.mapped if self.config.workers else self.builder,
            batches,
            share,
            examples,
            self.target_end,
            self.config.targets_per_user,
            self.positive_targets,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Assembler:
    """Number of a batch to batch; a value that worker processes can be given."""

    source: BatchBuilder | MappedBatches
    batches: ShuffledBatches
    share: slice
    examples: Examples
    target_end: np.ndarray  # int32 [U]
    targets: int
    positive_targets: bool

    def __call__(self, batch: int) -> Batch:
        index, slots = self.batches(batch)
        examples = self.examples[index[self.share]]
        return self.source(
            examples.user,
            examples.position,
            lifelong_slots=slots,
            targets=self.targets,
            target_end=self.target_end[examples.user],
            positive_targets=self.positive_targets,
            rows=examples.rows,
        )
