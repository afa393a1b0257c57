"""The sampler's side of the queue: claims requests, loads policies, draws, answers.

It builds the batch of a request from the data set itself, and draws by the program that the trainer
would run: what is on the wire are row numbers, IDs and log-probabilities.
"""

import contextlib
import math
import threading
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np

from onerec_jax.errors import InputError
from onerec_jax.generation.rollout import Rollout, RolloutConfig
from onerec_jax.posttraining.queue import Claim, Queue, Request
from onerec_jax.posttraining.trainer import make_draw
from onerec_jax.run import Run, difference
from onerec_jax.sharding import USER_AXES, put_batch, shardings_of
from onerec_jax.training.checkpoint import load_model


def check_owner(queue: Queue, run: Run) -> None:
    """Refuses a queue of another run, or one of another model, data set or semantic IDs.

    Raises:
      InputError: with the first thing in which they differ.
    """
    owner = queue.belongs_to
    if owner is not None and (found := difference(owner, run.config)):
        raise InputError(
            f"{queue.folder} is the queue of another run than {run.folder} ({found}): give the run "
            "that it belongs to, or another folder"
        )


class RolloutSampler:
    """Draws what requests of a run ask for; keeps the policy that it loaded last."""

    def __init__(self, run: Run, queue: Queue, mesh):
        """`run` is one of experiments.posttrain, finished or not; its weights are not read."""
        settings = run.config["settings"]
        cfg = RolloutConfig(**settings["rollout"])
        self.run, self.queue, self.mesh = run, queue, mesh
        self.policy: str | None = None
        self._variables, self._shares = (
            None,
            cfg.parts * math.prod(mesh.shape[axis] for axis in USER_AXES),
        )
        self._draw = make_draw(run, cfg, mesh, settings["seed"])
        boxed = jax.eval_shape(run.model().init, jax.random.key(0), run.example)
        boxed = {name: boxed.get(name, {}) for name in ("params", "router")}
        self._abstract = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            nn.unbox(boxed),
            shardings_of(boxed, mesh),
        )

    def __call__(self, request: Request) -> Rollout | None:
        """The rollouts, NumPy; None: their policy is no more, so that nobody waits for them.

        Raises:
          InputError: the users do not divide over the devices; weights of another model, damaged.
        """
        if len(request.user) % self._shares:
            raise InputError(
                f"{len(request.user)} users of a request do not divide over the {self._shares} "
                "shares of devices and parts: lower --mesh.data, or give the trainer's mesh"
            )
        if request.policy != self.policy:
            self.policy, self._variables = None, None  # one policy in memory at a time
            folder = self.queue.policies / request.policy
            try:
                self._variables = load_model(folder, self._abstract)
            except InputError:
                if folder.exists():
                    raise
                return None
            self.policy = request.policy
        batch = self.run.builder(request.user, request.position, lifelong_slots=request.slots)
        here, user = put_batch((batch, request.user), self.mesh)
        drawn = self._draw(np.int32(request.step), self._variables, here, user)
        return jax.device_get(drawn)


@contextlib.contextmanager
def held(queue: Queue, claim: Claim):
    """Keeps a claim alive for the block, which may take longer than a lease; gives it back if the
    block fails or is interrupted."""
    done = threading.Event()

    def touch():
        while not done.wait(queue.lease_s / 4):
            queue.touch(claim)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        queue.release(claim)
        raise
    finally:
        done.set()
        thread.join()


def answer_requests(
    queue: Queue,
    draw: Callable[[Request], Rollout | None],
    *,
    idle_s: float,
    say: Callable[[str], None] = print,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Draws until the trainer has come to its end; returns the number of requests answered.

    Args:
      draw: as `RolloutSampler`.
      idle_s: seconds without a request after which nothing more is waited for; 0: never.

    Raises:
      InputError: nothing was asked for so long.
    """
    answered, policy, since = 0, None, clock()
    while not queue.finished:
        if (claim := queue.claim()) is None:
            waited = clock() - since
            if idle_s and waited >= idle_s:
                raise InputError(
                    f"no request in {queue.folder} for {waited:.0f} s (--idle-s), {answered} "
                    "answered before: is the trainer running with --queue.folder?"
                )
            sleep(min(0.5, 0.005 + waited / 20))
            continue
        request = claim.request
        with held(queue, claim):
            drawn = draw(request)
        if drawn is None:
            queue.drop(claim)
        else:
            queue.put(claim, drawn.sid, drawn.logp, drawn.alive)
            answered += 1
            if request.policy != policy:
                policy = request.policy
                say(f"policy {policy} draws from step {request.step} on; {answered} answered")
        since = clock()
    return answered
