"""Around the joint step: who is asked, what is drawn, what it is worth, what is kept of it.

A step draws on the device, finds items and scores them from the host, and updates on the device;
the report gives drawing and scoring to services of their own. Drawing may be other processes' here
(posttraining/queue.py).

Axes: R users with rollouts, G items of a group, S levels.
"""

import contextlib
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable, Iterator, Mapping

import jax
import numpy as np
import polars as pl

from onerec_jax.data.examples import Examples
from onerec_jax.data.pipeline import TrainStream
from onerec_jax.files import write_parquet
from onerec_jax.generation.rollout import (
    Rollout,
    RolloutConfig,
    find_items,
    first_of_each,
    rollout,
)
from onerec_jax.generation.trie import build_trie
from onerec_jax.inputs import Batch
from onerec_jax.posttraining.step import PolicyBatch
from onerec_jax.rewards.advantage import check_rewards
from onerec_jax.rewards.format import legal_prefixes
from onerec_jax.rewards.objective import weighted_score
from onerec_jax.run import Run
from onerec_jax.sharding import on_mesh, put_batch
from onerec_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True, eq=False)
class PolicyStream:
    """The stream of supervised fine-tuning, whose first users of each batch get rollouts.

    Batches are shuffled, so that these are a random share of the stream.
    """

    stream: TrainStream
    users: int
    """R."""
    kind: type = PolicyBatch
    """What is yielded; it has `sft`, `rl`, `user` and `position`."""

    @functools.cached_property
    def _numbers(self):
        # Of its own: an epoch that begins ahead would be drawn again and again beside the present.
        return self.stream.assembler().batches

    def asked(self, step: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Who gets rollouts in a step: user rows and positions, int32 `[R]`, and the slots of
        their lifelong pathway; without assembling a batch."""
        index, slots = self._numbers(step)
        examples = self.stream.examples[index[: self.users]]
        return examples.user, examples.position, int(slots)

    def __call__(self, step: int = 0) -> Iterator:
        examples, numbers = self.stream.examples, self.stream.assembler().batches
        with contextlib.closing(self.stream(step)) as batches:
            for number in itertools.count(step):
                sft, index = next(batches), numbers(number)[0][: self.users]
                yield self.kind(
                    sft,
                    jax.tree.map(lambda x: x[: self.users], sft),
                    examples.user[index],
                    examples.position[index],
                )


@dataclasses.dataclass(frozen=True, eq=False)
class Rewarder:
    """Items and rewards of what was drawn."""

    run: Run
    score: Callable[[Examples, np.ndarray], dict[str, np.ndarray]]
    """As `reward_run.Scorer`."""
    weights: Mapping[str, float]
    """What is rewarded, as of `parse_objective`."""
    flagged: np.ndarray | None = None
    """Bool `[I]`, items of the industrial reward."""

    @functools.cached_property
    def _by_leaf(self):
        return self.run.ids.items_by_leaf(self.run.tie_order)

    def __call__(self, user, position, drawn) -> tuple[np.ndarray, dict, dict]:
        """Judges a `Rollout` of NumPy arrays.

        Returns:
          Item rows int32 `[R, G]`, -1 for none; what `PolicyBatch` has of them, NumPy; and metrics:
          `reward` (mean of the items that count, NaN without any), `best_reward` (mean over groups
          of the best), `legality` `[S]` (of all that is drawn, repetitions included) and `distinct`
          (share of the legal that count).

        Raises:
          InputError: a reward is no number.
        """
        item = find_items(drawn.sid, drawn.alive, self.run.ids, *self._by_leaf)
        first = first_of_each(item)
        reward = weighted_score(self.score(Examples(user, position), item), self.weights)
        check_rewards(reward, item, self.run.dataset.items["item_id"])
        legal = legal_prefixes(drawn.sid, self.run.ids)[drawn.alive]
        some = first.any(1)
        best = np.where(first, reward, -np.inf).max(1)[some]
        found = {
            "reward": reward[first].mean() if some.any() else np.nan,
            "best_reward": best.mean() if some.any() else np.nan,
            "legality": legal.mean(0),
            "distinct": first.sum() / max((item >= 0).sum(), 1),
        }
        parts = {"reward": np.where(first, reward, 0).astype(np.float32), "first": first}
        if self.flagged is not None:
            parts["flagged"] = self.flagged[np.maximum(item, 0)] & first
        return item, parts, found


@dataclasses.dataclass(frozen=True, eq=False)
class RolloutFiles:
    """Every so many steps a Parquet file of all that was drawn, to be looked through."""

    folder: pathlib.Path
    every: int
    run: Run

    def __call__(self, step: int, batch: PolicyBatch, drawn, item, parts) -> None:
        """One row an item drawn: step, user_id, position, place in the group, semantic_id, logp
        (summed over codes), item_id (null: none has the ID), reward, and whether it counts."""
        if not self.every or step % self.every:
            return
        users, group = item.shape
        ids, names = self.run.dataset.items["item_id"], self.run.dataset.users["user_id"]
        legal = item.ravel() >= 0
        rows = pl.Series(np.repeat(np.asarray(batch.user), group))
        frame = pl.DataFrame(
            {
                "step": np.full(item.size, step),
                "user_id": names.gather(rows),
                "position": np.repeat(np.asarray(batch.position), group),
                "place": np.tile(np.arange(group), users),
                "semantic_id": drawn.sid.reshape(item.size, -1).tolist(),
                "logp": drawn.logp.sum(-1).ravel(),
                "item_id": ids.gather(pl.Series(np.maximum(item.ravel(), 0))),
                "reward": parts["reward"].ravel(),
                "counts": parts["first"].ravel(),
            }
        ).filter(drawn.alive.ravel())
        known = pl.Series(legal[drawn.alive.ravel()])
        frame = frame.with_columns(
            pl.when(known).then(pl.col("item_id")),
            pl.when(pl.col("counts")).then(pl.col("reward")),
        )
        write_parquet(self.folder / f"step-{step:07}.parquet", frame)


def make_draw(run: Run, cfg: RolloutConfig, mesh, seed: int):
    """The compiled (step, variables, batch of R users, user rows `[R]`) -> `Rollout`.

    Draws are a function of (seed, step, user) and the variables, whichever process makes them.
    """
    model = run.model()
    trie = build_trie(run.ids.leaf_sids, run.ids.codebook_size) if cfg.masked else None

    def draw(step, variables, batch: Batch, user):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), 2)
        keys = jax.vmap(lambda user: jax.random.fold_in(key, user))(user)
        return rollout(model, variables, batch, keys, cfg=cfg, trie=trie)

    return jax.jit(on_mesh(draw, mesh))


class PolicyTrainer:
    """What `training.loop.fit` turns: draw, judge, update.

    Draws are a function of (seed, step, user), so that a resumed run draws what it had drawn.
    """

    def __init__(
        self,
        trainer: Trainer,
        start: Callable[[dict], TrainState],
        run: Run,
        rewarder: Rewarder,
        cfg: RolloutConfig,
        *,
        seed: int,
        record: Callable[..., None],
        queued: Callable[[int, dict], tuple[Rollout, dict]] | None = None,
    ):
        """`start` loads the variables to begin from, given abstract ones; `record` as
        `RolloutFiles`; `queued` as `QueuedDraws`, in place of drawing here."""
        self.mesh, self.abstract_state = trainer.mesh, trainer.abstract_state
        self.rewarder, self.record, self._start = rewarder, record, start
        self.update, self._init = trainer.step, trainer.init_from
        self.draw, self.queued = make_draw(run, cfg, self.mesh, seed), queued
        self._step: int | None = None

    def init(self, seed: int) -> TrainState:
        """The pretrained policy, its own sampler, with an optimizer that has seen nothing."""
        del seed
        return self._init(self._start(self.abstract_state.variables))

    def step(self, state: TrainState, batch: PolicyBatch) -> tuple[TrainState, dict]:
        """As `policy_step`, with the metrics of `Rewarder`."""
        drawn_here, drawn, user, position, step, about = self._draw(state, batch)
        item, parts, found = self.rewarder(user, position, drawn)
        self.record(step + 1, batch, drawn, item, parts)
        batch = batch.replace(
            sid=drawn_here.sid,
            logp=drawn_here.logp,
            alive=drawn_here.alive,
            **put_batch(parts, self.mesh),
        )
        state, metrics = self.update(state, batch)
        self._step = step + 1
        return state, metrics | found | about

    def _draw(self, state: TrainState, batch: PolicyBatch):
        """The rollouts on the devices and here, users and positions, the step, and metrics."""
        if self.queued is None:
            drawn_here = self.draw(state.step, state.sampler, batch.rl, batch.user)
            drawn, user, position, step = jax.device_get(
                (drawn_here, batch.user, batch.position, state.step)
            )
            return drawn_here, drawn, user, position, int(step), {}
        # Counted here: asking the state would wait for the update that is still being computed.
        step = int(state.step) if self._step is None else self._step
        drawn, about = self.queued(step, state.sampler)
        user, position = jax.device_get((batch.user, batch.position))
        return put_batch(drawn, self.mesh), drawn, user, position, step, about
