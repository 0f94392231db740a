"""What a bench found, as JSON. Seconds, bytes, and tokens per second over all rows of a batch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Literal

from pydantic import AwareDatetime, Field

from llmquant_eval.report.results import Finite, Strict
from llmquant_eval.report.schema import Hardware


class Point(Strict):
    """What one generation is asked for: ``batch_size`` prompts of ``prompt_tokens`` each."""

    prompt_tokens: int = Field(ge=1)
    batch_size: int = Field(ge=1)

    def __str__(self) -> str:
        return f"{self.batch_size} × {self.prompt_tokens} tokens"


class Timing(Strict):
    """One point in one process.

    ``prefill_seconds`` (to the first new token) and ``decode_seconds`` (from there to the last) of
    every repetition. The peaks are those of the process so far; points are measured from small to
    large.
    """

    point: Point
    prefill_seconds: tuple[Finite, ...]
    decode_seconds: tuple[Finite, ...]
    peak_memory_bytes: int
    device_peak_bytes: int | None


class ProcessTimes(Strict):
    """What one process measured of one model. ``memory_floor_bytes`` is the resident set after the
    imports and before the model."""

    load_seconds: Finite
    threads: int
    dtype: str
    kernels: Mapping[str, int]
    memory_floor_bytes: int
    timings: tuple[Timing, ...]


class Spread(Strict):
    """The median of several values, the least and the largest."""

    median: Finite
    least: Finite
    most: Finite
    values: tuple[Finite, ...]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of at least one value."""
        found = tuple(values)
        return cls(median=statistics.median(found), least=min(found), most=max(found), values=found)


class PointSpeed(Strict):
    """A model at one point. A ratio is taken within each round, to the first model (None for
    itself), so that what the machine does over time touches both."""

    point: Point
    first_token_seconds: Spread
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    prefill_ratio: Spread | None
    decode_ratio: Spread | None
    peak_memory_bytes: int
    device_peak_bytes: int | None


class ModelSpeed(Strict):
    """A model; without ``load_seconds`` and points where it failed in the first round.

    ``failure`` says why it was not measured to the end.
    """

    label: str
    source: str
    scheme: str
    bytes_on_disk: int | None
    dtype: str | None
    kernels: Mapping[str, int]
    load_seconds: Spread | None
    memory_floor_bytes: int | None
    points: tuple[PointSpeed, ...]
    failure: str | None


class SpeedReport(Strict):
    """What ``llmquant bench`` found. ``rounds`` were asked for and ``rounds_done`` measured."""

    kind: Literal["speed"] = "speed"
    schema_version: Literal[1] = 1
    created: AwareDatetime
    device: str
    kernel: str
    new_tokens: int
    rounds: int
    rounds_done: int
    models: tuple[ModelSpeed, ...]
    versions: Mapping[str, str]
    hardware: Hardware

    def to_json(self) -> str:
        return self.model_dump_json(indent=1) + "\n"
