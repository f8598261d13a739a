"""What is measured on the model's side, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from trimode.decoding import Stats
from trimode.decoding.params import MODE_NAMES
from trimode.engine import Engine

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)
ABORT_REASONS = ("cancelled", "deadline", "non_finite", "no_token", "error")
_RATIOS = (0.5, 1, 1.25, 1.5, 1.75, 2, 2.5, 3, 4, 6, 8, 12, 16)


class ModelMetrics:
    """Counters of one engine. Safe to use from any thread.

    Args:
        engine: Whose.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry = registry = CollectorRegistry()
        rows = Gauge("trimode_rows", "Texts made together at most", registry=registry)
        rows.set(engine.num_rows)
        running = Gauge("trimode_running", "Texts being made", registry=registry)
        running.set_function(lambda: engine.num_running)
        waiting = Gauge("trimode_waiting", "Texts that wait for a row", registry=registry)
        waiting.set_function(lambda: engine.num_waiting)
        self._batch = Histogram(
            *("trimode_batch_size", "Texts that run, by step"), registry=registry, buckets=_BATCHES
        )
        self._steps = Counter(
            *("trimode_engine_forwards", "Forwards of the network, all texts together"),
            registry=registry,
        )
        self._fed = Counter("trimode_tokens_fed", "Tokens in them", registry=registry)
        self._reused = Counter(
            *("trimode_reused_tokens", "Tokens not fed, for their K/V were there"),
            registry=registry,
        )
        self._preemptions = Counter(
            *("trimode_preemptions", "Times a text gave its row to another"), registry=registry
        )
        self._prompt = Counter(
            "trimode_prompt_tokens", "Of texts that ended", ["mode"], registry=registry
        )
        self._new = Counter(
            "trimode_new_tokens", "Of texts that ended", ["mode"], registry=registry
        )
        self._forwards = Counter(
            *("trimode_forwards", "Forwards that texts took part in", ["mode", "kind"]),
            registry=registry,
        )
        self._tpf = Histogram(
            *("trimode_tokens_per_forward", "New tokens / all forwards, by text", ["mode"]),
            registry=registry,
            buckets=_RATIOS,
        )
        self._accepted = Histogram(
            "trimode_acceptance_length",
            "Accepted drafts plus the AR view's own tokens, by round",
            ["mode"],
            registry=registry,
            buckets=_RATIOS[1:],
        )
        self._speed = Histogram(
            *("trimode_tokens_per_second", "By text, others' work included", ["mode"]),
            registry=registry,
            buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000),
        )
        self._aborted = Counter(
            "trimode_aborted", "Texts that came to no end", ["reason"], registry=registry
        )
        # What may happen is there as a 0 before it does, or its first time is no increase.
        for reason in ABORT_REASONS:
            self._aborted.labels(reason)
        for mode in (*MODE_NAMES, "infill"):
            self._prompt.labels(mode)
            self._new.labels(mode)
        self._seen = (0, 0, 0, 0)

    def note_step(self, num_ended: int) -> None:
        """After a step, in the engine's thread."""
        counts = self._engine.counts
        now = (counts.forwards, counts.tokens_fed, counts.reused_tokens, counts.preemptions)
        counters = (self._steps, self._fed, self._reused, self._preemptions)
        for counter, new, old in zip(counters, now, self._seen, strict=True):
            if new > old:
                counter.inc(new - old)
        if now[0] > self._seen[0]:
            self._batch.observe(self._engine.num_running + num_ended)
        self._seen = now

    def note_done(self, mode: str, stats: Stats, *, prompt_tokens: int) -> None:
        """A text came to its end."""
        self._prompt.labels(mode).inc(prompt_tokens)
        self._new.labels(mode).inc(stats.new_tokens)
        for kind, number in stats.forwards.items():
            if number:
                self._forwards.labels(mode, kind).inc(number)
        self._tpf.labels(mode).observe(stats.tpf_total)
        for length in stats.acceptance_lengths:
            self._accepted.labels(mode).observe(length)
        if stats.seconds:
            self._speed.labels(mode).observe(stats.tokens_per_second)

    def note_abort(self, reason: str) -> None:
        """A text did not."""
        self._aborted.labels(reason).inc()

    def as_text(self) -> str:
        """In Prometheus' text format."""
        return generate_latest(self._registry).decode()
