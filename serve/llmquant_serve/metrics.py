"""Prometheus metrics, in a registry of their own so that several servers can live in one
process."""

from __future__ import annotations

import time

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from llmquant import DriftReport
from llmquant_serve.engines.base import Engine

_LATENCY = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters and histograms that requests feed; gauges are read from the engine in
    :meth:`render`."""

    def __init__(self) -> None:
        r = self.registry = CollectorRegistry()
        ProcessCollector(registry=r)
        self.requests = Counter(
            "llmquant_requests", "Requests answered.", ["path", "status"], registry=r
        )
        self.prompt_tokens = Counter(
            "llmquant_prompt_tokens", "Prompt tokens of accepted requests.", registry=r
        )
        self.generated_tokens = Counter(
            "llmquant_generated_tokens", "Tokens generated.", registry=r
        )
        self.aborted = Counter(
            "llmquant_aborted", "Requests whose client disconnected or stalled.", registry=r
        )
        self.time_to_first_token = Histogram(
            "llmquant_time_to_first_token_seconds",
            "From the acceptance of a request to its first token, time in the queue included.",
            buckets=_LATENCY,
            registry=r,
        )
        self.time_per_output_token = Histogram(
            "llmquant_time_per_output_token_seconds",
            "Mean over the tokens of an answer after its first.",
            buckets=_LATENCY,
            registry=r,
        )
        self.running = Gauge("llmquant_sequences_running", "Sequences in the batch.", registry=r)
        self.waiting = Gauge(
            "llmquant_sequences_waiting", "Sequences that wait for the batch.", registry=r
        )
        self.open = Gauge(
            "llmquant_sequences_open",
            "Sequences accepted and not yet fully answered.",
            registry=r,
        )
        self.cached = Gauge("llmquant_cached_tokens", "Tokens in the KV cache.", registry=r)
        self.up = Gauge("llmquant_engine_up", "1 while the engine takes requests.", registry=r)
        self._drift: DriftGauges | None = None
        self.restarts = Gauge("llmquant_engine_restarts", "Restarts of the engine.", registry=r)

    def render(
        self, engine: Engine, open_sequences: int, drift: DriftReport | None = None
    ) -> bytes:
        """All metrics in Prometheus' text format, the gauges as they are now."""
        if drift is not None:
            self._set_drift(drift)
        load, health = engine.load(), engine.health()
        self.running.set(load.running)
        self.waiting.set(load.waiting)
        self.cached.set(load.cached_tokens)
        self.open.set(open_sequences)
        self.up.set(health.ok)
        self.restarts.set(health.restarts)
        text: bytes = generate_latest(self.registry)
        return text

    def _set_drift(self, report: DriftReport) -> None:
        """Gauges of a server that watches drift; another has none."""
        if self._drift is None:
            self._drift = DriftGauges(self.registry)
        self._drift.set(report)


class DriftGauges:
    """Where the monitor is, by statistic."""

    def __init__(self, r: CollectorRegistry) -> None:
        by = ["statistic", "side"]
        self._requests = Gauge(
            "llmquant_drift_requests", "Requests compared with the profile.", registry=r
        )
        self._threshold = Gauge(
            "llmquant_drift_threshold", "Evidence that raises an alarm.", registry=r
        )
        self._evidence = Gauge(
            "llmquant_drift_evidence",
            "Odds against no drift; 1 is none.",
            by,
            registry=r,
        )
        self._recent = Gauge("llmquant_drift_recent", "Mean of the last 20 or so.", by, registry=r)
        self._alarm = Gauge("llmquant_drift_alarm", "1 since an alarm.", by, registry=r)
        self._cause = Gauge(
            "llmquant_drift_cause", "1 for what the alarms say together.", ["cause"], registry=r
        )

    def set(self, report: DriftReport) -> None:
        self._requests.set(report.requests)
        self._threshold.set(report.threshold)
        self._cause.clear()
        self._cause.labels(report.cause).set(1)
        for row in report.rows:
            self._evidence.labels(row.statistic, row.side).set(row.evidence)
            self._alarm.labels(row.statistic, row.side).set(row.alarm is not None)
            if row.recent is not None:
                self._recent.labels(row.statistic, row.side).set(row.recent)


class Clock:
    """Times one choice: its first token, then the mean per further token."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start = time.monotonic()
        self._first: float | None = None  # when the first token came
        self._generated = 0

    def update(self, generated: int) -> None:
        """The choice has ``generated`` tokens by now."""
        if generated and self._first is None:
            self._first = time.monotonic()
            self._metrics.time_to_first_token.observe(self._first - self._start)
        self._metrics.generated_tokens.inc(max(0, generated - self._generated))
        self._generated = max(self._generated, generated)

    def finish(self) -> None:
        """The choice is complete."""
        if self._first is not None and self._generated > 1:
            seconds = time.monotonic() - self._first
            self._metrics.time_per_output_token.observe(seconds / (self._generated - 1))
