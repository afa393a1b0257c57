"""The study of sessions: every kind of arm judged in earnest, with random weights or a few steps;
which runs it asks for; its tables; bad input.
"""

import dataclasses

import helpers
import numpy as np
import pytest
from conftest import quick_compilation
from test_ab import make_run, platform  # noqa: F401 (a fixture)

from experiments import align
from experiments.align import AlignRun
from experiments.studies import session_report, sessions
from experiments.studies.session_config import SMALL, StudyConfig
from experiments.studies.session_judge import JudgeConfig
from experiments.studies.sessions import ARMS, BASE, SEED_MODEL, Start
from onerec_jax.data.schema import load_dataset
from onerec_jax.data.session_lists import SessionRule
from onerec_jax.data.session_windows import SessionLabelRule
from onerec_jax.data.splits import make_split
from onerec_jax.errors import InputError
from onerec_jax.models.session_reward import SessionRewardConfig
from onerec_jax.rewards.session import Scale
from onerec_jax.session_reward_run import SessionRewardRun
from onerec_jax.training.loop import Collapsed
from onerec_jax.training.step import TrainState

CONFIG = StudyConfig(**(SMALL | {"small": True, "seeds": 2, "parallel": 1, "resamples": 9}))
JUDGE = JudgeConfig(lists=3, beam_width=6, batch_size=8, sasrec_epochs=1, days=0, room=8)
HEADS = ["swt", "vtr", "ltr"]


@pytest.fixture(scope="module")
def start(platform):  # noqa: F811
    """Runs of random weights: two of items, one of lists of three, a session reward as judge."""
    _, folder = platform
    model = helpers.tiny_config(num_experts=0, decoder_layers=1, lifelong_length=0)
    lists = dataclasses.replace(model, session_items=3)
    rule = SessionRule(items=3, min_watched=3, listed="shown", combine="none")
    reward = SessionRewardConfig(
        d_model=8, num_heads=2, history_length=8, top_k=4, recent_length=4,
        shared_dims=(8,), tower_dims=(4,),
    )  # fmt: skip
    made = {
        AlignRun: {
            "model": dataclasses.asdict(lists),
            "preset": "tiny",
            "targets": "sessions",
            "sessions": dataclasses.asdict(rule),
        },
        SessionRewardRun: {
            "model": dataclasses.asdict(reward),
            "items": 3,
            "objectives": HEADS,
            "item_objectives": [],
            "labels": dataclasses.asdict(SessionLabelRule()),
            "watch_s": 30.0,
            "share": "all",
            "judge_share": 0.0,
            "valid_fraction": 0.1,
            "test_fraction": 0.1,
        },
    }
    with quick_compilation():
        # Another seed than other tests' runs of lists in the same folder.
        runs = [make_run(kind, folder, {"stage": kind.stage, **x}, 5) for kind, x in made.items()]
    runs[1].keep_scale(Scale(np.full(3, 0.5), np.full(3, 0.1)))
    reward_folder = runs[1].folder
    return Start(
        folder / "pretrain-0", folder / "pretrain-1", runs[0].folder, reward_folder, reward_folder
    )


def scores_of(arm, start, path, alignment=None, judge=JUDGE):
    with quick_compilation():
        sessions.run_arm(arm, alignment, start, 3, judge, 0, path / "scores.npz")
    return dict(np.load(path / "scores.npz"))


def check(scores, users):
    """Numbers of every test user that are what they claim."""
    names = [f"{name} by the platform" for name in session_report.PLATFORM]
    names += [f"{head} by the judge" for head in [*HEADS, "reward"]] + ["reward by the reward"]
    for name in names:
        first, mean, most = (scores[f"{name}, {how}"] for how in ("first", "mean", "max"))
        assert len(mean) == users
        assert (most >= np.maximum(first, mean) - 1e-6).all()
        assert np.isfinite(first).all()
    np.testing.assert_array_equal(
        scores["reward by the judge, max"], scores["reward by the reward, max"]
    )
    assert (scores["watch_s by the platform, first"] > 0).all()
    assert ((scores["first codes"] >= 1) & (scores["first codes"] <= 3)).all()
    assert (scores["different items"] <= 1).all()


def test_lists_of_items_are_judged_and_played(start, tmp_path):
    data = load_dataset(start.lists.parent / "data")
    users = int((make_split(data).test_at >= 0).sum())
    judge = dataclasses.replace(JUDGE, days=0.5)
    found = {
        name: scores_of(ARMS[name], start, tmp_path / str(number), judge=judge)
        for number, name in enumerate(("SASRec", BASE, "point-wise, diverse"))
    }
    for scores in found.values():
        check(scores, users)
    assert not any("loop" in name for name in found["SASRec"])
    assert len(found[BASE]["loop variety"]) == data.num_users
    assert found[BASE]["loop views"].max() > 0
    plain, diverse = found[BASE], found["point-wise, diverse"]
    assert (diverse["first codes"] >= plain["first codes"]).all()
    assert diverse["first codes"].mean() > plain["first codes"].mean()
    assert len({x["watch_s by the platform, mean"].mean() for x in found.values()}) == 3


def test_an_aligned_arm_is_judged(start, tmp_path, monkeypatch):
    """Its training, which experiments.align has tests of, gives the weights that it began with."""
    monkeypatch.chdir(tmp_path)
    ipa = sessions.align_config(CONFIG, start, 0, {"dpo_share": 0.25, "train.batch_size": 8})
    assert (ipa.run, ipa.reward, ipa.train.validate_every) == (start.lists, start.reward, 100)
    assert ipa.out != sessions.align_config(CONFIG, start, 0, {}).out

    def untrained(config, parent, run, examples, tester, mesh, validate):
        assert parent.folder == start.lists
        assert len(examples) >= config.train.batch_size
        assert list(tester.scorers) == ["reward"]
        params = parent.load_best()["params"]
        state = TrainState(np.int32(1), params, {}, {"count": 0})
        note = {"progress": {"best_step": 1, "waited": 0}}
        run.checkpoints.save(state, note=note, score=validate(params)["score"])
        run.checkpoints.close()

    monkeypatch.setattr(align, "train", untrained)
    scores = scores_of(ARMS["+ IPA"], start, tmp_path / "ipa", ipa)
    data = load_dataset(start.lists.parent / "data")
    check(scores, int((make_split(data).test_at >= 0).sum()))


def test_a_collapsed_alignment_is_a_result(start, tmp_path, monkeypatch):
    def collapsed(config):
        raise Collapsed("the policy has collapsed")

    monkeypatch.setattr(sessions, "aligned", collapsed)
    scores = scores_of(ARMS["+ DPO"], start, tmp_path / "dpo", CONFIG.align)
    assert scores == {"stopped": "the policy has collapsed"}


# --------------------------------------------------------------------------- what is asked for


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """In place of `run_all`: notes the tasks, whose files are there at once."""
    monkeypatch.chdir(tmp_path)
    found = {}

    def run_all(config, function, tasks, logs):
        for name, arguments in tasks.items():
            found.setdefault(function.__name__, {})[name] = arguments
            if function is sessions.run_arm:
                arm, alignment, *_, seed, path = arguments
                path.parent.mkdir(parents=True, exist_ok=True)
                values = np.arange(4.0) + (0 if arm == ARMS[BASE] else 1 + seed)
                names = [f"swt by the judge, {how}" for how in ("first", "mean", "max")]
                names += [x.replace("swt by the judge", "watch_s by the platform") for x in names]
                np.savez(path, **dict.fromkeys(names, values))
                if alignment is not None:
                    (path.parent / "metrics.jsonl").write_text('{"step": 1}\n')
            else:
                folder = getattr(arguments[0], "run", None) or arguments[0].out
                folder.mkdir(parents=True)
                for file in ("done", "report.json"):
                    (folder / file).touch()

    monkeypatch.setattr(sessions, "run_all", run_all)
    return found


def test_runs_of_a_seed_share_what_they_start_from(asked, tmp_path):
    starts = sessions.starts_of(CONFIG, ARMS, tmp_path / "data", tmp_path / "ids")
    policies = [x for (x,) in asked["train_policy"].values()]
    assert len(policies) == 6
    assert {(x.seed, x.targets, x.model.session_items) for x in policies} == {
        (seed, *rest) for seed in (0, 1) for rest in (("positive", 1), ("sessions", 5))
    }
    assert {x.tokenizer.codebook_size for x in policies} == {128, 64}
    shape = CONFIG.tiger.model
    assert (shape.pathways, shape.features, shape.num_experts) == (("short",), (), 0)
    rewards = [x for (x,) in asked["main"].values()]
    assert sorted((x.seed, x.judge) for x in rewards) == [
        (0, False),
        (1, False),
        (1000, True),
        (1001, True),
    ]
    measured = sessions.measure(CONFIG, starts, ARMS)
    tasks = list(asked["run_arm"].values())
    assert len(tasks) == 2 * len(ARMS)
    alignments = [task[1] for task in tasks if task[1] is not None]
    assert {(x.run, x.reward, x.seed) for x in alignments} == {
        (start.lists, start.reward, seed) for seed, start in enumerate(starts)
    }
    assert len({x.out for x in alignments}) == len(alignments) == 2 * 5
    assert {x.dpo_share for x in alignments} == {0.01, 0.05}
    asked.clear()
    sessions.starts_of(CONFIG, ARMS, tmp_path / "data", tmp_path / "ids")
    again = sessions.measure(CONFIG, starts, ARMS)
    assert not asked, "what is there is not run again"
    assert again.keys() == measured.keys() == ARMS.keys()

    scores = {arm: found.scores for arm, found in measured.items()}
    report = session_report.report_of(
        scores, base=BASE, seed_model=SEED_MODEL, aligned=["+ DPO", "+ IPA"], resamples=9
    )
    found = report["compared"]["+ IPA"]["swt by the judge, max"]
    assert found["by_seed"] == [1, 2]
    assert report["compared_aligned"]["+ IPA"]["swt by the judge, max"]["difference"] == 0
    header, rows = session_report.paper_rows(report)
    assert header == ["", "swt, mean / max"]  # heads that nobody judged are not shown
    assert [row[0] for row in rows] == list(ARMS)
    assert rows[list(ARMS).index(BASE)][1] == "1.5000 / 1.5000"
    text = session_report.markdown(report, ["What was run."])
    assert "| + IPA, r_DPO 5% | 3.0000 / 3.0000 |" in text
    assert "| swt, max | +100.0% [" in text
    assert ", 2 of 2 |" in text
    assert "Closed loop" not in text
    session_report.draw(tmp_path / "gains.png", report)
    assert (tmp_path / "gains.png").stat().st_size > 1000


def test_gains_say_where_seeds_disagree():
    found = {"difference": 0.5, "b": 2.0, "ci95": [-1.0, 2.0], "by_seed": [1.0, 1.0, -0.5]}
    found |= {"agrees": False, "seeds": 3}
    assert session_report.gain("swt", found) == "+25.0% [-50.0%, +100.0%] ±, 2 of 3"
    assert session_report.gain("reward, max", found) == "+0.500 [-1.000, +2.000] ±, 2 of 3"
    assert session_report.gain("swt", found | {"seeds": 1}) == "+25.0% [-50.0%, +100.0%]"
    assert session_report.gain("swt", None) == ""


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("--arms leaves out 'point-wise'", {"arms": ("SASRec", "session-wise")}),
        ("--arms leaves out 'session-wise'", {"arms": ("point-wise", "+ IPA")}),
        ("choose of 'SASRec'", {"arms": ("point-wise", "BERT4Rec")}),
        ("--reward.items 4", {"reward": dataclasses.replace(CONFIG.reward, items=4)}),
        ("--start is the point-wise run", {"start": CONFIG.lists}),
        (
            "leave it out",
            {"align": dataclasses.replace(CONFIG.align, run=SMALL["align"].run / "x")},
        ),
    ],
)
def test_bad_input(message, change):
    with pytest.raises(InputError, match=message):
        sessions.chosen_arms(dataclasses.replace(CONFIG, **change))


@pytest.mark.parametrize("config", [CONFIG, StudyConfig()])
def test_sizes(config):
    """Of 100 users a step one or five get pairs: what r_DPO says can be done."""
    for share in (0.01, 0.05):
        users = share * config.align.train.batch_size
        assert users == pytest.approx(round(users))
    assert config.align.train.steps > config.align.refresh_every > 0
    assert config.judge.lists <= config.judge.beam_width
