"""What an A/B test plays: a run's beams or lists, a reward's choice, a cascade, an oracle.

Each is a `Policy` of a world's loop: (users, log, request) -> item rows. Those that could be served
count their FLOPs (docs/posttrain.md).

Axes: B users of a request, n places of a list.
"""

import collections
from collections.abc import Sequence

import numpy as np

from onerec_jax.data.examples import Examples
from onerec_jax.data.world.growing import GrowingActions
from onerec_jax.data.world.loop import Log, Policy, Request
from onerec_jax.data.world.response import World, satisfaction
from onerec_jax.evaluation.cascade import SwingRecall, unlisted
from onerec_jax.generation.generator import Generator, compute_copy, drop_seen, expand_leaves
from onerec_jax.generation.selection import select
from onerec_jax.generation.session_generator import items_of_leaves
from onerec_jax.reward_run import RewardRun
from onerec_jax.run import Run
from onerec_jax.sharding import put_batch
from onerec_jax.training.flops import generation_flops
from onerec_jax.training.reward_flops import score_flops

FEW = 8
"""Users of the smaller of the two programs of a model: most rounds of a loop ask a few users."""


def batches(users: int, most: int):
    """Parts of so many users, each with its rows filled up to one of two sizes.

    Yields:
      `(part, full)`: the users' numbers int `[b]`, and the same, repeated, `[FEW]` or `[most]`.
    """
    for start in range(0, users, most):
        part = np.arange(start, min(start + most, users))
        yield part, np.resize(part, FEW if len(part) <= FEW < most else most)


class RunPolicy:
    """The first items of a run's beams. Nothing is shown twice."""

    def __init__(self, run: Run, generator: Generator, *, list_length: int):
        """`generator`: of the run, or of another one that differs in weights only."""
        self.run, self.generator, self.list_length = run, generator, list_length
        self.variables = compute_copy(run.model(), run.load_best())
        self.actions = GrowingActions(run.dataset, run.spec)
        self.flops: collections.Counter = collections.Counter()

    def __call__(self, users: np.ndarray, log: Log, request: Request) -> np.ndarray:
        seen = [log.history(user)["item"] for user in users]
        longest = self.list_length + max(len(items) for items in seen)
        lists = drop_seen(self.items(users, log, request, longest), seen, self.list_length)
        return filled(lists, seen, self.run.popular)

    def items(self, users: np.ndarray, log: Log, request: Request, n: int) -> np.ndarray:
        """Items of the best beams, int32 `[B, n]`, -1 where there are fewer."""
        builder = self.run.builder.over(self.actions(log))
        position, leaves = log.length[users], []
        for part, full in batches(len(users), self.generator.batch_size):
            batch = builder(users[full], position[full], request.time_s[full])
            found = self.generator.search(
                self.variables, put_batch(batch, self.generator.mesh), trie=self.generator.trie
            )
            leaves.append(np.asarray(found.leaf)[: len(part)])
            self._count(batch, len(part))
        return expand_leaves(
            np.concatenate(leaves), self.generator.offsets, self.generator.items, n
        )

    def _count(self, batch, users: int, items: int = 1) -> None:
        names = ("short", "positive", "lifelong")
        lengths = {name: getattr(batch, name).length[:users] for name in names}
        cfg, spec, width = self.run.model_config, self.run.spec, self.generator.beam_width
        parts = generation_flops(cfg, spec, width, lengths, items=items)
        self.flops["generation"] += int(sum(part.sum() for part in parts.values()))


class SessionPolicy(RunPolicy):
    """The most probable list of a run on session lists, as a slate. Nothing is shown twice."""

    def __init__(self, run: Run, generator: Generator):
        """`generator`: as of `RunPolicy`; its beam width is that of lists."""
        super().__init__(run, generator, list_length=run.model_config.session_items)

    def __call__(self, users: np.ndarray, log: Log, request: Request) -> np.ndarray:
        seen = [log.history(user)["item"] for user in users]
        builder, made = self.run.builder.over(self.actions(log)), self.generator
        position, lists = log.length[users], []
        for part, full in batches(len(users), made.batch_size):
            batch = builder(users[full], position[full], request.time_s[full])
            found = made.search_lists(
                self.variables,
                put_batch(batch, made.mesh),
                width=made.beam_width,
                trie=made.trie,
                filter=put_batch(made.filters([seen[u] for u in full]), made.mesh),
            )
            best = np.asarray(found.leaf)[: len(part), :1]
            rows = items_of_leaves(best, made.offsets, made.items, [seen[u] for u in part])
            lists.append(rows[:, 0])
            self._count(batch, len(part), self.list_length)
        return filled(np.concatenate(lists), seen, self.run.popular)


class Ranker:
    """The best of some candidates by the preference score of a reward run."""

    def __init__(self, reward: RewardRun, *, list_length: int, batch_size: int):
        self.reward, self.list_length = reward, list_length
        self.scorer = reward.scorer(users=batch_size)
        self.actions = GrowingActions(reward.dataset, reward.spec)

    def __call__(
        self, lists: np.ndarray, users: np.ndarray, log: Log, request: Request, seen
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lists of unseen candidates, int32 `[B, n]`, and how many were scored of each, `[B]`.

        Args:
          lists: int32 `[B, m]`, -1 = none; of one m, for each compiles.
          seen: item rows to leave out, one array a user.
        """
        few = FEW if len(users) <= FEW < self.scorer.users else self.scorer.users
        scorer = self.scorer.over(self.actions(log), users=few)
        examples = Examples(users.astype(np.int32), log.length[users].astype(np.int32))
        lists = drop_seen(lists, seen, lists.shape[1])
        chosen = select(
            lists,
            examples,
            lambda who, items: scorer(who, items, request.time_s)["p"],
            self.list_length,
        )
        return chosen, (lists >= 0).sum(1)

    def flops(self, history: np.ndarray, items: np.ndarray) -> int:
        """FLOPs of scoring so many items for users with so long histories, int `[B]` each."""
        reward = self.reward
        cfg = reward.model_config
        parts = score_flops(
            cfg,
            reward.spec,
            objectives=len(reward.objectives),
            content=reward.ids.codebooks.shape[-1],
            history=np.minimum(history, cfg.history_length),
            items=items,
        )
        return int(sum(part.sum() for part in parts.values()))


class SelectionPolicy:
    """All items of a run's beams, of which a reward run chooses."""

    def __init__(self, beams: RunPolicy, ranker: Ranker):
        self.beams, self.ranker = beams, ranker
        width, items = beams.generator.beam_width, np.diff(beams.generator.offsets)
        # The most that so many beams may hold, within limits: what is empty is scored, too.
        self.slots = min(2 * width, int(np.sort(items)[-width:].sum()))
        self.scored, self._flops = 0, collections.Counter()

    def __call__(self, users: np.ndarray, log: Log, request: Request) -> np.ndarray:
        seen = [log.history(user)["item"] for user in users]
        lists = self.beams.items(users, log, request, self.slots)
        lists, scored = self.ranker(lists, users, log, request, seen)
        self.scored += int(scored.sum())
        self._flops["scoring"] += self.ranker.flops(log.length[users], scored)
        return filled(lists, seen, self.beams.run.popular)

    @property
    def flops(self) -> collections.Counter:
        return self.beams.flops + self._flops


class CascadePolicy:
    """Recall by Swing from what a user liked lately, ranked by a reward run."""

    def __init__(self, recall: SwingRecall, ranker: Ranker, *, number: int, latest: int):
        """Args:
        number: items that recall hands to the ranking model.
        latest: positive actions that recall starts from.
        """
        self.recall, self.ranker, self.number, self.latest = recall, ranker, number, latest
        self.scored, self.flops = 0, collections.Counter()

    def __call__(self, users: np.ndarray, log: Log, request: Request) -> np.ndarray:
        seen = [log.history(user)["item"] for user in users]
        actions = self.ranker.actions(log)
        known, first = actions.positive_rows, actions.offsets[users]
        ends = np.searchsorted(known, first + log.length[users])
        begins = np.maximum(np.searchsorted(known, first), ends - self.latest)
        liked = [actions.item[known[a:b]] for a, b in zip(begins, ends, strict=True)]
        lists = self.recall(liked, seen, self.number)
        lists, scored = self.ranker(lists, users, log, request, seen)
        self.scored += int(scored.sum())
        self.flops["recall"] += int(self.recall.flops(liked).sum())
        self.flops["scoring"] += self.ranker.flops(log.length[users], scored)
        return filled(lists, seen, self.recall.popular)


def filled(lists: np.ndarray, seen: Sequence[np.ndarray], popular: np.ndarray) -> np.ndarray:
    """Lists whose missing places hold popular items that are neither seen nor listed."""
    lists = lists.copy()
    for row, known in zip(lists, seen, strict=True):
        missing = np.flatnonzero(row < 0)
        if len(missing):
            others = unlisted(popular, np.concatenate([known, row]), len(missing))
            row[missing] = np.resize(others if len(others) else popular, len(missing))
    return lists


def oracle_policy(world: World, n: int) -> Policy:
    """What satisfies most by the world's own expectation, of all items that were not seen."""
    items = np.arange(world.config.items)

    def policy(users, log, request):
        lists = []
        for i, user in enumerate(users):
            situation = (request.session[i], request.slot[i], request.time_s[i])
            worth = satisfaction(world.expected(user, items, *situation))
            fresh = np.where(np.isin(items, log.history(user)["item"]), -np.inf, worth)
            lists.append(np.argsort(-fresh, kind="stable")[:n])
        return np.array(lists, np.int32)

    return policy
