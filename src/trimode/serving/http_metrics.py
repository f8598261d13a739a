"""What is measured on the HTTP side, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trimode.serving.jobs import Job, Output, Piece

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)


class HttpMetrics:
    """Requests by route and status, and how long things took.

    Args:
        num_active: Says how many are being answered now.
    """

    def __init__(self, num_active: Callable[[], int]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            *("trimode_http_requests", "Requests that ended", ["route", "status"]),
            registry=registry,
        )
        active = Gauge("trimode_http_active", "Jobs' requests being answered", registry=registry)
        active.set_function(num_active)
        self._seconds = Histogram(
            *("trimode_http_request_seconds", "From request to end of answer", ["route"]),
            registry=registry,
            buckets=_SECONDS,
        )
        self._first = Histogram(
            *("trimode_time_to_first_token_seconds", "From job to first token", ["mode"]),
            registry=registry,
            buckets=_SECONDS,
        )
        self._between = Histogram(
            "trimode_time_between_tokens_seconds",
            "Between updates that brought tokens, divided by those tokens",
            ["mode"],
            registry=registry,
            buckets=_GAPS,
        )

    def note(self, route: str, status: int, seconds: float) -> None:
        """A request ended."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    async def watched(
        self, updates: AsyncGenerator[tuple[int, Output], None], jobs: list[Job]
    ) -> AsyncGenerator[tuple[int, Output], None]:
        """The same updates, their times noted."""
        started_s = time.perf_counter()
        latest: dict[int, float] = {}
        async with aclosing(updates):
            async for index, update in updates:
                if isinstance(update, Piece) and update.token_ids:
                    now = time.perf_counter()
                    mode = str(jobs[index].options["mode"])
                    if index not in latest:
                        self._first.labels(mode).observe(now - started_s)
                    else:
                        gap = (now - latest[index]) / len(update.token_ids)
                        self._between.labels(mode).observe(gap)
                    latest[index] = now
                yield index, update

    def as_text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self._registry).decode()
