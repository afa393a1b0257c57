"""How the study of sessions makes an arm's lists and judges them.

Every test user asks once, at the first action of the test part. A model answers with W lists of m
unseen items. Session-wise: the W best of a beam search over whole lists. Point-wise and SASRec: the
m best items, and W - 1 lists drawn from the same candidates item by item, by the model's own
probabilities (`drawn_lists`); the noise is the same for all models. The first list is what would be
shown; mean and maximum are over all W, as in OneRec V0 (arXiv 2502.18965), Table 1, which does not
say how its point-wise models come to several answers.

Axes: U test users, W lists of each, m items, C candidates.
"""

import dataclasses

import jax
import numpy as np

from experiments.evaluate import seen_items
from onerec_jax.data.examples import Examples, target_examples
from onerec_jax.data.features import positive_actions
from onerec_jax.data.schema import Dataset
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.response import World
from onerec_jax.errors import require_at_least
from onerec_jax.evaluation.closed_loop import play
from onerec_jax.evaluation.ranking import tie_order
from onerec_jax.evaluation.sasrec import default_config, fit_sasrec
from onerec_jax.evaluation.session_lists import expected_in_order, mean_and_max
from onerec_jax.generation.generator import Generator
from onerec_jax.generation.selection import diversity
from onerec_jax.generation.session_generator import drawn_lists, item_candidates, session_lists
from onerec_jax.policies import RunPolicy, SessionPolicy
from onerec_jax.run import Run
from onerec_jax.session_reward_run import SessionRewardRun

HOW = ("first", "mean", "max")
"""Of a user's lists."""


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """How every arm is judged."""

    lists: int = 16
    """Lists W of each user."""
    beam_width: int = 128
    """Lists that session beams hold; items that point-wise lists are made of."""
    at_most: int = 1
    """Items of a list that may share the first code, by the rule of diversity."""
    batch_size: int = 64
    """Users at once."""
    sasrec_epochs: int = 0
    """Most epochs of SASRec; 0: its own default."""
    days: float = 3.0
    """Of each user in a closed loop with the platform (experiments.ab), of the arms that are runs
    without a rule; 0: none."""
    room: int = 300
    """Most exposures of a user there."""

    def __post_init__(self):
        require_at_least(
            self, "judge.", lists=2, beam_width=2, at_most=1, batch_size=1, sasrec_epochs=0,
            days=0, room=1,
        )  # fmt: skip


def requests_of(dataset: Dataset) -> Examples:
    """The request of every test user: the first action of the test part, whatever it was."""
    return target_examples(make_split(dataset).test_at)


def run_lists(
    run: Run,
    generator: Generator,
    test: Examples,
    items: int,
    cfg: JudgeConfig,
    *,
    seed: int,
    diverse: bool = False,
) -> np.ndarray:
    """Lists of a run, int32 `[U, W, m]`, -1 = none.

    Args:
      generator: of the run, of `cfg.beam_width`.
      items: m, that of the run if it generates lists.
      seed: of the draws of point-wise lists.
      diverse: of point-wise lists: no more than `cfg.at_most` items of one first code.
    """
    seen, variables = seen_items(run, test), run.load_best()
    if run.session_rule is not None:
        return session_lists(
            generator, variables, run.builder, test, width=cfg.beam_width, n=cfg.lists, seen=seen
        ).items
    item_uc, logp_uc = item_candidates(generator, variables, run.builder, test, seen=seen)
    return drawn_lists(
        item_uc, logp_uc, test.user, run.ids.sids, number=cfg.lists, items=items,
        at_most=cfg.at_most if diverse else 0, seed=seed,
    )  # fmt: skip


def sasrec_lists(
    run: Run, test: Examples, items: int, cfg: JudgeConfig, *, seed: int
) -> np.ndarray:
    """Lists of SASRec, trained on the positive actions that the point-wise `run` predicts.

    Its candidates are the unseen items of the highest scores, as many as the run has beams; its
    probabilities the softmax of the scores, as in its training.
    """
    data, positive = run.dataset, positive_actions(run.dataset, run.spec.positive)
    split = make_split(data, positive)
    before = np.append(0, np.cumsum(positive))

    def count(position):
        """Positive actions of each user before a position."""
        return before[data.offsets[:-1] + position] - before[data.offsets[:-1]]

    offsets, rows = before[data.offsets], data.item_rows[positive]
    valid_at = np.where(split.valid_at >= 0, count(np.maximum(split.valid_at, 0)), -1)
    train_end = count(split.train_end).astype(np.int32)
    changes = {"max_epochs": cfg.sasrec_epochs} if cfg.sasrec_epochs else {}
    config = default_config(train_end, seed=seed, **changes)
    found = fit_sasrec(
        offsets, rows, train_end, valid_at.astype(np.int32), data.num_items, config,
        on_epoch=lambda epoch: print(epoch),
    )  # fmt: skip
    first = offsets[test.user]
    liked = before[data.offsets[test.user] + test.position] - first
    histories = [rows[a : a + n] for a, n in zip(first, liked, strict=True)]
    order = tie_order(np.bincount(rows[_within(offsets, train_end)], minlength=data.num_items))
    item_uc, logp_uc = [], []
    for start in range(0, len(test), cfg.batch_size):
        part = slice(start, start + cfg.batch_size)
        score = np.array(jax.nn.log_softmax(found.score(histories[part]), axis=-1))
        for row, known in zip(score, seen_items(run, test[part]), strict=True):
            row[known] = -np.inf
            best = np.lexsort((order, -row))[: cfg.beam_width]
            item_uc.append(np.where(np.isfinite(row[best]), best, -1))
            logp_uc.append(row[best])
    return drawn_lists(
        np.array(item_uc), np.array(logp_uc), test.user, run.ids.sids,
        number=cfg.lists, items=items, seed=seed,
    )  # fmt: skip


def _within(offsets: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Which actions lie before each user's `end`, bool `[N]`."""
    length = np.diff(offsets)
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1], length)
    return place < np.repeat(end, length)


def judged(
    lists_uwm: np.ndarray,
    test: Examples,
    reward: SessionRewardRun,
    judge: SessionRewardRun,
    cfg: JudgeConfig,
) -> dict[str, np.ndarray]:
    """All that is measured of an arm's lists for every test user, float64 `[U]` by name.

    `X by the platform, HOW`: `expected_in_order`, of the whole list. `X by the judge, HOW`, its
    heads and its reward; `reward by the reward, HOW`: of the model that the arms are aligned with.
    `first codes`: different first codes in the first list. `different items`: in all W lists, as a
    share of their places.
    """
    scores = {
        f"{name} by the platform": value
        for name, value in expected_in_order(judge.dataset, test, lists_uwm).items()
    }
    scorers = {"judge": judge, "reward": reward}
    for who, model in scorers.items():
        found = model.scorer(users=cfg.batch_size)(test, lists_uwm)
        named = found if who == "judge" else ("reward",)
        scores |= {f"{name} by the {who}": found[name] for name in named}
    values = {}
    for name, score_uw in scores.items():
        mean, most = mean_and_max(score_uw)
        for how, value in zip(HOW, (score_uw[:, 0].astype(float), mean, most), strict=True):
            values[f"{name}, {how}"] = value
    values["first codes"] = diversity(lists_uwm[:, 0], judge.ids.sids)[:, 0].astype(float)
    places = lists_uwm.shape[1] * lists_uwm.shape[2]
    values["different items"] = np.array(
        [len(np.unique(x[x >= 0])) / places for x in lists_uwm], float
    )
    return values


def played(run: Run, generator: Generator, items: int, cfg: JudgeConfig) -> dict[str, np.ndarray]:
    """`loop METRIC` of `closed_loop.METRICS` with slates of m items, float64 `[all users]`."""
    if run.session_rule is None:
        policy = RunPolicy(run, generator, list_length=items)
    else:
        policy = SessionPolicy(run, generator)
    flagged = run.dataset.items["viral_farm"].fill_null(0).to_numpy().astype(float)
    found = play(
        policy,
        World.from_meta(run.dataset.meta),
        run.dataset,
        days=cfg.days,
        room=cfg.room,
        flagged=flagged,
    )
    return {f"loop {name}": value for name, value in found.items()}
