"""Replicas of the model, in Ray Serve, as one backend."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from typing import Any

from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from trimode.serving.draining import SHUTTING_DOWN, RunningJobs
from trimode.serving.jobs import Done, Failed, Job, ModelCard, Tokenized, Update
from trimode.serving.sent import AnotherText, Sent

logger = logging.getLogger(__name__)

MAX_TRIES = 3
"""Replicas that one job is given to at most, so that a job that breaks them does not break all."""

LOOK_EVERY_S = 1.0
"""Between two looks at the replicas, for readiness and metrics."""

LATE_S = 5.0
"""So long after a job's deadline its replica is no longer waited for."""

_LOST = Failed(
    status=503,
    code="unavailable",
    message="the replica that made this text was lost; try again",
    retry_after_s=1,
)
_LOST_WATCHED = Failed(
    status=503,
    code="unavailable",
    message="the replica that made this text was lost, and a text whose events are watched is not"
    " made anew; try again",
    retry_after_s=1,
)
_NO_REPLICA = Failed(
    status=503, code="unavailable", message="no replica takes requests now", retry_after_s=5
)
_FULL = Failed(
    status=429, code="overloaded", message="all replicas are busy and enough wait", retry_after_s=1
)
_LATE = Failed(status=504, code="deadline", message="the request's time was up")
_BROKEN = Failed(status=500, code="internal_error", message="a replica broke down; see its log")


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How a replica is.

    Attributes:
        replica: Its id in Ray Serve.
        card: Of its model.
        is_ready: Whether it takes jobs.
        metrics: In Prometheus' text format.
    """

    replica: str
    card: ModelCard
    is_ready: bool
    metrics: str


class RayBackend:
    """Replicas behind `trimode.serving.jobs.Backend`.

    Ray's router gives each job to the less busy of two replicas, and holds it back where all have
    as many as they may. Making a backend waits until a first replica is ready.

    Args:
        handle: Of the deployment of `trimode.serving.ray_app.Replica`.
        on_close: Called last of all, in a thread, to end what was started for it.
    """

    def __init__(self, handle: Any, *, on_close: Callable[[], None] = lambda: None) -> None:
        self._handle = handle
        self._streams = handle.options(stream=True)
        self._on_close = on_close
        self._calls: set[Any] = set()
        self._jobs = RunningJobs()
        self._is_aborting = False
        self._has_stopped = threading.Event()
        self._stopping = threading.Lock()
        self._reports: list[Report] = []
        while not self._look():
            time.sleep(LOOK_EVERY_S / 10)
        self.card = self._reports[0].card
        self._watch = threading.Thread(target=self._keep_looking, name="trimode-watch", daemon=True)
        self._watch.start()

    @property
    def is_ready(self) -> bool:
        """Whether jobs are taken: at the latest look a replica was ready."""
        return self.refusal is None

    @property
    def refusal(self) -> Failed | None:
        """Why none are; None if they are."""
        if self._jobs.is_closing:
            return SHUTTING_DOWN
        return None if self._reports else _NO_REPLICA

    def metrics(self) -> str:
        """Those of all replicas, told apart by the label `replica`, as of the latest look."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Merged(self._reports))
        return generate_latest(registry).decode()

    async def run(self, job: Job) -> AsyncGenerator[Update, None]:
        """Updates of one job; see `trimode.serving.jobs.Backend`.

        If its replica is lost, another makes the text anew, the same for the same seed, and updates
        go on where they ended. It fails if the text comes out otherwise (two machines may differ in
        the last bits), if a watcher of its events would see things twice, and after `MAX_TRIES`.
        """
        if (refusal := self.refusal) is not None:
            yield refusal
            return
        with self._jobs.one_more():
            async with aclosing(self._run(_seeded(job))) as updates:
                async for update in updates:
                    yield update

    async def close(self, *, timeout_s: float) -> None:
        """Take no more jobs, finish those that run until the time is up, abort the rest."""
        if not await self._jobs.drain(timeout_s):
            self._is_aborting = True
            for call in list(self._calls):
                _let_go(call)
        await asyncio.to_thread(self.stop)

    def stop(self) -> None:
        """End it at once, whatever runs; a second time nothing."""
        with self._stopping:
            if not self._has_stopped.is_set():
                self._jobs.is_closing = True
                self._has_stopped.set()
                self._watch.join()  # or it would ask a Ray that is gone, and so start another
                self._on_close()

    async def _run(self, job: Job) -> AsyncGenerator[Update, None]:
        """One try after another, until one brings the end."""
        deadline_s = None if job.timeout_s is None else time.monotonic() + job.timeout_s
        sent = Sent()
        for num_left in reversed(range(MAX_TRIES)):
            async with aclosing(self._try(job, deadline_s)) as updates:
                async for update in updates:
                    if isinstance(update, Failed) and update.code == "unavailable":
                        break
                    try:
                        rest = sent.beyond(update)
                    except AnotherText:
                        yield _LOST
                        return
                    if rest is not None:
                        yield rest
                    if isinstance(update, Done | Tokenized | Failed):
                        return
            if self._is_aborting:
                yield SHUTTING_DOWN
                return
            if not num_left:
                yield _LOST
                return
            if not sent.begin_again():
                yield _LOST_WATCHED
                return
            logger.warning("a replica was lost; another one makes its text anew")

    async def _try(self, job: Job, deadline_s: float | None) -> AsyncGenerator[Update, None]:
        """Updates by one replica; the last is a `Failed` if it is lost."""
        left_s = None if deadline_s is None else max(deadline_s - time.monotonic(), 0.0)
        call = self._streams.run.remote(replace(job, timeout_s=left_s))
        self._calls.add(call)
        is_over = False
        try:
            while not is_over:
                left_s = None if deadline_s is None else deadline_s - time.monotonic() + LATE_S
                update = await asyncio.wait_for(anext(call), left_s)
                is_over = isinstance(update, Done | Tokenized | Failed)
                yield update
        except TimeoutError:
            yield _LATE
        except BackPressureError:
            yield _FULL
        except RayTaskError:
            logger.exception("a replica raised")
            yield _BROKEN
        except (RayError, RayServeException, StopAsyncIteration) as error:
            logger.debug("a replica is lost: %s", error)
            yield _LOST
        finally:
            self._calls.discard(call)
            if not is_over:
                _let_go(call)

    def _keep_looking(self) -> None:
        while not self._has_stopped.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> bool:
        """Ask every replica how it is; whether one at least is ready."""
        try:
            asked = self._handle.broadcast("report")
            answers = asked.results(timeout_s=LATE_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError):
            answers = []
        reports = [one for one in answers if isinstance(one, Report) and one.is_ready]
        self._reports = sorted(reports, key=lambda report: report.replica)
        return bool(reports)


class Merged:
    """What several replicas measured, each sample with its replica, as a collector."""

    def __init__(self, reports: list[Report]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        """A metric once, with the samples of all."""
        merged: dict[str, Metric] = {}
        for report in self._reports:
            for family in text_string_to_metric_families(report.metrics):
                metric = Metric(family.name, family.documentation, family.type)
                metric = merged.setdefault(family.name, metric)
                for sample in family.samples:
                    labels = {**sample.labels, "replica": report.replica}
                    metric.add_sample(sample.name, labels, sample.value)
        yield from merged.values()


def _seeded(job: Job) -> Job:
    """With a seed, so that every try makes the same text."""
    if job.options.get("seed") is not None:
        return job
    return replace(job, options={**job.options, "seed": secrets.randbits(32)})


def _let_go(call: Any) -> None:
    """Have Ray cancel a call, wherever it is."""
    with suppress(Exception):  # those of the call itself, which nobody asks for any more
        call.cancel()
