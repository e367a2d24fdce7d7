"""The counters of the server, in the text format that Prometheus reads."""

import os
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10)  # upper ends of the buckets
BATCH = (1, 2, 4, 8, 16, 32, 64, 128)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHARED = "PROMETHEUS_MULTIPROC_DIR"  # set where several workers add up their numbers in files


class Metrics:
    """Counters of one process, or of all workers if the environment names a folder for them."""

    def __init__(self, num_waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "espalier_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )
        self._by_outcome: dict[tuple[str, int], Counter] = {}
        latency = Histogram(
            "espalier_predict_seconds",
            "From a whole request to its answer.",
            buckets=LATENCY_S,
            registry=self._registry,
        )
        batch = Histogram("espalier_batch_size", "Samples of one call.", buckets=BATCH, registry=self._registry)
        self.latency: Callable[[float], None] = latency.observe
        self.batch: Callable[[float], None] = batch.observe
        self._queue = Gauge(
            "espalier_queue_samples", "Samples that wait.", registry=self._registry, multiprocess_mode="livesum"
        )
        self._num_waiting = num_waiting

    def count(self, route: str, status: int) -> None:
        """Count one more request; `route` is one of the server's own, so that no client can make up names."""
        key = (route, status)
        if key not in self._by_outcome:
            self._by_outcome[key] = self._requests.labels(route, str(status))
        self._by_outcome[key].inc()

    def text(self) -> bytes:
        """Return all present values; with several workers, the queue is the sum of their last values."""
        self._queue.set(self._num_waiting())
        registry = self._registry
        if SHARED in os.environ:
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)
