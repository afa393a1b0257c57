"""How the studies of post-training judge a run: by the platform's response, first of all.

The platform says what it expects test users to do with the lists they are given. The reward that
was trained on and the judge, which was not, stand beside it: where the reward rises and the
platform does not, the policy has found a hole in the reward.

Axes: U test users, n places of a list, R users with rollouts, G items of a group.
"""

import dataclasses

import jax
import numpy as np

from experiments import posttrain
from experiments.evaluate import seen_items
from experiments.pretrain import validation_examples
from onerec_jax.data.examples import target_examples
from onerec_jax.data.world.response import World
from onerec_jax.errors import require_at_least
from onerec_jax.evaluation.best_of import pass_at
from onerec_jax.evaluation.closed_loop import play
from onerec_jax.evaluation.lists import expected_of_lists, mean_of_lists
from onerec_jax.generation.legality import legality_by_level
from onerec_jax.generation.rollout import rollout
from onerec_jax.policies import RunPolicy
from onerec_jax.posttraining.off_policy import negative_gradients
from onerec_jax.posttraining.trainer import Rewarder
from onerec_jax.reward_run import RewardRun
from onerec_jax.rewards.advantage import group_advantages
from onerec_jax.run import Run
from onerec_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """How every run is judged."""

    list_length: int = 10
    """Items that a user is shown; those of the user's history are left out."""
    beam_width: int = 128
    """Beams that the lists come from."""
    group: int = 128
    """IDs a user, by beam and by sampling, whose legality is measured."""
    batch_size: int = 64
    """Users at once."""
    pass_at: tuple[int, ...] = ()
    """Numbers N of generated items of which the best is taken."""
    days: float = 0.0
    """Of each user in a closed loop with the platform (experiments.ab); 0: none."""
    room: int = 300
    """Most exposures of a user there."""
    flagged: str = "viral_farm"
    """Items whose share is measured: a column of the items table, or a file with an id a line."""
    off_policy_users: int = 0
    """Users whose items, drawn by the start, show what off-policy negatives do; 0: none."""
    off_policy_items: int = 64
    """Most negatives whose gradients are measured one by one."""

    def __post_init__(self):
        require_at_least(
            self, "judge.", list_length=1, beam_width=1, group=1, batch_size=1, days=0, room=1,
            off_policy_users=0, off_policy_items=1,
        )  # fmt: skip


def judged(run: Run, reward: RewardRun, judge: RewardRun, cfg: JudgeConfig) -> dict:
    """All that is measured of a run's best checkpoint for every test user, float64 `[U]` by name.

    `EXPECTED` of the lists; `p, reward` and `p, judge`, means of the lists; `recall@10` and `NTP
    loss` of the log; `flagged`, share in the list; `legality, beam` and `legality, sample`, and
    `…, level L` of their prefixes; with `pass_at`, `days`: what `best_of.pass_at` says, and
    `loop METRIC` of `closed_loop.METRICS`.
    """
    test, mesh = target_examples(run.split.test_at), make_mesh(data=1)
    generator = run.generator(mesh, beam_width=cfg.beam_width, batch_size=cfg.batch_size)
    variables = run.load_best()
    seen = seen_items(run, test)
    found = generator.rank(variables, run.builder, test, n=cfg.list_length, seen=seen)
    values = expected_of_lists(run.dataset, test, found.lists)
    values["recall@10"] = (found.item_ranks < min(10, cfg.list_length)).astype(float)
    values["NTP loss"] = generator.loss(variables, run.builder, test).sum(-1)
    scorers = {"reward": reward, "judge": judge}
    scorers = {name: model.scorer(users=cfg.batch_size) for name, model in scorers.items()}
    for name, scorer in scorers.items():
        values[f"p, {name}"] = mean_of_lists(scorer(test, found.lists)["p"])
    flagged = posttrain.read_flagged(cfg.flagged, run).astype(float)
    of_list = np.where(found.lists >= 0, flagged[np.maximum(found.lists, 0)], np.nan)
    values["flagged"] = mean_of_lists(of_list)
    for method in ("beam", "sample"):
        level = legality_by_level(
            run.model(), variables, run.ids, run.builder, test, mesh,
            method=method, count=cfg.group, batch_size=cfg.batch_size,
        )  # fmt: skip
        values[f"legality, {method}"] = level[:, -1]
        for number in range(level.shape[1] - 1):
            values[f"legality, {method}, level {number + 1}"] = level[:, number]
    if cfg.pass_at:
        n = max(cfg.pass_at)
        wide = generator
        if n > cfg.beam_width:
            wide = run.generator(mesh, beam_width=n, batch_size=cfg.batch_size)
        lists = wide.rank(variables, run.builder, test, n=n, seen=seen).lists
        score = scorers["reward"](test, lists)["p"]
        values |= pass_at(run.dataset, test, lists, score, cfg.pass_at)
    if cfg.days:
        policy = RunPolicy(run, generator, list_length=cfg.list_length)
        world = World.from_meta(run.dataset.meta)
        loop = play(policy, world, run.dataset, days=cfg.days, room=cfg.room, flagged=flagged)
        values |= {f"loop {name}": value for name, value in loop.items()}
    return values


def off_policy(
    run: Run, start: Run, reward: RewardRun, post: posttrain.PosttrainConfig, cfg: JudgeConfig
) -> dict[str, float]:
    """What negatives drawn by the start do to the gradient of a run, as `negative_gradients`.

    Of validation users, with the run's own rollouts, reward and clip.
    """
    examples = validation_examples(run, cfg.off_policy_users, post.seed)
    batch = run.builder(examples.user, examples.position)
    model, old = start.model(), start.load_best()
    keys = jax.random.split(jax.random.key(post.seed), len(examples))
    drawn = jax.jit(lambda old: rollout(model, old, batch, keys, cfg=post.rollout))(old)
    weights = posttrain.objective_weights(post, reward)
    rewarder = Rewarder(run, reward.scorer(users=len(examples)), weights)
    _, parts, _ = rewarder(examples.user, examples.position, jax.device_get(drawn))
    advantage, valid = group_advantages(parts["reward"], parts["first"])
    return negative_gradients(
        run.model(), run.load_best(), batch, drawn.sid, drawn.logp, advantage, valid, post.policy,
        limit=cfg.off_policy_items,
    )  # fmt: skip
