"""A folder through which a trainer asks other processes for rollouts: files and renames, no more.

OneRec Technical Report (arXiv 2506.13695), section 2.4: an external service draws the items, and
the trainer sends it the policy every so many steps.

queue.json              the run that it belongs to
policies/POLICY/        weights that the trainer has published
requests/NAME.npz       what nobody draws yet
claims/NAME@OWNER.npz   the same file once a sampler has it; its time is touched while it is alive
answers/NAME.npz        what was drawn
finished                the trainer has come to its end

POLICY is the step of the policy and a digest of its weights, NAME the step of training that asks,
its policy and its number of users: an answer under a name is right whoever drew it, in whichever
session, and drawing twice does no harm. Every file appears whole, by a rename; so does a claim,
which is why only one sampler gets it. Nothing is a pickle.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import socket
import time
import uuid
import zipfile
from collections.abc import Callable, Iterator

import numpy as np

from onerec_jax.errors import InputError, require_at_least
from onerec_jax.files import read_json, write_npz, write_text

_NAME = re.compile(r"(\d+)-(\d+-[0-9a-f]{8})-\d+")
_POLICY = re.compile(r"(\d+)-[0-9a-f]{8}")


@dataclasses.dataclass(frozen=True)
class QueueConfig:
    """Rollouts by other processes, `python -m experiments.sample`; without a folder, by this."""

    folder: pathlib.Path | None = None
    """Queue that the samplers read; on a file system that all share."""
    prefetch: int = 2
    """Steps that requests are written ahead of the step that needs them."""
    max_age: int | None = None
    """Age of the policy, in steps, up to which a step takes what was asked for before the last
    refresh; None: one less than --rollout.refresh-every, the age that it has without a queue."""
    timeout_s: float = 600
    """Training stops, its state saved, when a step has waited so long for an answer."""

    def __post_init__(self):
        require_at_least(self, "queue.", prefetch=0, timeout_s=0)

    def check(self, every: int) -> None:
        """Refuses a bound that the refreshes cannot keep.

        Args:
          every: steps between refreshes.
        """
        if self.max_age is None:
            return
        if not every:
            raise InputError(
                f"--queue.max-age {self.max_age}: with --rollout.refresh-every 0 the policy that "
                "draws is never renewed; leave it out"
            )
        if self.max_age < every - 1:
            raise InputError(
                f"--queue.max-age {self.max_age}: with --rollout.refresh-every {every} the policy "
                f"that draws is up to {every - 1} steps old; give at least that, or refresh sooner"
            )

    def schedule(self, every: int) -> dict | None:
        """What of these settings a result depends on; None: it is as without a queue."""
        if self.folder is None or not every or not self.prefetch:
            return None
        if self.max_age is None or self.max_age == every - 1:
            return None
        return {"prefetch": self.prefetch, "max_age": self.max_age}


def policy_of(step: int, cfg: QueueConfig, every: int) -> int:
    """The step of the policy that draws for a step: the latest when the request was written.

    A request is written `prefetch` steps ahead, or later, at the refresh without which its policy
    would be over `max_age` steps old. All this depends on the step alone, on no clock.

    Args:
      step: training steps done.
      every: steps between refreshes; 0: none.
    """
    if not every:
        return 0
    bound = every - 1 if cfg.max_age is None else cfg.max_age
    asked = max(step - cfg.prefetch, 0) // every * every
    oldest = -(-max(step - bound, 0) // every) * every
    return max(asked, oldest)


def policy_name(step: int, digest: int) -> str:
    """The name of published weights, of the policy at a step; `digest` is of 32 bits."""
    return f"{step:07}-{digest:08x}"


def step_of(policy: str) -> int:
    """The step of a policy, by its name."""
    return int(policy.partition("-")[0])


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """The rollouts of one training step."""

    step: int
    """Training steps done before it."""
    policy: str
    user: np.ndarray  # int32 [R], user rows
    position: np.ndarray  # int32 [R], of the request within the user
    slots: int
    """Slots that the lifelong pathway is padded to: shapes are part of what is computed."""

    @property
    def name(self) -> str:
        return f"{self.step:07}-{self.policy}-{len(self.user)}"


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
    """A request that this sampler has."""

    request: Request
    path: pathlib.Path


class Queue:
    """One folder, seen by the trainer or by a sampler."""

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        lease_s: float = 30,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Opens the folder, which need not be there yet.

        Args:
          lease_s: a claim that was not touched for so long, as this process saw it, is free again.
            Clocks of other hosts are not asked.
        """
        self.folder, self.lease_s, self._clock = pathlib.Path(folder), lease_s, clock
        self.policies, self.requests, self.claims, self.answers = (
            self.folder / name for name in ("policies", "requests", "claims", "answers")
        )
        self._finished = self.folder / "finished"
        self._owner = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._seen: dict[str, tuple[int, float]] = {}

    # ------------------------------------------------------------------------------- the trainer

    @property
    def belongs_to(self) -> dict | None:
        """The configuration of the run whose queue it is; None: nobody's yet.

        Raises:
          InputError: the folder is no queue.
        """
        path = self.folder / "queue.json"
        if path.exists():
            return read_json(path)
        known = {self.policies, self.requests, self.claims, self.answers}
        if self.folder.exists() and not set(_visible(self.folder)) <= known:
            raise InputError(f"{self.folder} exists and is no queue: give another folder")
        return None

    def start(self, config: dict, step: int) -> None:
        """Makes the queue, or takes it up at a step: what belongs to no step to come is removed,
        and so is what later policies drew, for the run has yet to come to them."""
        for folder in (self.policies, self.requests, self.claims, self.answers):
            folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "queue.json", json.dumps(config, indent=1))
        self._finished.unlink(missing_ok=True)
        for path in self.policies.iterdir():
            if not _POLICY.fullmatch(path.name) or step_of(path.name) > step:
                _remove(path)
        for folder in (self.requests, self.claims, self.answers):
            for path, asks, policy in _named(folder):
                if asks < step or step_of(policy) > step:
                    _remove(path)

    def ask(self, request: Request) -> None:
        """Writes a request, unless it is there, claimed or answered."""
        if not any(path.exists() for path in self._places(request)) and not self._claimed(request):
            arrays = {
                "step": np.int64(request.step),
                "policy": np.array(request.policy),
                "user": np.asarray(request.user, np.int32),
                "position": np.asarray(request.position, np.int32),
                "slots": np.int64(request.slots),
            }
            write_npz(self.requests / f"{request.name}.npz", arrays)

    def answer(self, request: Request, group: int) -> dict[str, np.ndarray] | None:
        """The answer to a request, as of `put`; None: there is none yet.

        A damaged one, or one of other groups than of `group` items, is removed.
        """
        path = self.answers / f"{request.name}.npz"
        try:
            with np.load(path) as file:
                found = {name: file[name] for name in ("sid", "logp", "alive")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            found = None
        groups = len(request.user), group
        if (
            found is None
            or found["sid"].ndim != 3
            or found["sid"].shape[:2] != groups
            or found["logp"].shape != found["sid"].shape
            or found["alive"].shape != groups
        ):
            _remove(path)
            return None
        return found

    def usable(self, step: int) -> set[str]:
        """Policies that are published, or have an answer to a step."""
        return {path.name for path in self.policies.iterdir() if _POLICY.fullmatch(path.name)} | {
            policy
            for path, asks, policy in _named(self.answers)
            if asks == step and path.suffix == ".npz"
        }

    def waiting(self, request: Request) -> str:
        """What a request waits for, in words."""
        return "a sampler has it" if self._claimed(request) else "no sampler has taken it"

    def forget(self, *, step: int, policy: int, answers: int) -> None:
        """Removes requests of steps before `step`, policies before `policy`, and answers to steps
        before `answers`."""
        for folder, before in (
            (self.requests, step),
            (self.claims, step),
            (self.answers, answers),
        ):
            for path, asks, _ in _named(folder):
                if asks < before:
                    _remove(path)
        for path in self.policies.iterdir():
            if _POLICY.fullmatch(path.name) and step_of(path.name) < policy:
                _remove(path)

    def finish(self) -> None:
        """Tells the samplers that there is nothing more to draw, and empties the folders."""
        write_text(self._finished, "")
        for folder in (self.requests, self.claims, self.answers, self.policies):
            for path in list(folder.iterdir()):
                _remove(path)

    # ------------------------------------------------------------------------------- the sampler

    @property
    def finished(self) -> bool:
        return self._finished.exists()

    def claim(self) -> Claim | None:
        """The open request of the lowest step, for this sampler alone; None: there is none."""
        free = [(path.stem, path) for path, *_ in _named(self.requests) if path.suffix == ".npz"]
        free += [(path.name.partition("@")[0], path) for path in self._abandoned()]
        for name, path in sorted(free):
            mine = self.claims / f"{name}@{self._owner}.npz"
            try:
                os.utime(path)  # before the rename, after which others look at its age
                os.rename(path, mine)
            except FileNotFoundError:  # another was faster
                continue
            if request := _read(mine):
                return Claim(request, mine)
            _remove(mine)  # damaged: the trainer asks again
        return None

    def put(self, claim: Claim, sid, logp, alive) -> None:
        """Answers a claim.

        Args:
          sid, logp, alive: as of `generation.rollout.Rollout`, NumPy.
        """
        path = self.answers / f"{claim.request.name}.npz"
        with contextlib.suppress(FileNotFoundError):  # the trainer has forgotten the request
            write_npz(path, {"sid": sid, "logp": logp, "alive": alive})
        self.drop(claim)

    def drop(self, claim: Claim) -> None:
        """Forgets a claim: it is answered, or its policy is no more."""
        claim.path.unlink(missing_ok=True)

    def release(self, claim: Claim) -> None:
        """Gives a claim back for others to take."""
        with contextlib.suppress(FileNotFoundError):  # taken by another, or forgotten
            os.rename(claim.path, self.requests / f"{claim.request.name}.npz")

    def touch(self, claim: Claim) -> None:
        """Says that this sampler is alive; at least once a lease."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(claim.path)

    def _abandoned(self) -> list[pathlib.Path]:
        """Claims that have not been touched for a lease."""
        now, seen, found = self._clock(), {}, []
        for path, *_ in _named(self.claims):
            try:
                touched = path.stat().st_mtime_ns
            except FileNotFoundError:
                continue
            before, since = self._seen.get(path.name, (None, now))
            seen[path.name] = touched, now if before != touched else since
            if now - seen[path.name][1] >= self.lease_s:
                found.append(path)
        self._seen = seen
        return found

    # -------------------------------------------------------------------------------------- both

    def _places(self, request: Request) -> Iterator[pathlib.Path]:
        return (folder / f"{request.name}.npz" for folder in (self.answers, self.requests))

    def _claimed(self, request: Request) -> bool:
        return any(self.claims.glob(f"{request.name}@*.npz"))


def _read(path: pathlib.Path) -> Request | None:
    """A request; None: it is damaged."""
    try:
        with np.load(path) as file:
            found = Request(
                int(file["step"]),
                str(file["policy"]),
                file["user"],
                file["position"],
                int(file["slots"]),
            )
        return found if path.name.startswith(f"{found.name}@") else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _visible(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _named(folder: pathlib.Path) -> list[tuple[pathlib.Path, int, str]]:
    """Files of requests, temporary ones too, with the step that asks and the policy."""
    found = []
    for path in folder.iterdir():
        if match := _NAME.match(path.name.removeprefix(".")):
            found.append((path, int(match[1]), match[2]))
    return found


def _remove(path: pathlib.Path) -> None:
    """Removes a file or folder, the latter at once for those who look at its name."""
    with contextlib.suppress(FileNotFoundError):
        if not path.is_dir():
            path.unlink()
            return
        gone = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.gone")
        os.rename(path, gone)
        shutil.rmtree(gone, ignore_errors=True)
