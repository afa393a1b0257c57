"""The studies of post-training: their arms, what is run and what is not, tables and bad input.

Where many runs are asked for, what would train and judge is replaced: it notes what it was asked
for and writes scores that say which arm is better. One run is trained and judged in earnest.
"""

import dataclasses
import importlib
import json
import pathlib
import types

import numpy as np
import pytest
from test_ab import platform  # noqa: F401 (a fixture)

from experiments import posttrain
from experiments.posttrain import PosttrainConfig
from experiments.studies import industrial, post_report, post_runs, posttraining
from experiments.studies.industrial import CUT, FACTORS, FREE
from experiments.studies.post_config import SMALL, StudyConfig
from experiments.studies.post_judge import JudgeConfig
from experiments.studies.study_config import changed
from onerec_jax.data.schema import load_dataset
from onerec_jax.data.splits import make_split
from onerec_jax.data.world.constants import WorldConfig
from onerec_jax.errors import InputError
from onerec_jax.generation.rollout import RolloutConfig
from onerec_jax.posttraining.step import FormatConfig, ObjectiveConfig
from onerec_jax.run import Run
from onerec_jax.sharding import MeshConfig
from onerec_jax.training.loop import LoopConfig
from onerec_jax.training.optimizer import OptimizerConfig

NAMES = (
    *("rl", "group_size", "search", "sampler"),
    *("ecpo", "format_reward", "industrial", "reward"),
)
STUDIES = {name: importlib.import_module(f"experiments.studies.{name}").STUDY for name in NAMES}
USERS = 6


def config_of(study):
    """Settings of a study as its command line has them with --small and two seeds."""
    config = StudyConfig(**(SMALL | {"small": True, "seeds": 2, "parallel": 1, "resamples": 9}))
    return changed(
        config,
        {"post": changed(config.post, study.post), "judge": changed(config.judge, study.judge)},
    )


class Runner:
    """In place of `run_tasks`: every run is there at once."""

    def __init__(self):
        self.asked, self.stops = [], None

    def __call__(self, function, tasks, *, parallel, gpus, logs):
        for name, arguments in tasks.items():
            self.asked.append((name, arguments))
            getattr(self, function.__name__)(*arguments)

    def train_policy(self, config):
        config.run.mkdir(parents=True)
        (config.run / "done").touch()

    def main(self, config):
        config.out.mkdir(parents=True)
        (config.out / "report.json").touch()

    def run_arm(self, post, start, cfg, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        seed = int(path.parent.name[-1])
        if self.stops and post is not None and self.stops(post):
            np.savez(path, stopped="the ratio of policy and sampler is not finite")
            return
        users = np.random.default_rng(0).random(USERS)
        names = (*post_report.METRICS, "loop stay_s", "loop watch_s", "watch_s chosen@32")
        names += ("watch_s chosen@128", "watch_s chosen@512")
        gain = 0.0 if post is None else 0.5 + 0.1 * seed
        values = {name: 1 + users + gain for name in names}
        gradients = {"items": 4, "share": 0.1, "ratio": 9.0, "grpo": 3.0, "ecpo": 1.0}
        gradients |= {"grpo_item": 5.0 - 4 * seed, "bound": 2.0}
        if post is None:
            np.savez(path, **values)
            return
        np.savez(path, **values, **{f"off policy {k}": v for k, v in gradients.items()})
        rows = [
            {
                "step": step, "flagged": 0.1 * (seed + 1), "reward": step / 10, "loss": 5.0,
                "legality": [0.9, 0.8, 0.7], "entropy": [1.0, 1.0, 0.5], "grad_norm_policy": 2.0,
                "ratio_quantiles": [0.9, 1.0, 1.5, 3.0], "early_clipped": 0.1,
            }
            for step in (10, 20)
        ]  # fmt: skip
        rows.append({"step": 20, "validation": True})
        (path.parent / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))

    @property
    def arms(self):
        return [arguments for name, arguments in self.asked if name.startswith(("arm", "policy"))]


@pytest.fixture
def runner(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = Runner()
    ground = types.SimpleNamespace(
        folder=pathlib.Path("data"),
        dataset=types.SimpleNamespace(num_items=100),
        world=types.SimpleNamespace(config=WorldConfig(), fingerprint="f"),
        codes=125_000,
    )
    monkeypatch.setattr(post_runs, "run_tasks", found)
    monkeypatch.setattr(posttraining, "ground_of", lambda config: ground)
    return found


@pytest.fixture
def undrawn(monkeypatch):
    """Without the plots."""
    for name in ("draw_gains", "draw_curves"):
        monkeypatch.setattr(post_report, name, lambda *_: None)


def test_from_arms_to_report(runner, capsys):
    study = STUDIES["format_reward"]
    result = posttraining.run_study(study, config_of(study))
    starts = [task for task, _ in runner.asked if not task.startswith("arm")][:6]
    assert starts[:2] == ["policy-0", "policy-1"]
    assert sorted(starts[2:]) == ["judge-0", "judge-1", "reward-0", "reward-1"]
    out = pathlib.Path("runs/studies/format_reward-a-small")
    report = (out / "report.md").read_text()
    assert all(f" {arm} |" in report for arm in study.arms(config_of(study), []))
    assert list(result["compared"]) == ["top 5", "random 5", "start"]
    assert study.paper in report
    assert study.question in capsys.readouterr().out
    assert (out / "gains.png").stat().st_size > 1000
    assert (out / "curves.png").stat().st_size > 1000
    assert json.loads((out / "report.json").read_text())["config"]["seeds"] == 2
    before = len(runner.asked)
    posttraining.run_study(study, config_of(study))
    assert len(runner.asked) == before, "what is there is not run again"


def test_arms_of_a_seed_share_its_start_and_studies_their_arms(runner, undrawn):
    for name in ("format_reward", "sampler"):
        posttraining.run_study(STUDIES[name], config_of(STUDIES[name]))
    posts = [arguments[0] for arguments in runner.arms if len(arguments) == 4 and arguments[0]]
    assert len(posts) == 2 * (3 + 2)  # random 5 is the sampler study's current policy
    for post in posts:
        assert post.run.name == f"policy-{post.seed}"
        assert post.reward.name == f"reward-{post.seed}"
        assert post.train.validate_every == post.train.steps
    assert len({post.run for post in posts}) == 2
    assert len({post.out for post in posts}) == len(posts)


def test_seeds_differ_and_their_gains_are_paired(runner, undrawn):
    result = posttraining.run_study(STUDIES["rl"], config_of(STUDIES["rl"]))
    found = result["compared"]["with RL (ECPO)"]["loop stay_s"]
    assert found["by_seed"] == pytest.approx([0.5, 0.6])
    assert found["agrees"]
    assert any("App" not in x and "2 of 2 seeds" in x for x in result["lines"])


def test_target_share_is_below_what_nothing_holds_down(runner, undrawn):
    config = changed(config_of(STUDIES["industrial"]), {"post.flagged": "head.txt"})
    result = posttraining.run_study(STUDIES["industrial"], config)
    posts = [arguments[0] for arguments in runner.arms if len(arguments) == 4]
    held = [post for post in posts if post.industrial.target_share < 0.9]
    assert len(held) == 2 * len(FACTORS)
    for post in held:
        share = 0.1 * (post.seed + 1)  # of that seed's run without SIR
        assert post.industrial.target_share == pytest.approx((1 - CUT) * share)
        assert post.flagged == "head.txt"
    assert {arguments[2].flagged for arguments in runner.arms if len(arguments) == 4} == {
        "head.txt"
    }
    # All drew as many as without: 1 / 0.9 of the target.
    assert any("alpha 0.5: 15.00% of what is drawn, +11.1% off f" in x for x in result["lines"])


def test_the_head_is_what_the_log_shows_most(platform):  # noqa: F811
    _, folder = platform
    start = post_runs.Start(folder / "pretrain-0", folder / "r", folder / "j")
    config = industrial.prepare(config_of(STUDIES["industrial"]), [start])
    assert config.post.flagged == config.judge.flagged
    run = Run.open(start.policy)
    flagged = posttrain.read_flagged(config.post.flagged, run)
    assert flagged.sum() == 5
    assert run.popularity[flagged].min() >= run.popularity[~flagged].max()
    named = changed(config, {"post.flagged": "viral_farm"})
    assert industrial.prepare(named, [start]).judge.flagged == "viral_farm"


def test_gradients_beside_the_bound(runner, undrawn):
    lines = posttraining.run_study(STUDIES["ecpo"], config_of(STUDIES["ecpo"]))["lines"]
    assert any("which GRPO exceeds in 4 of 8 runs" in line for line in lines)
    assert any("GRPO: gradient norm of the policy losses 2.00" in line for line in lines)


def test_a_run_is_trained_and_judged(platform, tmp_path):  # noqa: F811
    world, folder = platform
    reward = folder / "train_reward-0"
    start = post_runs.Start(folder / "pretrain-0", reward, reward)
    post = PosttrainConfig(
        run=start.policy, reward=reward, out=tmp_path / "arm", rl_share=0.25, keep_rollouts=0,
        rollout=RolloutConfig(group=6, refresh_every=0), format=FormatConfig(k=2),
        train=LoopConfig(batch_size=8, steps=4, log_every=2, validate_every=4),
        optimizer=OptimizerConfig(learning_rate=0.1, warmup_steps=0),
        mesh=MeshConfig(data=1),
    )  # fmt: skip
    cfg = JudgeConfig(
        list_length=3,
        beam_width=8,
        group=6,
        batch_size=8,
        pass_at=(1, 3),
        off_policy_users=8,
        days=0.5,
        room=4,
    )
    post_runs.run_arm(post, start, cfg, tmp_path / "arm" / "scores.npz")
    found = post_runs.read_measured([tmp_path / "arm/scores.npz"], [tmp_path / "arm/metrics.jsonl"])
    assert found.stopped == [""]
    assert [row["step"] for row in found.rows[0]] == [2, 4]
    test_users = int((make_split(load_dataset(folder / "data")).test_at >= 0).sum())
    for name, values in found.scores.items():
        assert values.shape == (1, world.config.users if name.startswith("loop") else test_users)
    assert (found.scores["loop stay_s"] >= found.scores["loop watch_s"]).all()
    assert found.scores["loop views"].max() > 0
    assert set(post_report.METRICS) <= set(found.scores)
    assert "watch_s chosen@3" in found.scores
    for name in ("legality, beam", "legality, sample", "flagged", "recall@10"):
        assert np.nanmin(found.scores[name]) >= 0
        assert np.nanmax(found.scores[name]) <= 1
    np.testing.assert_array_equal(found.scores["p, reward"], found.scores["p, judge"])
    (gradients,) = found.off_policy
    assert gradients["items"] > 0
    assert gradients["ecpo"] <= gradients["bound"] * (1 + 1e-5)
    assert gradients["grpo_item"] > gradients["bound"]


def test_a_stopped_arm_is_a_result(runner, undrawn):
    runner.stops = lambda post: (
        post.policy.delta == 1
        or (post.policy.algorithm == "ecpo" and post.policy.delta == 0.01 and post.seed == 1)
    )
    result = posttraining.run_study(STUDIES["ecpo"], config_of(STUDIES["ecpo"]))
    assert result["compared"]["ECPO, delta 1"]["watch_s"] is None
    assert result["compared"]["ECPO, delta 0.01"]["watch_s"]["seeds"] == 1
    assert any(
        x.startswith("ECPO, delta 0.01, seed 1, was stopped: the ratio") for x in result["lines"]
    )
    report = pathlib.Path("runs/studies/ecpo-a-small/report.md").read_text()
    assert " stopped |" in report


@pytest.mark.parametrize("small", [True, False])
def test_sizes(small, monkeypatch):
    """A code space a thousand times the catalogue, and arms that every size allows."""
    config = StudyConfig(**(SMALL | {"small": True} if small else {}))
    tokenizer = config.start.tokenizer
    assert tokenizer.codebook_size**tokenizer.levels >= 1000 * config.world.items
    start = post_runs.Start(*(pathlib.Path(name) for name in ("policy", "reward", "judge")))
    free = post_runs.Measured({}, [], [[{"step": 1, "flagged": 0.2}]], [""])
    monkeypatch.setattr("experiments.studies.industrial.measure", lambda *_: {FREE: free})
    for study in STUDIES.values():
        here = changed(config, {"post": changed(config.post, study.post)})
        for arm in study.arms(here, [start]).values():
            if arm is not None:
                changes = arm(0) if callable(arm) else arm
                post = post_runs.arm_config(here, start, 0, changes)
                assert isinstance(post.objective_config, ObjectiveConfig)


def test_cells():
    base = np.tile(np.arange(1.0, 5.0), (2, 1))
    more = {"watch_s": 1.1 * base, "flagged": base + 1}
    arms = {"a": {"watch_s": base, "flagged": base}, "b": more}
    compared = post_report.compare(arms, resamples=9)["b"]
    assert post_report.cell("watch_s", compared["watch_s"]).startswith("2.7500 +10.0% [+")
    assert post_report.cell("flagged", compared["flagged"]).startswith("3.5000 +1.0000")
    assert post_report.cell("flagged", None) == "stopped"
    up_and_down = post_report.paired(base + np.array([[1], [-1]]), base, 9)
    assert post_report.cell("flagged", up_and_down).endswith("±")
    assert post_report.metric("watch_s best@32").title == "watch time, s, best of 32"
    assert post_report.metric("loop views").title == "closed loop: exposures"


def test_flags_that_fit_nothing(runner, refused):
    study = STUDIES["sampler"]

    def command(flags):
        posttraining.command(study, ["--small", *flags])

    cases = {
        "--arms 'nobody': choose of 'pretrained model'": ["--arms", "nobody"],
        "--arms needs two arms": ["--arms", "current policy"],
        "--start and --reward name no folders": ["--start.run", "somewhere"],
    }
    for message, flags in cases.items():
        assert message in refused(command, *flags), message
    assert not [x for x in runner.asked if x[0].startswith("arm")]


def test_a_study_names_the_folders_itself(capsys):
    for flags, code in ((["somewhere"], 2), (["--help"], 0)):
        with pytest.raises(SystemExit) as exited:
            posttraining.command(STUDIES["rl"], flags)
        assert exited.value.code == code
    help_text = capsys.readouterr().out
    assert "--post.objective" in help_text
    for flag in ("[PATH]", "--post.run", "--post.reward ", "--post.judge", "--post.out"):
        assert flag not in help_text
    for name in ("run", "reward", "judge", "out"):
        post = dataclasses.replace(StudyConfig().post, **{name: pathlib.Path("somewhere")})
        with pytest.raises(InputError, match=f"--post.{name}: a study makes its runs itself"):
            StudyConfig(post=post)


def test_flags_reach_every_arm(monkeypatch):
    seen = []
    monkeypatch.setattr(posttraining, "run_study", lambda study, config: seen.append(config))
    flags = [
        "--small",
        "--post.policy.delta",
        "0.3",
        "--world.name",
        "b",
        "--post.objective",
        "vtr",
    ]
    posttraining.command(STUDIES["ecpo"], flags)
    (config,) = seen
    assert config.world == changed(SMALL["world"], {"name": "b"})
    assert (config.post.policy.delta, config.post.objective) == (0.3, "vtr")
    # Of the two, what the study itself changes.
    assert config.post.rollout == changed(SMALL["post"].rollout, {"refresh_every": 0})
    assert config.judge.off_policy_users == 16
    assert changed(config.post, {"policy.delta": 0.1}).policy.delta == 0.1
