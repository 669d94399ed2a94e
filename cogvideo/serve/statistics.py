"""What /metrics tells Prometheus: jobs by state, the oldest that waits, requests and their times."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

if TYPE_CHECKING:
    from cogvideo.serve.jobs import JobStore

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)  # seconds


class Statistics:
    """Counters of this server, and gauges of the queue that all servers share."""

    def __init__(self, store: "JobStore"):
        self._store = store
        self._registry = CollectorRegistry()
        labels = ("method", "route")
        self._requests = Counter(
            "cogvideo_requests", "Requests.", (*labels, "status"), registry=self._registry
        )
        self._seconds = Histogram(
            "cogvideo_request_seconds",
            "Seconds until the answer.",
            labels,
            registry=self._registry,
            buckets=BUCKETS,
        )
        self._registry.register(self)

    def count(self, method: str, route: str, status: int, seconds: float) -> None:
        self._requests.labels(method, route, status).inc()
        self._seconds.labels(method, route).observe(seconds)

    def describe(self) -> list[GaugeMetricFamily]:
        """None: what the queue has is looked up at each scrape, not at registration."""
        return []

    def collect(self) -> Iterator[GaugeMetricFamily]:
        counts = self._store.counts()
        states = GaugeMetricFamily("cogvideo_jobs", "Jobs by state.", labels=("status",))
        for status, count in counts.by_status.items():
            states.add_metric((status,), count)
        yield states
        yield GaugeMetricFamily(
            "cogvideo_oldest_queued_seconds", "How long the first in line waits.", counts.oldest_queued
        )
        yield GaugeMetricFamily("cogvideo_result_bytes", "Bytes of all results.", counts.result_bytes)

    def text(self) -> tuple[bytes, str]:
        """The metrics, and their content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
