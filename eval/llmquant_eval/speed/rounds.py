"""Several models measured in turn, round by round, each time in a fresh process.

A machine's speed drifts while it works: clocks fall as it warms up, other programs come and go. So
models take turns, every second round in the opposite order, and a ratio is formed within each
round before the median over rounds is taken.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import llmquant
from llmquant import Inspection
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.models.resolve import ModelFolder, max_positions
from llmquant_eval.report import machine
from llmquant_eval.speed.process import Conditions, measure_apart
from llmquant_eval.speed.schema import (
    ModelSpeed,
    Point,
    PointSpeed,
    ProcessTimes,
    SpeedReport,
    Spread,
    Timing,
)

log = logging.getLogger(__name__)
PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured.

    Attributes:
        models: the first is what ratios are to.
        points: prompt lengths and batch sizes, each with each.
        rounds: how often each model is measured.
    """

    models: Sequence[ModelFolder]
    points: Sequence[Point]
    conditions: Conditions
    rounds: int


@dataclass(slots=True)
class _Found:
    """What was measured of a model so far: round → times."""

    model: ModelFolder
    known: Inspection
    rounds: dict[int, ProcessTimes] = field(default_factory=dict)
    failure: str | None = None


def fitting_points(
    models: Sequence[ModelFolder],
    prompt_tokens: Sequence[int],
    batch_sizes: Sequence[int],
    new_tokens: int,
) -> list[Point]:
    """Every prompt length with every batch size, small ones first.

    Args:
        prompt_tokens: none for 512, or what every model's context takes where that is less.

    Raises:
        UsageError: a context is too short for a prompt and the new tokens.
    """
    contexts = {m: c for m in models if (c := max_positions(m.path)) is not None}
    rooms = {model: context - new_tokens - 1 for model, context in contexts.items()}
    chosen = list(prompt_tokens) or [max(1, min(PROMPT_TOKENS, *rooms.values(), PROMPT_TOKENS))]
    for model, room in rooms.items():
        if max(chosen) > room:
            raise UsageError(
                f"{model.source} takes {contexts[model]} tokens: a prompt of {max(chosen)} and {new_tokens} new ones do not fit; "
                "lower --prompt-tokens or --new-tokens"
            )
    return [
        Point(prompt_tokens=p, batch_size=b) for b in sorted(batch_sizes) for p in sorted(chosen)
    ]


def run_bench(
    bench: Bench,
    tell: Callable[[str], None] = log.info,
    keep: Callable[[SpeedReport], None] = lambda report: None,
) -> SpeedReport:
    """Measure.

    A model that fails is left out of later rounds; its row says why.

    Args:
        tell: gets a line after each process.
        keep: gets the report so far after each round.

    Raises:
        CheckpointError: a folder that is not a model, or a damaged one.
    """
    found = [_Found(model, llmquant.inspect(model.path)) for model in bench.models]
    report = _report(bench, found, 0)
    for number in range(bench.rounds):
        for one in found if number % 2 == 0 else reversed(found):
            if one.failure is None:
                tell(f"round {number + 1} of {bench.rounds}: {_measured(one, number, bench)}")
        report = _report(bench, found, number + 1)
        keep(report)
        if all(one.failure for one in found):
            break
    return report


def _measured(one: _Found, number: int, bench: Bench) -> str:
    """Measure a model in one round; returns what people should read."""
    try:
        times = measure_apart(one.model.path, bench.points, bench.conditions)
    except LlmquantError as e:
        one.failure = str(e)
        return f"{one.model.label} failed: {e}"
    one.rounds[number] = times
    new = bench.conditions.new_tokens
    speeds = (
        f"{t.point}: prefill {_prefill(t):,.0f}, decode {_decode(t, new):,.1f} tokens/s"
        for t in times.timings
    )
    return f"{one.model.label}, loaded in {times.load_seconds:.1f} s; " + "; ".join(speeds)


def _prefill(timing: Timing) -> float:
    """Tokens per second, of all rows."""
    point = timing.point
    return point.batch_size * point.prompt_tokens / timing.prefill_seconds[0]


def _decode(timing: Timing, new_tokens: int) -> float:
    return timing.point.batch_size * new_tokens / timing.decode_seconds[0]


def _report(bench: Bench, found: Sequence[_Found], done: int) -> SpeedReport:
    conditions = bench.conditions
    return SpeedReport(
        created=datetime.now(UTC).replace(microsecond=0),
        device=conditions.device,
        kernel=conditions.kernel,
        new_tokens=conditions.new_tokens,
        rounds=bench.rounds,
        rounds_done=done,
        models=tuple(_model_speed(one, found[0], bench) for one in found),
        versions=machine.versions(),
        hardware=machine.hardware(conditions.device),
    )


def _model_speed(one: _Found, first: _Found, bench: Bench) -> ModelSpeed:
    known, times = one.known, list(one.rounds.values())
    return ModelSpeed(
        label=one.model.label,
        source=one.model.source,
        scheme=known.scheme,
        bytes_on_disk=known.bytes_on_disk,
        dtype=times[0].dtype if times else None,
        kernels=times[0].kernels if times else {},
        load_seconds=Spread.of(t.load_seconds for t in times) if times else None,
        memory_floor_bytes=min(t.memory_floor_bytes for t in times) if times else None,
        points=tuple(
            _point_speed(one, first, i, bench) for i in range(len(times and bench.points))
        ),
        failure=one.failure,
    )


def _point_speed(one: _Found, first: _Found, index: int, bench: Bench) -> PointSpeed:
    new = bench.conditions.new_tokens
    timings = {number: t.timings[index] for number, t in one.rounds.items()}
    base = {number: t.timings[index] for number, t in first.rounds.items()}
    both = [] if one is first else sorted(timings.keys() & base.keys())
    device_peaks = [
        t.device_peak_bytes for t in timings.values() if t.device_peak_bytes is not None
    ]
    return PointSpeed(
        point=next(iter(timings.values())).point,
        first_token_seconds=Spread.of(t.prefill_seconds[0] for t in timings.values()),
        prefill_tokens_per_second=Spread.of(map(_prefill, timings.values())),
        decode_tokens_per_second=Spread.of(_decode(t, new) for t in timings.values()),
        prefill_ratio=Spread.of(_prefill(timings[n]) / _prefill(base[n]) for n in both)
        if both
        else None,
        decode_ratio=Spread.of(_decode(timings[n], new) / _decode(base[n], new) for n in both)
        if both
        else None,
        peak_memory_bytes=max(t.peak_memory_bytes for t in timings.values()),
        device_peak_bytes=max(device_peaks, default=None),
    )
