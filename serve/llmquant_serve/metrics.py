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

from llmquant_serve.engines.base import Engine

_LATENCY = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    """Counters that the routes feed; gauges are read from the engine when asked for."""

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
            "llmquant_aborted", "Requests whose client went away or stalled.", registry=r
        )
        self.first = Histogram(
            "llmquant_time_to_first_token_seconds",
            "From acceptance, queue included.",
            buckets=_LATENCY,
            registry=r,
        )
        self.between = Histogram(
            "llmquant_time_per_output_token_seconds",
            "Mean of an answer, after its first token.",
            buckets=_LATENCY,
            registry=r,
        )
        self.running = Gauge("llmquant_sequences_running", "Sequences in the batch.", registry=r)
        self.waiting = Gauge(
            "llmquant_sequences_waiting", "Sequences that wait for the batch.", registry=r
        )
        self.open = Gauge(
            "llmquant_sequences_open",
            "Sequences accepted and not yet answered to the end.",
            registry=r,
        )
        self.cached = Gauge(
            "llmquant_cached_tokens", "Tokens whose keys and values are held.", registry=r
        )
        self.up = Gauge("llmquant_engine_up", "1 while the engine takes requests.", registry=r)
        self.restarts = Gauge(
            "llmquant_engine_restarts", "Times that the engine was started again.", registry=r
        )

    def render(self, engine: Engine, open_sequences: int) -> bytes:
        """The text format, gauges refreshed."""
        load, health = engine.load(), engine.health()
        self.running.set(load.running)
        self.waiting.set(load.waiting)
        self.cached.set(load.cached_tokens)
        self.open.set(open_sequences)
        self.up.set(health.ok)
        self.restarts.set(health.restarts)
        text: bytes = generate_latest(self.registry)
        return text


class Clock:
    """Times one choice: first token, then the mean per further token."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._began = time.monotonic()
        self._first: float | None = None
        self._made = 0

    def saw(self, made: int) -> None:
        """``made`` tokens exist by now."""
        if made and self._first is None:
            self._first = time.monotonic()
            self._metrics.first.observe(self._first - self._began)
        self._metrics.generated_tokens.inc(made - self._made if made > self._made else 0)
        self._made = max(self._made, made)

    def done(self) -> None:
        if self._first is not None and self._made > 1:
            self._metrics.between.observe((time.monotonic() - self._first) / (self._made - 1))
