"""The queue in front of the model, without one."""

import threading
import time

import pytest

from onerec_jax.serving.batching import Batcher, QueueFull


class Answers:
    """Doubles numbers; remembers its batches; waits for `go` if told to."""

    def __init__(self):
        self.batches, self.go = [], threading.Event()
        self.go.set()

    def __call__(self, numbers):
        self.batches.append(list(numbers))
        assert self.go.wait(30)
        if 13 in numbers:
            raise ValueError("13")
        return [2 * number for number in numbers]


def batcher(answers, **options):
    values = {"max_users": 4, "wait_s": 0.02, "max_queue": 100, **options}
    return Batcher(answers, lambda number: number % 2, **values)


@pytest.fixture
def answers():
    return Answers()


@pytest.mark.parametrize("threads", [1, 2])
def test_many_threads_get_their_own_answers(answers, threads):
    queue = batcher(answers, max_queue=1000, threads=threads)
    found = {}

    def ask(start):
        for number in range(start, start + 50):
            found[number] = queue.submit(2 * number).result(30)

    askers = [threading.Thread(target=ask, args=(50 * i,)) for i in range(8)]
    for thread in askers:
        thread.start()
    for thread in askers:
        thread.join()
    queue.close()
    assert found == {number: 4 * number for number in range(400)}
    assert max(map(len, answers.batches)) > 1
    assert max(map(len, answers.batches)) <= 4
    assert sum(map(len, answers.batches)) == 400


def test_a_full_batch_leaves_at_once_and_a_lonely_request_in_time(answers):
    queue = batcher(answers, wait_s=1.0)
    start = time.monotonic()
    for future in [queue.submit(2 * i) for i in range(4)]:
        future.result(30)
    assert time.monotonic() - start < 0.9
    queue.submit(8).result(30)
    assert time.monotonic() - start > 0.9
    queue.close()
    assert answers.batches == [[0, 2, 4, 6], [8]]


def test_keys_do_not_mix_and_the_oldest_is_not_starved(answers):
    answers.go.clear()
    queue = batcher(answers, wait_s=0.0)
    futures = [queue.submit(0)]
    while not answers.batches:
        time.sleep(0.001)
    futures += [queue.submit(n) for n in (1, 2, 4, 6, 8, 10, 12, 3)]
    answers.go.set()
    assert [future.result(30) for future in futures] == [0, 2, 4, 8, 12, 16, 20, 24, 6]
    queue.close()
    assert answers.batches == [[0], [1, 3], [2, 4, 6, 8], [10, 12]]


def test_overflow_is_refused_and_passes(answers):
    answers.go.clear()
    queue = batcher(answers, max_queue=3)
    first = queue.submit(0)
    while not answers.batches:
        time.sleep(0.001)
    futures = [queue.submit(2 * i) for i in range(1, 4)]
    assert len(queue) == 3
    with pytest.raises(QueueFull) as error:
        queue.submit(8)
    assert error.value.retry_after_s >= 1
    answers.go.set()
    assert [future.result(30) for future in (first, *futures)] == [0, 4, 8, 12]
    assert queue.submit(8).result(30) == 16
    queue.close()


def test_one_bad_request_spoils_no_other(answers):
    queue = batcher(answers, wait_s=0.2)
    futures = [queue.submit(n) for n in (11, 13, 15)]
    assert futures[0].result(30) == 22
    assert futures[2].result(30) == 30
    with pytest.raises(ValueError, match="13"):
        futures[1].result(30)
    queue.close()


def test_who_gives_up_is_not_computed(answers):
    answers.go.clear()
    queue = batcher(answers, wait_s=0.0)
    queue.submit(0)
    while not answers.batches:
        time.sleep(0.001)
    gone, stays = queue.submit(2), queue.submit(4)
    assert gone.cancel()
    answers.go.set()
    assert stays.result(30) == 8
    queue.close()
    assert answers.batches == [[0], [4]]


def test_closing_answers_what_waits_and_takes_no_more(answers):
    queue = batcher(answers, wait_s=60.0, threads=2)
    futures = [queue.submit(2), queue.submit(3)]
    queue.close()
    assert [future.result(0) for future in futures] == [4, 6]
    with pytest.raises(QueueFull):
        queue.submit(4)


def test_a_part_of_a_batch_does_not_go_and_wait_behind_another(answers):
    """With two threads, what cannot be answered yet stays open for others; a full batch goes."""
    answers.go.clear()
    queue = batcher(answers, wait_s=0.0, threads=2)
    first = queue.submit(0)
    while not answers.batches:
        time.sleep(0.001)
    second = [queue.submit(2), queue.submit(4)]
    time.sleep(0.05)
    assert answers.batches == [[0]]
    second += [queue.submit(6), queue.submit(8)]
    while len(answers.batches) < 2:
        time.sleep(0.001)
    third = queue.submit(10)
    answers.go.set()
    assert [future.result(30) for future in (first, *second, third)] == [0, 4, 8, 12, 16, 20]
    queue.close()
    assert answers.batches == [[0], [2, 4, 6, 8], [10]]
