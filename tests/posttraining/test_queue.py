"""The folder queue, with numbers for policies: who draws what, claims, leases, resuming, tidiness.

A policy is an integer that every step's draws change, so that one wrong draw shows in all later
ones. Samplers take their turns inside the trainer's sleep: no threads, no clock.
"""

import concurrent.futures
import itertools
import os
import shutil
import types

import numpy as np
import pytest

from onerec_jax.errors import InputError
from onerec_jax.files import write_text
from onerec_jax.posttraining.queue import (
    Queue,
    QueueConfig,
    Request,
    policy_name,
    policy_of,
    step_of,
)
from onerec_jax.posttraining.queued import TELL_S, QueuedDraws
from onerec_jax.posttraining.sampler import answer_requests, held
from onerec_jax.training.loop import NotStepped

USERS, GROUP, STEPS = 2, 3, 23
SAVE_EVERY = 5
SETTINGS = [  # every, prefetch, max_age
    (4, 0, None),
    (4, 3, None),
    (4, 3, 3),
    (4, 3, 4),
    (4, 3, 6),
    (2, 7, 9),
    (1, 2, 2),
    (0, 3, None),
]


# ------------------------------------------------------------------------------------- a toy world


def asked(step):
    return np.arange(USERS) + step, np.arange(USERS) * step, 64 + step


def drawn(step, weights, user, position, slots):
    """What a policy draws, a function of all that a request says."""
    seed = (step, weights, *user, *position, slots)
    sid = np.random.default_rng(seed).integers(0, 100, (USERS, GROUP, 3)).astype(np.int32)
    return sid, sid.astype(np.float32) / 7, sid[..., 0] > 10


def publish(folder, weights):
    folder.mkdir()
    write_text(folder / "weights", str(weights))


def digest(weights):
    return weights % 2**32


def updated(weights, sid):
    return (weights * 31 + int(sid.sum())) % 2**40


class Clock:
    """Time passes when somebody sleeps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Trainer:
    """A trainer with checkpoints, whose samplers work while it sleeps."""

    def __init__(self, folder, every, prefetch, max_age, turn):
        self.cfg = QueueConfig(folder, prefetch, max_age, timeout_s=100)
        self.every, self.clock, self.turn = every, Clock(), turn
        self.lines, self.stop = [], False
        self.saves = {}  # step: weights, sampler
        self.sids, self.ages = {}, {}
        self.queue = Queue(folder)

    def draws(self):
        return QueuedDraws(
            self.queue,
            self.cfg,
            every=self.every,
            group=GROUP,
            steps=STEPS,
            config={"seed": 1},
            asked=asked,
            publish=publish,
            digest=digest,
            saved=lambda: max(self.saves, default=0),
            stopped=lambda: self.stop,
            hint="sample",
            say=self.lines.append,
            clock=self.clock,
            sleep=self.sleep,
        )

    def sleep(self, seconds):
        self.clock.now += seconds
        self.turn()

    def session(self, end=STEPS, spoil=0):
        """From the latest checkpoint to a step; a branch can be spoilt as by other rounding."""
        step = max(self.saves, default=0)
        weights, sampler = self.saves.get(step, (12345, 12345))
        draws = self.draws()
        while step < end:
            found, about = draws(step, sampler)
            self.sids[step], self.ages[step] = found.sid, about["policy_age"]
            weights = updated(weights, found.sid) + spoil
            step += 1
            if self.every and step % self.every == 0:
                sampler = weights
            if step % SAVE_EVERY == 0 and not spoil:
                self.saves[step] = weights, sampler
        return draws


def sampler_turn(queue):
    """One request answered, as a sampler would."""
    claim = queue.claim()
    if claim is None:
        return
    request = claim.request
    folder = queue.policies / request.policy
    if not folder.exists():
        queue.drop(claim)
        return
    weights = int((folder / "weights").read_text())
    assert request.policy == policy_name(step_of(request.policy), digest(weights))
    where = request.user, request.position, request.slots
    queue.put(claim, *drawn(request.step, weights, *where))


def in_process(every, prefetch, max_age):
    """The slow twin: every policy is remembered, and the one of the schedule draws."""
    cfg = QueueConfig(prefetch=prefetch, max_age=max_age)
    weights, policies, sids = 12345, {0: 12345}, {}
    for step in range(STEPS):
        chosen = policies[policy_of(step, cfg, every)]
        sids[step] = drawn(step, chosen, *asked(step))[0]
        weights = updated(weights, sids[step])
        if every and (step + 1) % every == 0:
            policies[step + 1] = weights
    return sids


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize(("every", "prefetch", "max_age"), SETTINGS)
def test_which_policy_draws(every, prefetch, max_age):
    """By hand: the request is written as early as it may be, and takes the latest policy then."""
    cfg = QueueConfig("folder", prefetch=prefetch, max_age=max_age)
    bound = every - 1 if max_age is None else max_age
    for step in range(60):
        now = policy_of(step, cfg, every)
        if not every:
            assert now == 0
            continue
        written = next(
            at
            for at in range(max(step - prefetch, 0), step + 1)
            if step - at // every * every <= bound
        )
        assert now == written // every * every
        if cfg.schedule(every) is None:
            assert now == step // every * every  # as without a queue


def test_bounds_that_cannot_be_kept():
    QueueConfig(max_age=3).check(4)
    with pytest.raises(InputError, match="up to 3 steps old"):
        QueueConfig(max_age=2).check(4)
    with pytest.raises(InputError, match="never renewed"):
        QueueConfig(max_age=2).check(0)
    with pytest.raises(InputError, match="--queue.prefetch -1"):
        QueueConfig(prefetch=-1)


# ------------------------------------------------------------------------------- trainer and draws


@pytest.mark.parametrize(("every", "prefetch", "max_age"), SETTINGS)
def test_draws_are_those_of_the_schedule_and_the_folder_stays_small(
    tmp_path, every, prefetch, max_age
):
    sampler, most = Queue(tmp_path / "q"), {}

    def turn():
        sampler_turn(sampler)
        for folder in (sampler.policies, sampler.requests, sampler.claims, sampler.answers):
            most[folder.name] = max(most.get(folder.name, 0), len(files(folder)))

    trainer = Trainer(tmp_path / "q", every, prefetch, max_age, turn)
    draws = trainer.session()
    for step, sid in in_process(every, prefetch, max_age).items():
        np.testing.assert_array_equal(trainer.sids[step], sid)
    cfg = trainer.cfg
    assert trainer.ages == {s: s - policy_of(s, cfg, every) for s in range(STEPS)}
    assert most["requests"] <= prefetch + 1
    assert most["claims"] <= 1
    assert most["policies"] <= -(-prefetch // (every or STEPS)) + 1
    kept = 0 if cfg.schedule(every) is None else SAVE_EVERY + every
    assert most["answers"] <= prefetch + 1 + kept
    draws.finish()
    assert sampler.finished
    assert files(tmp_path / "q") == [
        *("answers", "claims", "finished", "policies", "queue.json", "requests"),
    ]
    assert not any(files(x) for x in (sampler.policies, sampler.requests, sampler.answers))


@pytest.mark.parametrize(("every", "prefetch", "max_age"), SETTINGS)
@pytest.mark.parametrize("killed", [9, 11])
def test_resumed_draws_the_same(tmp_path, every, prefetch, max_age, killed):
    """Of the branch that was lost nothing is used: other rounding had spoilt it."""
    sampler = Queue(tmp_path / "q")
    trainer = Trainer(tmp_path / "q", every, prefetch, max_age, lambda: sampler_turn(sampler))
    saved = killed // SAVE_EVERY * SAVE_EVERY
    trainer.session(saved)
    trainer.session(killed, spoil=1)
    trainer.session()
    for step, sid in in_process(every, prefetch, max_age).items():
        np.testing.assert_array_equal(trainer.sids[step], sid)
    assert not trainer.lines


@pytest.mark.parametrize(("max_age", "gone"), [(None, 0), (6, 3)])
def test_resumed_without_the_folder(tmp_path, max_age, gone):
    """What the present policy draws comes back; older ones are gone, which is said."""
    sampler = Queue(tmp_path / "q")
    trainer = Trainer(tmp_path / "q", 4, 3, max_age, lambda: sampler_turn(sampler))
    trainer.session(8)
    trainer.saves = {8: (999, 999)}
    shutil.rmtree(tmp_path / "q")
    trainer.session()
    assert trainer.sids.keys() == set(range(STEPS))
    assert len(trainer.lines) == gone  # steps 8 to 10 were asked for before step 8
    assert all("the policy of step 4 is gone" in line for line in trainer.lines)


def test_waiting_ends_in_one_line(tmp_path):
    trainer = Trainer(tmp_path / "q", 4, 2, None, lambda: None)
    with pytest.raises(NotStepped) as stop:
        trainer.session()
    message = str(stop.value)
    assert "no rollouts for step 0" in message
    assert "after 100 s (--queue.timeout-s), no sampler has taken it" in message
    assert "start `sample`" in message
    assert "\n" not in message
    assert len(trainer.lines) == 100 // TELL_S
    assert "step 0 has waited 15 s for its rollouts" in trainer.lines[0]

    trainer.stop = True
    with pytest.raises(NotStepped, match="asked to stop"):
        trainer.session()
    trainer.stop = False
    Queue(tmp_path / "q").claim()
    with pytest.raises(NotStepped, match="a sampler has it"):
        trainer.session()


def test_damaged_and_deleted_files_are_asked_for_again(tmp_path):
    sampler = Queue(tmp_path / "q")
    turns = itertools.count()

    def turn():
        number = next(turns)
        if number % 5 == 0:
            for path in (*sampler.requests.iterdir(), *sampler.answers.iterdir()):
                path.write_bytes(path.read_bytes()[: number % 40])
        elif number % 5 == 2:
            for path in sampler.requests.iterdir():
                path.unlink()
        else:
            sampler_turn(sampler)

    trainer = Trainer(tmp_path / "q", 4, 2, None, turn)
    trainer.session()
    for step, sid in in_process(4, 2, None).items():
        np.testing.assert_array_equal(trainer.sids[step], sid)


def test_answers_of_other_shapes_are_not_taken(tmp_path):
    queue = Queue(tmp_path / "q")
    queue.start({}, 0)
    request = Request(3, policy_name(0, 1), *asked(3))
    sid, logp, alive = drawn(3, 1, *asked(3))
    for wrong in ((sid[:, :2], logp, alive), (sid, logp[:1], alive), (sid, logp, alive[0])):
        queue.ask(request)
        queue.put(queue.claim(), *wrong)
        assert queue.answer(request, GROUP) is None
        assert files(queue.answers) == []
    queue.ask(request)
    queue.put(queue.claim(), sid, logp, alive)
    found = queue.answer(request, GROUP)
    for name, value in zip(("sid", "logp", "alive"), (sid, logp, alive), strict=True):
        np.testing.assert_array_equal(found[name], value)
        assert found[name].dtype == value.dtype


# ------------------------------------------------------------------------------------------ claims


def filled(folder, count):
    queue = Queue(folder)
    queue.start({}, 0)
    for step in range(count):
        queue.ask(Request(step, policy_name(0, 7), *asked(step)))
    return queue


def test_each_request_has_one_owner(tmp_path):
    filled(tmp_path / "q", 60)

    def work(_):
        queue, mine = Queue(tmp_path / "q"), []
        while claim := queue.claim():
            mine.append(claim.request.step)
            np.testing.assert_array_equal(claim.request.user, asked(claim.request.step)[0])
        return mine

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(work, range(8)))
    assert sorted(itertools.chain(*found)) == list(range(60))
    for mine in found:
        assert mine == sorted(mine)  # the lowest step first


def test_a_dead_samplers_request_is_taken_after_its_lease(tmp_path):
    filled(tmp_path / "q", 1)
    clock = Clock()
    dead, one, two = (Queue(tmp_path / "q", lease_s=10, clock=clock) for _ in range(3))
    lost = dead.claim()
    for now in (0, 9.9):
        clock.now = now
        assert one.claim() is None
    os.utime(lost.path, ns=(5, 5))  # a sign of life, by whatever clock
    for now in (10, 19.9):
        clock.now = now
        assert one.claim() is None
    clock.now = 20
    assert two.claim() is None  # its first look
    assert one.claim().request.step == 0
    assert not lost.path.exists()
    # The dead one comes back after all: no harm, and what it drew is right.
    dead.touch(lost)
    dead.put(lost, *drawn(0, 7, *asked(0)))
    assert one.answer(lost.request, GROUP) is not None


def test_a_claim_comes_back_when_a_sampler_is_stopped(tmp_path):
    queue = filled(tmp_path / "q", 1)

    def interrupted(request):
        assert files(queue.requests) == []
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer_requests(queue, interrupted, idle_s=0)
    assert files(queue.claims) == []
    assert queue.claim().request.step == 0


def test_a_claim_is_kept_alive_however_long_it_takes(tmp_path):
    queue = filled(tmp_path / "q", 1)
    queue.lease_s = 0.004
    claim = queue.claim()
    os.utime(claim.path, ns=(5, 5))
    with held(queue, claim):
        while claim.path.stat().st_mtime_ns == 5:
            pass


def test_a_sampler_ends_with_the_training_or_without_requests(tmp_path):
    queue, clock, lines = filled(tmp_path / "q", 3), Clock(), []

    def sleep(seconds):
        clock.now += seconds

    def draw(request):
        return types.SimpleNamespace(**dict(zip(("sid", "logp", "alive"), answer, strict=True)))

    answer = drawn(0, 7, *asked(0))
    options = {"say": lines.append, "clock": clock, "sleep": sleep}
    with pytest.raises(InputError, match=r"no request in .* for 5 s \(--idle-s\), 3 answered"):
        answer_requests(queue, draw, idle_s=5, **options)
    assert len(lines) == 1  # one a policy
    assert len(files(queue.answers)) == 3
    queue.ask(Request(5, policy_name(0, 8), *asked(5)))
    assert answer_requests(queue, lambda _: queue.finish(), idle_s=5, **options) == 0


# ---------------------------------------------------------------------------------- other folders


def test_a_folder_that_is_no_queue(tmp_path):
    queue = Queue(tmp_path)
    assert queue.belongs_to is None
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="exists and is no queue"):
        queue.belongs_to  # noqa: B018
