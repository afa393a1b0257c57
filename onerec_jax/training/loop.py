"""The training loop: steps, progress, validation, checkpoints, early stopping, clean exits."""

import contextlib
import dataclasses
import math
import pathlib
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from onerec_jax.errors import InputError, require_at_least
from onerec_jax.inputs import Batch
from onerec_jax.sharding import put_batch
from onerec_jax.training.checkpoint import Checkpoints
from onerec_jax.training.metrics import MetricsLog, first_non_finite, mean_rows
from onerec_jax.training.profile import peak_flops
from onerec_jax.training.step import Trainer, TrainState


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """How long to train and how often to look."""

    batch_size: int = 256
    """Users a step, over all devices and processes."""
    accumulate: int = 1
    """Parts that a step's users are cut into, one after the other: less memory."""
    steps: int = 10_000
    log_every: int = 50
    validate_every: int = 500
    """Steps between validations; each ends in a checkpoint."""
    patience: int = 5
    """Validations without a better score before training stops; 0 = never."""

    def __post_init__(self):
        ones = dict.fromkeys(
            ("batch_size", "accumulate", "steps", "log_every", "validate_every"), 1
        )
        require_at_least(self, "train.", **ones, patience=0)


@dataclasses.dataclass
class Progress:
    """Best validation so far and time spent; part of every checkpoint."""

    best_score: float = float("-inf")
    best_step: int = 0
    waited: int = 0
    """Validations since the best."""
    seconds: float = 0.0
    """Wall time of all sessions of the run, validation included."""

    def update(self, step: int, score: float) -> bool:
        """Takes a validation; True if it is the best."""
        if score > self.best_score:
            self.best_score, self.best_step, self.waited = score, step, 0
            return True
        self.waited += 1
        return False


class Work(NamedTuple):
    """What a training step has to do."""

    targets: float
    flops: Callable[[float], float]
    """Useful FLOPs, given the share of their rows that experts drop: known after the step."""


class Interrupted(Exception):
    """Training was asked to stop (Ctrl-C, SIGTERM); its state is saved."""


class NonFiniteLoss(InputError):
    """The loss or gradient stopped being a number."""


class Collapsed(InputError):
    """The metrics say that going on would spoil the model."""


class NotStepped(InputError):
    """A step waited for something from outside and gave up before it began."""


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a flag; a second one acts at once."""

    received: str | None = None
    """Name of the signal."""

    def __enter__(self):
        self.received = None
        self._old = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: no signals here
                self._old[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number, frame):
        self.received = signal.Signals(number).name
        signal.signal(number, self._old[number])

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def fit(
    trainer: Trainer,
    stream: Callable[[int], Iterator[Batch]],
    checkpoints: Checkpoints,
    metrics_log: MetricsLog,
    cfg: LoopConfig,
    *,
    seed: int,
    validate: Callable[[dict[str, Any]], dict[str, float]],
    work: Callable[[Batch], Work] | None = None,
    guard: Callable[[dict], str | None] | None = None,
    profile: pathlib.Path | None = None,
    stop: StopSignal | None = None,
    say: Callable[[str], None] = print,
) -> tuple[TrainState, Progress]:
    """Trains until the last step or until validation stops rising; resumes by itself.

    Every `validate_every` steps and at the end the model is validated and everything is saved
    together: model, optimizer, early stopping. A killed run starts again from the latest save and
    repeats, bit for bit on a CPU, what it had not saved.

    Args:
      stream: step -> batches from that step on, as `data.pipeline.TrainStream`.
      validate: variables -> metrics, among them `score` (higher is better).
      work: what a training step on a batch of this process has to do.
      guard: mean metrics since the last row -> why training must stop, or None.
      profile: folder for a trace of PROFILED steps, once everything is compiled.
      stop: for a trainer whose steps may wait long, and then have to look whether to go on.
      say: prints one line of progress.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM, everything saved.
      NonFiniteLoss: names the step and the last good checkpoint.
      Collapsed: the guard objects; names both too.
      NotStepped: as the step says, everything saved.
    """
    progress = Progress()
    if checkpoints.latest is None:
        state = trainer.init(seed)
    else:
        state = checkpoints.restore(trainer.abstract_state)
        progress = Progress(**checkpoints.load_note()["progress"])
        say(f"resuming at step {int(state.step)}")
    checkpoints.reserve(state)
    step = int(state.step)
    metrics_log.cut_after(step)
    pending: list[dict] = []
    start, earlier = time.perf_counter(), progress.seconds
    clock = _Clock()
    tracer = _Tracer(profile, step, say)

    def last_good():
        saved = checkpoints.latest
        return "no checkpoint was saved" if saved is None else f"last good one: step {saved}"

    def not_finite(name, at):
        return NonFiniteLoss(
            f"{name} is not finite at step {at}: lower --optimizer.learning-rate or look at the "
            f"data; {last_good()}"
        )

    def flush():
        """Writes the mean of the steps since the last row; the device is at most one row behind."""
        if not pending:
            return
        rows = jax.device_get(pending)
        pending.clear()
        if bad := first_non_finite(rows):
            raise not_finite(bad[1], step - len(rows) + 1 + bad[0])
        row, speed = mean_rows(rows), clock.rates(rows)
        # Speed apart: all else in a row is the same whenever the step is repeated.
        metrics_log.write({"step": step, **row, "speed": speed})
        say(_progress_line(step, cfg, row | speed, clock))
        if guard is not None and (reason := guard(row)):
            raise Collapsed(f"stopped at step {step}: {reason}; {last_good()}")

    def save(score):
        progress.seconds = earlier + time.perf_counter() - start
        note = {"progress": dataclasses.asdict(progress)}
        checkpoints.save(state, note=note, score=score)

    def save_between():
        """Saves what no validation has, as never the best: it must not be served."""
        if checkpoints.latest != step:
            flush()  # what is saved must have been found finite
            save(float("-inf"))

    def finished():
        return step >= cfg.steps or (cfg.patience and progress.waited >= cfg.patience)

    metrics: dict = {}
    with contextlib.ExitStack() as ending, stop or StopSignal() as stop, tracer:
        ending.callback(checkpoints.wait)
        batches = ending.enter_context(contextlib.closing(stream(step)))
        while not finished():
            batch = next(batches)
            tracer.before(step, metrics)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                try:
                    state, metrics = trainer.step(state, put_batch(batch, trainer.mesh))
                except NotStepped as reason:
                    save_between()
                    if stop.received:
                        raise Interrupted(f"{stop.received}: saved step {step}") from None
                    raise NotStepped(f"{reason}; saved step {step}") from None
            pending.append(metrics)
            step += 1
            clock.tick(cfg.batch_size, work(batch) if work else None, metrics)
            validating = step % cfg.validate_every == 0 or step == cfg.steps
            if validating or step % cfg.log_every == 0:
                flush()
            if validating:
                with clock.paused():
                    result = validate(state.variables)
                    # The last update may have spoilt the parameters after a finite loss.
                    for name, value in result.items():
                        if not math.isfinite(value):
                            raise not_finite(f"validation {name}", step)
                    better = progress.update(step, result["score"])
                    metrics_log.write({"step": step, "validation": True, **result})
                    say(_validation_line(step, result, better, progress, cfg))
                    save(result["score"])
            if stop.received:
                save_between()
                raise Interrupted(f"{stop.received}: saved step {step}")
    return state, progress


class _Clock:
    """Rates of this session since the last look, compilation and validation left out."""

    def __init__(self):
        self.users, self.seconds = 0, 0.0  # of the session
        self._since = [0, 0.0]  # users, seconds since the last look
        self._work: list[Work] = []  # likewise, of this process
        self._last = None
        self._peak = peak_flops(jax.devices()[0])

    def tick(self, users, work, metrics):
        if self._last is None:  # the first step compiles
            jax.block_until_ready(metrics)
        else:
            seconds = time.perf_counter() - self._last
            self.users, self.seconds = self.users + users, self.seconds + seconds
            self._since = [self._since[0] + users, self._since[1] + seconds]
            self._work += [work] if work else []
        self._last = time.perf_counter()

    @contextlib.contextmanager
    def paused(self):
        yield
        self._last = time.perf_counter()

    @property
    def rate(self) -> float:
        """Users a second of the session."""
        return self.users / self.seconds if self.seconds else float("nan")

    def rates(self, rows: list[dict]) -> dict[str, float]:
        """`users_s`, `targets_s`, `tflops` and `mfu` of a device, `peak_gib`: what is known.

        Args:
          rows: metrics of the steps since the last look.
        """
        (users, seconds), work = self._since, self._work
        self._since, self._work = [0, 0.0], []
        found = {}
        if seconds:
            found = {"users_s": users / seconds}
            if work:
                timed = rows[-len(work) :]  # not the first of a session
                flops = sum(
                    w.flops(float(r.get("dropped", 0))) for w, r in zip(work, timed, strict=True)
                )
                targets, processes = sum(w.targets for w in work), jax.process_count()
                found["targets_s"] = targets * processes / seconds
                a_device = flops * processes / seconds / jax.device_count()
                found["tflops"] = a_device / 1e12
                if self._peak:
                    found["mfu"] = a_device / self._peak
        memory = jax.local_devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in memory:
            found["peak_gib"] = memory["peak_bytes_in_use"] / 2**30
        return found


PROFILED = 3
"""Steps in a trace, from the fifth of a session on: before, shapes are still being compiled."""


class _Tracer:
    """Writes a profiler trace of a few steps of a session."""

    def __init__(self, folder, first_step, say):
        self.folder, self.start, self.say = folder, first_step + 5, say
        self.running = False

    def __enter__(self):
        return self

    def before(self, step, metrics) -> None:
        """To be called before each step, with what the last one returned."""
        if self.folder is None:
            return
        if step == self.start:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(str(self.folder))
            self.running = True
        elif self.running and step == self.start + PROFILED:
            self._stop(metrics)

    def _stop(self, metrics=()) -> None:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()
        self.running = False
        self.say(f"trace of {PROFILED} steps in {self.folder}: open it with xprof or Perfetto")

    def __exit__(self, *_):
        if self.running:
            self._stop()


def _progress_line(step, cfg, row, clock) -> str:
    parts = row["loss_level"] if "loss_level" in row else row["loss_objective"]
    parts = " ".join(f"{x:.3f}" for x in parts)
    line = (
        f"step {step:>6}/{cfg.steps}  loss {row['loss']:.4f} ({parts})  {clock.rate:,.0f} users/s"
    )
    if "mfu" in row:
        line += f"  MFU {row['mfu']:.1%}"
    if "reward" in row:
        line += f"  reward {row['reward']:.4f}  legal {row['legality'][-1]:.0%}"
    if "margin" in row:
        line += f"  margin {row['margin']:+.3f}  pairs {row['pairs']:.1f}"
    if "load" in row:
        line += f"  max load +{row['max_violation']:.0%}  dropped {row['dropped']:.1%}"
    left = (cfg.steps - step) * cfg.batch_size / clock.rate if clock.seconds else float("nan")
    return line + (f"  left {_minutes(left)}" if left == left else "")


def _validation_line(step, result, better, progress, cfg) -> str:
    values = "  ".join(f"{name} {value:.4f}" for name, value in result.items() if name != "score")
    note = "best so far" if better else f"best at step {progress.best_step}"
    if not better and cfg.patience:
        note += f", waited {progress.waited} of {cfg.patience}"
    return f"  validation at {step}: {values}  ({note})"


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
