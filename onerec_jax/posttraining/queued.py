"""The trainer's side of the queue: what to ask, when, for which policy; and the wait.

No arrays are computed here: weights are published, and their digest taken, by what is given.
"""

import pathlib
import time
from collections.abc import Callable

import numpy as np

from onerec_jax.generation.rollout import Rollout
from onerec_jax.posttraining.queue import (
    Queue,
    QueueConfig,
    Request,
    policy_name,
    policy_of,
    step_of,
)
from onerec_jax.training.loop import NotStepped

TELL_S = 15
"""Seconds between lines while a step waits."""


class QueuedDraws:
    """The rollouts of each step, drawn by samplers: `(step, variables of the sampler)` to them.

    Which policy draws for a step depends on the step alone, what it draws on (seed, step, policy):
    a run stopped anywhere and resumed gets the same. With `QueueConfig.schedule` None it is what
    the trainer itself would draw.
    """

    def __init__(
        self,
        queue: Queue,
        cfg: QueueConfig,
        *,
        every: int,
        group: int,
        steps: int,
        config: dict,
        asked: Callable[[int], tuple[np.ndarray, np.ndarray, int]],
        publish: Callable[[pathlib.Path, dict], None],
        digest: Callable[[dict], int],
        saved: Callable[[], int],
        stopped: Callable[[], bool],
        hint: str,
        say: Callable[[str], None] = print,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """Nothing is written before the first step.

        Args:
          every: steps between refreshes; 0: none.
          group: items a user.
          steps: of the training; no later ones are asked for.
          config: of the run; samplers compare it with theirs.
          asked: as `PolicyStream.asked`.
          publish: writes variables to a folder, which appears once whole.
          digest: 32 bits that name variables.
          saved: step of the latest checkpoint, 0 without any.
          stopped: whether the run was asked to stop.
          hint: the command of a sampler.
        """
        self.queue, self.cfg, self.every, self.group = queue, cfg, every, group
        self.steps, self.config, self._asked_of, self._publish = steps, config, asked, publish
        self._digest, self._saved, self._stopped = digest, saved, stopped
        self._hint, self._say, self._clock, self._sleep = hint, say, clock, sleep
        self._asked: dict[int, Request] = {}
        self._names: dict[int, str] = {}  # policies by their step
        self._keep_from = 0

    def __call__(self, step: int, variables: dict) -> tuple[Rollout, dict[str, float]]:
        """NumPy arrays, and metrics: `policy_age`, in steps.

        Args:
          step: training steps done.
          variables: of the latest policy that may draw, that of the last refresh; must stay as they
            are until this returns.

        Raises:
          NotStepped: the run was asked to stop, or nobody has answered.
        """
        self._refresh(step, variables)
        newest = self._newest(step)
        for ahead in range(step, min(step + self.cfg.prefetch + 1, self.steps)):
            policy = policy_of(ahead, self.cfg, self.every)
            if policy <= newest and ahead not in self._asked:
                name = self._policy(ahead, policy, newest)
                self._asked[ahead] = Request(ahead, name, *self._asked_of(ahead))
                self.queue.ask(self._asked[ahead])
        request = self._asked.pop(step)
        answer = self._wait(request)
        # In-flight draws of an older policy cannot be had again from a checkpoint: they are kept.
        keep = step + 1 if self.cfg.schedule(self.every) is None else self._keep_from
        oldest = policy_of(step + 1, self.cfg, self.every)
        self.queue.forget(step=step + 1, policy=oldest, answers=min(keep, step + 1))
        return Rollout(**answer), {"policy_age": float(step - step_of(request.policy))}

    def finish(self) -> None:
        """At the end of training, in whichever session that is."""
        if self.queue.belongs_to is not None:
            self.queue.finish()

    def _newest(self, step: int) -> int:
        return step // self.every * self.every if self.every else 0

    def _refresh(self, step: int, variables: dict) -> None:
        """Publishes the policy of the last refresh, unless it is there."""
        newest = self._newest(step)
        if newest in self._names:
            return
        if not self._names:
            self.queue.start(self.config, step)
        name = self._names[newest] = policy_name(newest, self._digest(variables))
        if not (self.queue.policies / name).exists():
            self._publish(self.queue.policies / name, variables)
        self._keep_from = self._saved()

    def _policy(self, step: int, policy: int, newest: int) -> str:
        """The name of the policy of a step, to draw for a step."""
        if policy in self._names:
            return self._names[policy]
        # Of a session before: it has left the weights, or what they drew.
        if found := [name for name in self.queue.usable(step) if step_of(name) == policy]:
            return found[0]
        self._say(
            f"the policy of step {policy} is gone from {self.queue.folder}: that of step {newest} "
            f"draws for step {step}, which an uninterrupted run would not have done"
        )
        return self._names[newest]

    def _wait(self, request: Request) -> dict[str, np.ndarray]:
        began = told = self._clock()
        while (answer := self.queue.answer(request, self.group)) is None:
            now = self._clock()
            if self._stopped():
                raise NotStepped(f"asked to stop while step {request.step} waited for rollouts")
            if now - began >= self.cfg.timeout_s:
                raise NotStepped(
                    f"no rollouts for step {request.step} in {self.queue.folder} after "
                    f"{now - began:.0f} s (--queue.timeout-s), {self.queue.waiting(request)}: "
                    f"start `{self._hint}` and give this command again"
                )
            if now - told >= TELL_S:
                told = now
                self._say(
                    f"step {request.step} has waited {now - began:.0f} s for its rollouts, "
                    f"{self.queue.waiting(request)}; samplers: {self._hint}"
                )
            self.queue.ask(request)  # again, if somebody has deleted or damaged it
            self._sleep(min(0.5, 0.005 + (now - began) / 20))
        return answer
