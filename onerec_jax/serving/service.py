"""The serving core behind the HTTP server: load, warm, batch, watch the run folder, stop.

The recommender is swapped by one assignment. Queries carry the recommender that checked them, and
a batch holds queries of one recommender, so a swap fails no request and mixes no catalogues.
"""

import pathlib
import sys
import threading
import time
from concurrent.futures import Future

import numpy as np

from onerec_jax.distributed import fetch
from onerec_jax.generation.beam import refuse_nan
from onerec_jax.serving.batching import Batcher
from onerec_jax.serving.catalogue import CATALOGUE
from onerec_jax.serving.config import ServiceConfig
from onerec_jax.serving.metrics import STAGES, Metrics
from onerec_jax.serving.recommender import Query, Recommender


class NotReady(Exception):
    """The model is not compiled yet, or the server is about to stop."""


class Service:
    """One run folder, served."""

    def __init__(self, folder, config: ServiceConfig = ServiceConfig(), *, say=None):  # noqa: B008
        self.folder, self.config = pathlib.Path(folder), config
        self.metrics = Metrics()
        self.recommender: Recommender | None = None
        self.stopping = False
        self._say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._sample = None
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._seen, self._retry_at, self._complaint = None, 0.0, ""
        self._device = threading.Lock()
        self.batcher = Batcher(
            self._answer,
            lambda query: (query[0].recommender, query[0].beam_width),
            max_users=config.users[-1],
            wait_s=config.wait_ms / 1e3,
            max_queue=config.max_queue,
            threads=2,  # while one searches, the other gathers the next batch
        )
        self.metrics.queue.set_function(lambda: len(self.batcher))

    def start(self) -> None:
        """Loads and compiles; after it the service is ready.

        Raises:
          InputError: the run folder cannot be served.
        """
        self._seen = self._signature()
        recommender = Recommender.load(self.folder)
        self._warm(recommender)
        self._take_up(recommender)
        self._watcher.start()

    def close(self) -> None:
        """Answers what waits, then stops."""
        self._stop.set()
        self.batcher.close()
        if self._watcher.is_alive():
            self._watcher.join(10)  # it may be compiling, which nothing interrupts

    # ------------------------------------------------------------------------------- requests

    def ready(self) -> Recommender:
        """The recommender of the moment; `NotReady` before the first."""
        if self.recommender is None:
            raise NotReady("the model is still being compiled: try again in 5 s")
        return self.recommender

    def width(self, beam_width: int, n: int) -> int:
        """The compiled width that serves a request."""
        return next(w for w in self.config.widths if w >= max(beam_width, n))

    def submit(self, query: Query) -> Future:
        """The items of a query, to come: a list of dicts.

        Raises:
          QueueFull: come back later.
        """
        return self.batcher.submit((query, time.perf_counter()))

    def _answer(self, entries) -> list[list[dict]]:
        queries = [query for query, _ in entries]
        recommender = queries[0].recommender
        clock = [time.perf_counter()]
        for _, arrived in entries:
            self.metrics.stage.labels("queue").observe(clock[0] - arrived)
        self.metrics.batch.observe(len(queries))
        size = next(users for users in self.config.users if users >= len(queries))
        batch = recommender.gather(queries, size, self.config.filter_size)
        clock.append(time.perf_counter())
        with self._device:
            clock.append(time.perf_counter())
            beams = fetch(recommender.search(*batch, queries[0].beam_width))
        clock.append(time.perf_counter())
        lists = [
            [
                recommender.catalogue.describe(row) | {"logp": float(logp)}
                for row, logp in zip(*found, strict=True)
            ]
            for found in recommender.lists(queries, beams)
        ]
        clock.append(time.perf_counter())
        for stage, seconds in zip(STAGES[1:], np.diff(clock), strict=True):
            self.metrics.stage.labels(stage).observe(seconds)
        self.metrics.short.inc(sum(query.n for query in queries) - sum(map(len, lists)))
        self._sample = queries[0]
        return lists

    # ---------------------------------------------------------------------- model and catalogue

    def _warm(self, recommender: Recommender) -> None:
        """Compiles every shape that requests can have."""
        for width in self.config.widths:
            query = recommender.query([], beam_width=width)
            for users in self.config.users:
                start = time.perf_counter()
                batch = recommender.gather([query], users, self.config.filter_size)
                beams = fetch(recommender.search(*batch, query.beam_width))
                refuse_nan(beams)
                recommender.lists([query], beams)
                self._say(
                    f"{users} users, {query.beam_width} beams: ready after "
                    f"{time.perf_counter() - start:.1f} s"
                )
        recommender.legality(query, self.config.widths[0])

    def _take_up(self, recommender: Recommender) -> None:
        self.recommender = recommender
        self.metrics.step.set(recommender.step)
        self._say(f"serving {self.folder}, step {recommender.step}")

    def _signature(self):
        """What changes with a new checkpoint, catalogue or run."""
        names = [self.folder / name for name in ("config.json", "features.json", CATALOGUE)]
        try:
            names += sorted((self.folder / "checkpoints").iterdir())
            stats = [(path.name, path.stat()) for path in names if path.exists()]
        except OSError:  # between a look and the next, files go
            return None
        return [(name, stat.st_ino, stat.st_mtime_ns) for name, stat in stats]

    def reload(self) -> bool:
        """Takes up what is new in the run folder; True if something was.

        What cannot be served is told and left alone: the old model goes on.
        """
        signature = self._signature()
        if signature == self._seen and not (self._complaint and time.monotonic() > self._retry_at):
            return False
        self._seen, self._retry_at = signature, time.monotonic() + 60
        try:
            recommender = Recommender.load(self.folder, like=self.recommender)
            if recommender is self.recommender:
                self._complaint = ""
                return False
            self._warm(recommender)
        except Exception as error:  # whatever it is, requests go on being answered
            if self._signature() != signature:  # training deleted what was read: look again
                return False
            self.metrics.reloads.labels("failed").inc()
            line = (str(error).splitlines() or [type(error).__name__])[0]
            if line != self._complaint:
                self._say(f"still serving step {self.recommender.step}: {line}")
            self._complaint = line
            return False
        self._complaint = ""
        self._take_up(recommender)
        self.metrics.reloads.labels("loaded").inc()
        return True

    def _watch(self) -> None:
        while not self._stop.wait(self.config.poll_s):
            self.reload()
            sample, self._sample = self._sample, None
            if sample is not None:
                self._measure_legality(sample)

    def _measure_legality(self, query: Query) -> None:
        try:
            legal, total = query.recommender.legality(query, self.config.widths[0])
        except Exception as error:  # a measurement must not end the watch
            self._say(f"legality was not measured: {error}")
            return
        self.metrics.ids.labels("true").inc(legal)
        self.metrics.ids.labels("false").inc(total - legal)
