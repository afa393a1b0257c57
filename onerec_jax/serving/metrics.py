"""What the server tells Prometheus."""

from onerec_jax.errors import InputError

try:
    from prometheus_client import (
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        ProcessCollector,
        generate_latest,
    )
except ImportError as error:
    raise InputError('the server needs more packages: pip install "onerec-jax[serve]"') from error

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
STAGES = ("queue", "gather", "wait", "search", "lists")


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        here = {"registry": self.registry}
        ProcessCollector(**here)
        self.requests = Counter("onerec_requests", "Answered requests", ["route", "status"], **here)
        self.seconds = Histogram(
            "onerec_request_seconds", "From the first byte to the answer", ["route"],
            buckets=SECONDS, **here,
        )  # fmt: skip
        self.stage = Histogram(
            "onerec_stage_seconds",
            "Of a recommendation: in the queue (each request), then of its batch gathering "
            "histories and filters, waiting for the device, searching beams, making lists",
            ["stage"], buckets=SECONDS, **here,
        )  # fmt: skip
        self.queue = Gauge("onerec_queue_length", "Requests that wait for a batch", **here)
        self.batch = Histogram(
            "onerec_batch_users", "Requests in a batch",
            buckets=[2**i for i in range(11)], **here,
        )  # fmt: skip
        self.short = Counter(
            "onerec_missing_items", "Items that lists lack of the number asked for", **here
        )
        self.ids = Counter(
            "onerec_unmasked_ids",
            "Semantic IDs that sampled requests give without the trie, by whether they exist",
            ["exists"], **here,
        )  # fmt: skip
        self.step = Gauge("onerec_model_step", "Training step of the model that serves", **here)
        self.reloads = Counter(
            "onerec_reloads", "Newer models or catalogues found in the run folder",
            ["result"], **here,
        )  # fmt: skip
        for result in ("loaded", "failed"):
            self.reloads.labels(result)
        for exists in ("true", "false"):
            self.ids.labels(exists)
        for stage in STAGES:
            self.stage.labels(stage)

    def text(self) -> bytes:
        """In Prometheus' exposition format."""
        return generate_latest(self.registry)
