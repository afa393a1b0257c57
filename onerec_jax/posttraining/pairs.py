"""Around the step of alignment: what M_t proposes, which two of it make a pair, what is kept of it.

OneRec V0 (arXiv 2502.18965), Algorithm 2: of N sessions by beam search of M_t the one of the
highest reward is chosen, the one of the lowest rejected ("self-hard": both are what the model
itself finds likely).

Axes: R users with pairs, W sessions drawn of each, P = 1 + K of them in a pair, m items, L levels.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import numpy as np
import polars as pl

from onerec_jax.data.examples import Examples
from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import write_parquet
from onerec_jax.generation.rollout import find_items
from onerec_jax.generation.session_beam import SessionBeams, session_beam_search
from onerec_jax.generation.trie import build_trie
from onerec_jax.posttraining.preference_step import PairBatch
from onerec_jax.rewards.format import legal_prefixes
from onerec_jax.run import Run
from onerec_jax.sharding import on_mesh, put_batch
from onerec_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """What M_t proposes to a user, and what of it makes a pair."""

    width: int = 128
    """Sessions N of a user, by beam search; the paper's value."""
    masked: bool = True
    """Search IDs that exist only. Otherwise sessions with an ID that is no item are left aside:
    they have no reward."""
    min_difference: float = 1e-3
    """Least difference of reward (1 is a deviation of a head) between chosen and rejected."""

    def __post_init__(self):
        if self.width < 2:
            raise InputError(
                f"--beams.width {self.width}: a pair takes 2 sessions a user or more to compare"
            )
        require_at_least(self, "beams.", min_difference=0)


def best_and_worst(reward_rw, rejected: int = 1, min_difference: float = 0.0):
    """The session of the highest reward, and those of the lowest.

    Equal rewards: the more probable session is chosen, the less probable rejected.

    Args:
      reward_rw: float `[R, W]`, the most probable session first; NaN: cannot be judged.
      rejected: K.
      min_difference: what the chosen one must be above each rejected one, and more than nothing.

    Returns:
      Places int64 `[R, 1 + K]`, the chosen one first, then from the lowest reward on; and bool
      `[R]`, whether there are so many sessions that differ. Places of others are 0.
    """
    reward_rw = np.asarray(reward_rw, np.float64)
    users, width = reward_rw.shape
    if width <= rejected:
        return np.zeros((users, 1 + rejected), np.int64), np.zeros(users, bool)
    known = np.isfinite(reward_rw)
    best = np.argmax(np.where(known, reward_rw, -np.inf), axis=1)
    # From the back: of equal rewards the last comes first.
    turned = np.where(known, reward_rw, np.inf)[:, ::-1]
    worst = width - 1 - np.argsort(turned, axis=1, kind="stable")[:, :rejected]
    top = np.take_along_axis(reward_rw, best[:, None], axis=1)
    low = np.take_along_axis(reward_rw, worst, axis=1)
    valid = ((top - low > 0) & (top - low >= min_difference)).all(1)  # NaN is neither
    places = np.concatenate([best[:, None], worst], axis=1)
    return np.where(valid[:, None], places, 0), valid


@dataclasses.dataclass(frozen=True, eq=False)
class PairMaker:
    """Items, rewards and pairs of what was drawn."""

    run: Run
    score: Callable[[Examples, np.ndarray], dict[str, np.ndarray]]
    """As `session_reward_run.SessionScorer`."""
    rejected: int = 1
    min_difference: float = 0.0

    @functools.cached_property
    def _by_leaf(self):
        return self.run.ids.items_by_leaf(self.run.tie_order)

    def items(self, drawn: SessionBeams) -> np.ndarray:
        """The item that serving lists first of each ID, int32 `[R, W, m]`; -1: none has it."""
        alive = np.isfinite(drawn.logp)[..., None]
        return find_items(np.maximum(drawn.sid, 0), alive, self.run.ids, *self._by_leaf)

    def __call__(self, user, position, drawn: SessionBeams):
        """Judges `SessionBeams` of NumPy arrays.

        Returns:
          Rewards float32 `[R, W]` and places int64 `[R, P]`, as `best_and_worst`; what `PairBatch`
          has of them, NumPy; and metrics: `reward` (mean over judged sessions), `best_reward`,
          `worst_reward` (means over users of the extremes of all that were judged), `legality`
          `[L]`, `skipped` (users without a pair), NaN where there is nothing to say.

        Raises:
          InputError: the reward of a list of items is no number.
        """
        alive = np.isfinite(drawn.logp)
        sid, item = np.maximum(drawn.sid, 0), self.items(drawn)
        reward = self.score(Examples(user, position), item)["reward"]
        bad = ~np.isfinite(reward) & (item >= 0).all(-1)
        if bad.any():
            raise InputError(
                f"the rewards of {bad.sum()} of {bad.size} proposed lists are no numbers: look at "
                "the reward run's metrics.jsonl and train it again"
            )
        places, valid = best_and_worst(reward, self.rejected, self.min_difference)
        pairs = np.take_along_axis(sid, places[..., None, None], axis=1)
        known = np.isfinite(reward)
        some = known.any(1)
        flat = sid.reshape(len(sid), -1, sid.shape[-1])
        counted = np.repeat(alive, sid.shape[2], axis=1)
        found = {
            "reward": _mean(reward[known]),
            "best_reward": _mean(np.where(known, reward, -np.inf).max(1)[some]),
            "worst_reward": _mean(np.where(known, reward, np.inf).min(1)[some]),
            "legality": legal_prefixes(flat, self.run.ids)[counted].mean(0),
            "skipped": float((~valid).sum()),
        }
        return reward, places, {"sid": pairs.astype(np.int32), "valid": valid}, found


def _mean(values) -> float:
    return float(np.mean(values)) if len(values) else float("nan")


@dataclasses.dataclass(frozen=True, eq=False)
class PairFiles:
    """Every so many steps a Parquet file of all that was drawn, to be looked through."""

    folder: pathlib.Path
    every: int
    maker: PairMaker

    def __call__(self, step: int, batch: PairBatch, drawn: SessionBeams, reward, places, valid):
        """One row a session: step, user_id, position, place among the beams, semantic_ids, item_ids
        (null: none has the ID), logp, reward (null: could not be judged), and its part in the pair:
        chosen, rejected or null."""
        if not self.every or step % self.every:
            return
        run, (users, width) = self.maker.run, reward.shape
        part = np.full((users, width), None, object)
        for row in np.flatnonzero(valid):
            part[row, places[row, 0]], part[row, places[row, 1:]] = "chosen", "rejected"
        names, ids = run.dataset.users["user_id"], run.dataset.items["item_id"].to_list()
        alive = np.isfinite(drawn.logp).ravel()
        sid = drawn.sid.reshape(users * width, *drawn.sid.shape[2:])
        item = self.maker.items(drawn).reshape(users * width, -1)
        frame = pl.DataFrame(
            {
                "step": np.full(users * width, step),
                "user_id": names.gather(pl.Series(np.repeat(np.asarray(batch.user), width))),
                "position": np.repeat(np.asarray(batch.position), width),
                "place": np.tile(np.arange(width), users),
                "semantic_ids": sid.tolist(),
                "item_ids": [[None if i < 0 else ids[i] for i in row] for row in item],
                "logp": drawn.logp.ravel(),
                "reward": pl.Series(reward.ravel(), nan_to_null=True),
                "pair": pl.Series(part.ravel().tolist(), dtype=pl.String),
            }
        ).filter(alive)
        write_parquet(self.folder / f"step-{step:07}.parquet", frame)


class AlignmentTrainer:
    """What `training.loop.fit` turns: draw, judge, update.

    Draws are a function of the state alone, so that a resumed run draws what it had drawn.
    """

    def __init__(
        self,
        trainer: Trainer,
        start: Callable[[dict], TrainState],
        run: Run,
        maker: PairMaker,
        cfg: BeamConfig,
        *,
        record: Callable[..., None],
    ):
        """`start` loads the variables to begin from, given abstract ones; `record` as
        `PairFiles`."""
        self.mesh, self.abstract_state = trainer.mesh, trainer.abstract_state
        self.maker, self.record, self._start = maker, record, start
        self._update, self._init = trainer.step, trainer.init_from
        trie = build_trie(run.ids.leaf_sids, run.ids.codebook_size) if cfg.masked else None
        model = run.model()

        def draw(variables, batch):
            return session_beam_search(model, variables, batch, width=cfg.width, trie=trie)

        self._draw = jax.jit(on_mesh(draw, self.mesh))

    def init(self, seed: int) -> TrainState:
        """The pretrained policy, its own sampler, with an optimizer that has seen nothing."""
        del seed
        return self._init(self._start(self.abstract_state.variables))

    def step(self, state: TrainState, batch: PairBatch) -> tuple[TrainState, dict]:
        """As `alignment_step`, with the metrics of `PairMaker`."""
        drawn, user, position, step = jax.device_get(
            (self._draw(state.sampler, batch.rl), batch.user, batch.position, state.step)
        )
        reward, places, parts, found = self.maker(user, position, drawn)
        self.record(int(step) + 1, batch, drawn, reward, places, parts["valid"])
        batch = batch.replace(**put_batch(parts, self.mesh))
        state, metrics = self._update(state, batch)
        return state, metrics | found
