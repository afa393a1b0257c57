"""Dynamic batching: requests of many threads, answered together.

A batch leaves when it is full, or when its oldest request has waited as long as it may and no other
batch is in the making: behind one it would only wait again, and shut out who comes meanwhile. Only
requests with the same key share a batch. The queue is bounded: what does not fit is refused at
once, so that everyone who waits knows that it will not be for long.
"""

import collections
import math
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any


class QueueFull(Exception):
    """No room, or no more requests are taken."""

    def __init__(self, retry_after_s: int):
        super().__init__(f"too many requests are waiting: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Batcher:
    """A bounded queue and the threads that empty it."""

    def __init__(
        self,
        answer: Callable[[Sequence], Sequence],
        key: Callable[[Any], Hashable],
        *,
        max_users: int,
        wait_s: float,
        max_queue: int,
        threads: int = 1,
    ):
        """Starts the threads.

        Args:
          answer: requests of one key, at most `max_users`, to as many results.
          key: what a batch's requests have in common.
          wait_s: longest time that a request waits for others to come.
          max_queue: requests that may wait.
          threads: batches in the making at a time; `answer` is called by all of them.
        """
        self.max_users, self.wait_s, self.max_queue = max_users, wait_s, max_queue
        self._answer, self._key = answer, key
        self._waiting: dict[Hashable, collections.deque] = {}
        self._changed = threading.Condition()
        self._closed = False
        self._length = self._busy = 0
        self._batch_s = 0.0  # of the latest batch
        self._threads = [
            threading.Thread(target=self._run, name="batcher", daemon=True) for _ in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def __len__(self):
        """Requests that wait."""
        return self._length

    def submit(self, request) -> Future:
        """The result to come; cancelling it in time takes the request out of the queue.

        Raises:
          QueueFull: come back later.
        """
        future = Future()
        with self._changed:
            if self._closed or self._length >= self.max_queue:
                batches = self._length / self.max_users
                raise QueueFull(max(1, math.ceil(batches * self._batch_s)))
            waiting = self._waiting.setdefault(self._key(request), collections.deque())
            waiting.append((time.monotonic(), request, future))
            self._length += 1
            self._changed.notify()
        return future

    def close(self) -> None:
        """Takes no more requests and returns when those that wait are answered."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _take(self) -> list | None:
        """The next batch, less what was cancelled; None when closed and done."""
        with self._changed:
            while True:
                if not self._waiting and self._closed:
                    return None
                full = [k for k, queue in self._waiting.items() if len(queue) >= self.max_users]
                oldest = min(self._waiting, key=lambda k: self._waiting[k][0][0], default=None)
                left = None
                if oldest is not None:
                    left = self._waiting[oldest][0][0] + self.wait_s - time.monotonic()
                due = left is not None and left <= 0 and not self._busy
                if full or due or (self._waiting and self._closed):
                    # The oldest first, if both have a claim: a busy key must not starve another.
                    key = oldest if left <= 0 or not full else full[0]
                    break
                self._changed.wait(None if left is None or left <= 0 else left)
            queue = self._waiting[key]
            batch = [queue.popleft() for _ in range(min(len(queue), self.max_users))]
            if not queue:
                del self._waiting[key]
            self._length -= len(batch)
            self._busy += 1
        return [entry for entry in batch if entry[2].set_running_or_notify_cancel()]

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            start = time.monotonic()
            if batch:
                self._resolve(batch)
                self._batch_s = time.monotonic() - start
            with self._changed:
                self._busy -= 1
                self._changed.notify_all()

    def _resolve(self, batch: list) -> None:
        try:
            results = self._answer([request for _, request, _ in batch])
        except Exception as error:
            if len(batch) == 1:
                batch[0][2].set_exception(error)
            else:  # whoever is to blame, the others shall have their answers
                for entry in batch:
                    self._resolve([entry])
            return
        for (_, _, future), result in zip(batch, results, strict=True):
            future.set_result(result)
