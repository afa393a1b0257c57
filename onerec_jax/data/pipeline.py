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
from onerec_jax.data.records import RecordBatches
from onerec_jax.errors import require_at_least
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
    """Processes that assemble batches from ArrayRecord files; 0: a thread, from memory."""

    def __post_init__(self):
        require_at_least(self, "pipeline.", targets_per_user=1, workers=0)


@dataclasses.dataclass(frozen=True, eq=False)
class TrainStream:
    """Endless, shuffled training batches; `stream(step)` iterates from that step on.

    Attributes:
      builder: of the whole log in memory.
      records: reads the same log in worker processes; needed if `config.workers`.
      target_end: int `[U]`, position of each user before which targets lie.
      positive_targets: `examples` are positive actions, further targets too.
    """

    builder: BatchBuilder
    examples: Examples
    config: PipelineConfig
    batch_size: int
    seed: int
    target_end: np.ndarray
    positive_targets: bool = False
    records: RecordBatches | None = None

    def __post_init__(self):
        check_batch_size(self.batch_size, self.examples)

    def __call__(self, step: int = 0) -> Iterator[Batch]:
        """Grain iterator over this process's share of batch `step` and all later ones."""
        import grain
        from absl import flags

        assemble = self._assembler()
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

    def _assembler(self) -> "Assembler":
        processes, process = jax.process_count(), jax.process_index()
        sizes, lengths = (self.builder.cfg.slots("lifelong"),), None
        if self.config.length_buckets:
            sizes = bucket_sizes(sizes[0])
            lengths = self.builder.lifelong_lengths(self.examples)
        examples = self.examples
        batches = ShuffledBatches(len(examples), self.batch_size, self.seed, lengths, sizes)
        snapshot = None
        if self.config.workers and self.builder.lives is not None:
            snapshot = self.builder.lives.find(examples.user, examples.position)
        share = slice(
            process * self.batch_size // processes, (process + 1) * self.batch_size // processes
        )
        return Assembler(
            self.records if self.config.workers else self.builder,
            batches,
            share,
            examples.user,
            examples.position,
            self.target_end[examples.user],
            snapshot,
            self.config.targets_per_user,
            self.positive_targets,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Assembler:
    """Number of a batch to batch; a value that worker processes can be given."""

    source: BatchBuilder | RecordBatches
    batches: ShuffledBatches
    share: slice
    user: np.ndarray  # int32 [n]
    position: np.ndarray  # int32 [n]
    target_end: np.ndarray  # int32 [n]
    snapshot: np.ndarray | None  # int64 [n], for records
    targets: int
    positive_targets: bool

    def __call__(self, batch: int) -> Batch:
        index, slots = self.batches(batch)
        index = index[self.share]
        snapshot = {}
        if isinstance(self.source, RecordBatches):
            none = np.full(len(index), -1)
            snapshot["snapshot"] = none if self.snapshot is None else self.snapshot[index]
        return self.source(
            self.user[index],
            self.position[index],
            lifelong_slots=slots,
            targets=self.targets,
            target_end=self.target_end[index],
            positive_targets=self.positive_targets,
            **snapshot,
        )
