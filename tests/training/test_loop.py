"""The loop around the step: validation, early stopping, saving, resuming, stopping cleanly.

A toy trainer stands for the model: the parameter is a sum over the batches seen, so that any
batch left out, seen twice or taken out of order shows in its bits.
"""

import gc
import json
import signal

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.sharding import make_mesh, replicated
from onerec_jax.training.checkpoint import Checkpoints
from onerec_jax.training.loop import (
    Collapsed,
    Interrupted,
    LoopConfig,
    NonFiniteLoss,
    NotStepped,
    Work,
    fit,
)
from onerec_jax.training.metrics import MetricsLog
from onerec_jax.training.step import TrainState

CFG = LoopConfig(batch_size=4, steps=12, log_every=2, validate_every=4, patience=0)


class ToyTrainer:
    """Same surface as `Trainer`; the loss of a step, or an error, comes from `poison`."""

    def __init__(self, poison=None):
        self.mesh = make_mesh(data=1)
        self.poison = poison or {}
        sharding = replicated(self.mesh)

        def leaf(dtype):
            return jax.ShapeDtypeStruct((), dtype, sharding=sharding)

        self.abstract_state = TrainState(
            leaf(jnp.int32), {"w": leaf(jnp.float32)}, {}, (leaf(jnp.float32),)
        )

    def init(self, seed):
        value = jnp.float32(seed)
        state = TrainState(jnp.int32(0), {"w": value}, {}, (value,))
        return jax.device_put(state, replicated(self.mesh))

    def step(self, state, batch):
        step = int(state.step) + 1
        if isinstance(error := self.poison.get(step), Exception):
            raise error
        w = state.params["w"] * 1.1 + jnp.sin(batch.astype(jnp.float32) * step).sum()
        loss = self.poison.get(step, w)
        metrics = {"loss": loss, "loss_level": jnp.stack([w, w]), "grad_norm": jnp.float32(1)}
        metrics["dropped"] = jnp.float32(step / 100)
        return TrainState(state.step + 1, {"w": w}, {}, (w + 1,)), metrics


class Memory:
    """Checkpoints that stay in this process: half a second saved at each save."""

    def __init__(self):
        self.steps = {}

    @property
    def latest(self):
        return max(self.steps, default=None)

    def wait(self):
        """Nothing is ever under way."""

    def reserve(self, state):
        pass

    def save(self, state, *, note, score):
        saved = jax.device_get(state), json.loads(json.dumps(note)), score
        self.steps[int(state.step)] = saved
        best = max(self.steps, key=lambda step: (self.steps[step][2], -step))
        self.steps = {step: self.steps[step] for step in {best, self.latest}}

    def load_note(self):
        return self.steps[self.latest][1]

    def restore(self, abstract):
        return self.steps[self.latest][0]

    def close(self):
        pass


class Job:
    """One run folder and a script of validation scores."""

    def __init__(self, folder, scores=(), cfg=CFG, poison=None, on_disk=False):
        self.folder, self.cfg, self.poison = folder, cfg, poison
        self.scores = dict(scores) if isinstance(scores, dict) else None
        self.list = None if isinstance(scores, dict) else list(scores)
        self.lines, self.validated, self.started, self.closed = [], [], [], 0
        folder.mkdir(exist_ok=True)
        self.memory = None if on_disk else Memory()
        self.log = MetricsLog(folder / "metrics.jsonl")

    def validate(self, variables):
        step = self.seen
        self.validated.append(step)
        number = step // self.cfg.validate_every - 1
        score = self.list[number] if self.list else step / 100
        return {"loss": float(variables["params"]["w"]), "recall@10": 0.5, "score": score}

    def go(self, on_batch=None, validate=None, say=None, **options):
        """Trains; `on_batch(step)` is called as each batch is asked for."""
        checkpoints = self.memory or Checkpoints(self.folder / "checkpoints")
        self.seen = checkpoints.latest or 0
        job = self

        class Stream:
            """Batches from a step on, each a function of its number."""

            def __init__(self, step):
                job.started.append(step)
                self.step = step

            def __next__(self):
                job.seen += 1
                if on_batch:
                    on_batch(job.seen)
                batch = np.random.default_rng(self.step).integers(0, 23, 4)
                self.step += 1
                return batch

            def close(self):
                job.closed += 1

        try:
            return fit(
                ToyTrainer(self.poison),
                Stream,
                checkpoints,
                self.log,
                self.cfg,
                seed=7,
                validate=validate or self.validate,
                say=say or self.lines.append,
                **options,
            )
        finally:
            checkpoints.close()

    @property
    def kept(self):
        if self.memory:
            return set(self.memory.steps)
        return {int(p.name) for p in (self.folder / "checkpoints").iterdir() if p.name.isdigit()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs: its last state and its metrics."""
    job = Job(tmp_path_factory.mktemp("whole"))
    state, progress = job.go()
    return state, progress, job


def test_rows_lines_and_checkpoints(whole):
    state, progress, job = whole
    assert int(state.step) == 12
    rows = job.log.read()
    assert [r["step"] for r in rows if "validation" not in r] == [2, 4, 6, 8, 10, 12]
    assert [r["step"] for r in rows if "validation" in r] == [4, 8, 12]
    assert set(rows[0]) == {"step", "loss", "loss_level", "grad_norm", "dropped", "speed"}
    assert rows[1]["speed"]["users_s"] > 0
    assert (progress.best_step, progress.best_score, progress.waited) == (12, 0.12, 0)
    assert progress.seconds > 0
    assert job.kept == {12}
    text = "\n".join(job.lines)
    assert "12/12" in text
    assert "users/s" in text
    assert "left" in text


def test_a_row_is_the_mean_since_the_last_row(tmp_path):
    cfg = LoopConfig(batch_size=4, steps=5, log_every=2, validate_every=3, patience=0)
    poison = {step: jnp.float32(step) for step in range(1, 6)}
    job = Job(tmp_path / "r", cfg=cfg, poison=poison)
    job.go()
    rows = [(r["step"], r["loss"]) for r in job.log.read() if "validation" not in r]
    # Written at every second step, before each validation (3, 5) and at the end.
    assert rows == [(2, 1.5), (3, 3.0), (4, 4.0), (5, 5.0)]
    assert job.validated == [3, 5]


def test_early_stopping_and_what_is_kept(tmp_path):
    cfg = LoopConfig(batch_size=4, steps=60, log_every=2, validate_every=4, patience=2)
    job = Job(tmp_path / "r", [0.1, 0.3, 0.2, 0.3, 0.9], cfg)
    state, progress = job.go()
    assert int(state.step) == 16  # 0.3 again is not better than 0.3
    assert (progress.best_step, progress.best_score, progress.waited) == (8, 0.3, 2)
    assert job.kept == {8, 16}  # the best to serve, the latest to go on from
    assert "best at step 8" in job.lines[-1]
    before = job.log.path.read_bytes()
    again, progress = job.go()  # finished: nothing more is trained
    assert int(again.step) == 16
    assert progress.best_step == 8
    assert job.validated == [4, 8, 12, 16]
    assert job.log.path.read_bytes() == before


def test_the_best_step_is_kept_on_equal_scores(tmp_path):
    """What the progress note calls best must be there to be served."""
    job = Job(tmp_path / "r", [0.0, 0.0, 0.0], on_disk=True)
    _, progress = job.go()
    assert progress.best_step == 4
    assert job.kept == {4, 12}


class Crash(BaseException):
    """Nobody catches it, as nobody catches a power cut."""


@pytest.mark.parametrize("at", [2, 11])
def test_a_crash_repeats_what_was_not_saved(tmp_path, whole, at):
    job = Job(tmp_path / "r", on_disk=at == 11)

    def crash(step):
        if step == at:
            raise Crash

    with pytest.raises(Crash):
        job.go(on_batch=crash)
    with job.log.path.open("a") as file:
        file.write('{"step": 1')  # killed within a write
    state, progress = job.go()
    expected, best, other = whole
    assert np.asarray(state.params["w"]) == np.asarray(expected.params["w"])
    assert np.asarray(state.opt_state[0]) == np.asarray(expected.opt_state[0])
    assert helpers.logged(job.log.path) == helpers.logged(other.log.path)
    assert (progress.best_step, progress.best_score) == (best.best_step, best.best_score)
    assert any("resum" in line for line in job.lines) == (at > 4)


def test_early_stopping_survives_a_crash(tmp_path):
    """The validations waited so far are part of the checkpoint."""
    cfg = LoopConfig(batch_size=4, steps=60, log_every=2, validate_every=4, patience=3)
    job = Job(tmp_path / "r", [0.5, 0.4, 0.3, 0.2, 0.1], cfg)

    def crash(step):
        if step == 14:
            raise Crash

    with pytest.raises(Crash):
        job.go(on_batch=crash)
    state, progress = job.go()
    assert int(state.step) == 16
    assert (progress.best_step, progress.waited) == (4, 3)


def test_a_crash_within_validation(tmp_path, whole):
    job = Job(tmp_path / "r")

    def crash(variables):
        if job.seen == 8:
            raise Crash
        return job.validate(variables)

    with pytest.raises(Crash):
        job.go(validate=crash)
    job.go()
    assert helpers.logged(job.log.path) == helpers.logged(whole[2].log.path)


@pytest.mark.parametrize(
    ("number", "at"), [(signal.SIGINT, 3), (signal.SIGTERM, 7), (signal.SIGINT, 8)]
)
def test_a_signal_saves_and_the_next_run_goes_on(tmp_path, whole, number, at):
    """Before the first validation, between two, and while one is due."""
    job = Job(tmp_path / "r", on_disk=at == 3)
    old = signal.getsignal(number)

    def interrupt(step):
        if step == at:
            signal.raise_signal(number)

    with pytest.raises(Interrupted) as stop:
        job.go(on_batch=interrupt)
    assert number.name in str(stop.value)
    assert f"step {at}" in str(stop.value)
    assert signal.getsignal(number) == old
    assert at in job.kept
    state, progress = job.go()
    assert int(state.step) == 12
    assert np.asarray(state.params["w"]) == np.asarray(whole[0].params["w"])
    assert progress.best_step == 12
    steps = [r["step"] for r in job.log.read() if "validation" not in r]
    # No step is left out of the rows: the interrupted one has a row of its own.
    assert steps == sorted({2, 4, 6, 8, 10, 12, at})


def test_an_unvalidated_save_is_never_the_best(tmp_path):
    job = Job(tmp_path / "r", [-0.5, -0.6, -0.7], on_disk=True)

    def interrupt(step):
        if step == 6:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        job.go(on_batch=interrupt)
    assert job.kept == {4, 6}
    _, progress = job.go()
    assert progress.best_step == 4
    assert job.kept == {4, 12}


@pytest.mark.parametrize(
    ("at", "signalled"), [(1, False), (3, True), (5, False), (5, True), (12, False)]
)
def test_a_step_that_cannot_begin_saves_what_is_done(tmp_path, whole, at, signalled):
    """At step 5 the fourth has just been validated and saved, and stays as it is."""
    job = Job(tmp_path / "r", poison={at: NotStepped("nobody came")})

    def interrupt(step):
        if signalled and step == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted if signalled else NotStepped) as stop:
        job.go(on_batch=interrupt)
    said = "SIGINT" if signalled else "nobody came;"
    assert str(stop.value).startswith(said)
    assert str(stop.value).endswith(f"saved step {at - 1}")
    assert job.memory.latest == at - 1
    assert job.memory.steps[at - 1][2] == (0.04 if at == 5 else float("-inf"))
    job.poison = None
    state, _ = job.go()
    assert np.asarray(state.params["w"]) == np.asarray(whole[0].params["w"])


def test_a_second_ctrl_c_acts_at_once(tmp_path):
    job = Job(tmp_path / "r")

    def interrupt(step):
        if step == 6:
            for _ in range(2):  # as Python calls it, but here and now
                signal.getsignal(signal.SIGINT)(signal.SIGINT, None)

    # What is raised while garbage is collected is lost, and hypothesis, once another test has used
    # it in this process, hangs a function of its own into every collection. Nor must another test's
    # handler stand in for Python's own.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()
    try:
        with pytest.raises(KeyboardInterrupt):
            job.go(on_batch=interrupt)
    finally:
        gc.enable()
        signal.signal(signal.SIGINT, before)
    assert job.kept == {4}


def test_non_finite_loss_names_the_step_and_the_last_good(tmp_path):
    job = Job(tmp_path / "r", poison={7: jnp.float32("inf")})
    with pytest.raises(NonFiniteLoss, match=r"loss.*step 7\b.*step 4\b"):
        job.go()
    assert issubclass(NonFiniteLoss, InputError)  # a command line ends with code 2
    assert job.kept == {4}
    rows = job.log.read()
    assert [r["step"] for r in rows] == [2, 4, 4, 6]
    assert all(np.isfinite(r["loss"]) for r in rows)
    job.poison = None  # the remedy: the run goes on from the good checkpoint
    state, _ = job.go()
    assert int(state.step) == 12


def test_non_finite_loss_before_any_checkpoint(tmp_path):
    job = Job(tmp_path / "r", poison={2: jnp.float32("nan")})
    with pytest.raises(NonFiniteLoss, match=r"step 2\b.*no checkpoint"):
        job.go()


def test_a_guard_stops_before_anything_is_saved(tmp_path):
    """It is asked with the mean of each row; the run goes on from the last good step."""
    job = Job(tmp_path / "r", poison={7: jnp.float32(1e6)})
    with pytest.raises(Collapsed, match=r"^stopped at step 8: too loud; last good one: step 4$"):
        job.go(guard=lambda row: "too loud" if row["loss"] > 1e5 else None)
    assert job.kept == {4}
    job.poison = None
    state, _ = job.go(guard=lambda row: None)
    assert int(state.step) == 12


def test_ctrl_c_never_saves_a_state_that_is_not_finite(tmp_path):
    """The loss of the steps since the last row has not been looked at yet."""
    job = Job(tmp_path / "r", poison={5: jnp.float32("nan")})

    def interrupt(step):
        if step == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(NonFiniteLoss, match=r"step 5\b.*step 4\b"):
        job.go(on_batch=interrupt)
    assert job.kept == {4}


def test_a_diverged_validation_is_not_saved_as_good(tmp_path):
    """An update can spoil the parameters after a finite loss; validation sees it first."""
    job = Job(tmp_path / "r")

    def diverged(variables):
        result = job.validate(variables)
        return result | {"loss": float("nan")} if job.seen == 8 else result

    with pytest.raises(NonFiniteLoss, match=r"step 8\b.*step 4\b"):
        job.go(validate=diverged)
    assert job.kept == {4}


def test_note_is_json(tmp_path):
    """Of a run stopped before its first validation too (the best score is then minus infinity)."""
    job = Job(tmp_path / "r", on_disk=True)

    def interrupt(step):
        if step == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted):
        job.go(on_batch=interrupt)
    checkpoints = Checkpoints(job.folder / "checkpoints")
    progress = json.loads(json.dumps(checkpoints.load_note()))["progress"]
    checkpoints.close()
    assert progress["best_step"] == 0
    assert progress["best_score"] == float("-inf")


def test_speed_and_a_trace(tmp_path):
    """Three steps from the sixth on are traced; rows say how fast the device works.

    What experts drop, a share of step / 100 here, is no work done.
    """
    job = Job(tmp_path / "run")
    work = Work(8.0, lambda dropped: 1e12 * (1 - dropped))
    job.go(work=lambda batch: work, profile=tmp_path / "trace")
    rows = job.log.read()
    for row, dropped in ((rows[0], 0.02), (rows[-2], 0.115)):  # the first step is not timed
        speed, steps_s = row["speed"], row["speed"]["users_s"] / 4
        assert speed["targets_s"] == pytest.approx(8 * steps_s, rel=1e-6)
        tflops = steps_s * (1 - dropped) / jax.device_count()
        assert speed["tflops"] == pytest.approx(tflops, rel=1e-6)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert any(f"trace of 3 steps in {tmp_path / 'trace'}" in line for line in job.lines)
