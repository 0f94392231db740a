"""The Report: one evaluation run as JSON, enough to repeat it and to know what may be compared with it.

Every metric carries its protocol id, its standard error and the number of tokens and windows behind it. Hashes say
which weights, tokenizer, recipe and text were used; versions, hardware, dtype and kernel say on what. A reader of
another schema version must refuse rather than guess, and unknown fields are errors (``extra="forbid"``).

``to_json`` and ``from_json`` are inverse: floats are written with all their digits, NaN and infinities are refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError

from llmquant.errors import UsageError

SCHEMA_VERSION = 1

Finite = Annotated[float, Field(allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Role = Literal["reference", "candidate"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Metric(_Strict):
    """One measured number. ``unit``: perplexity, ratio, nats, share (0 … 1) or probability."""

    protocol: str
    unit: Literal["perplexity", "ratio", "nats", "share", "probability"]
    value: Finite
    standard_error: Finite | None
    tokens: int
    windows: int


class Cost(_Strict):
    """What a model costs to run, measured in a process of its own (see :mod:`llmquant_eval.cost`).

    Seconds; tokens per second at batch 1, the median of ``repeats``; bytes. ``memory_floor_bytes`` is the resident set
    after the imports and before the model, so the model's own part is the difference.
    ``device_peak_bytes`` is the accelerator's, None on CPU.
    """

    load_seconds: Finite
    prefill_tokens_per_second: Finite
    decode_tokens_per_second: Finite
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int
    peak_memory_bytes: int
    memory_floor_bytes: int
    device_peak_bytes: int | None


class ModelResult(_Strict):
    """One model of the run: who it is, how big, and what it scored."""

    label: str
    role: Role
    source: str
    weights_sha256: Sha256
    tokenizer_sha256: Sha256
    recipe_sha256: Sha256 | None
    scheme: str
    quantized_linears: int
    linears: int
    parameters: int
    bytes_on_disk: int
    bits_per_weight: Finite | None
    kernels: dict[str, int]
    metrics: dict[str, Metric]
    excluded_tokens: int
    cost: Cost | None


class NoiseFloor(_Strict):
    """KL and top-1 agreement of the reference with itself at ``other_dtype``: what rounding alone looks like."""

    other_dtype: str
    kl_mean: Metric
    top1_agreement: Metric


class Text(_Strict):
    """The evaluation text and how much of it was scored."""

    source: str
    sha256: Sha256
    tokens: int
    windows: int
    windows_available: int
    window: int


class Settings(_Strict):
    """How the models were run, as asked for: ``kernel`` "auto" and ``batch_size`` None were chosen automatically."""

    dtype: str
    device: str
    kernel: str
    batch_size: int | None


class Hardware(_Strict):
    """The machine. ``cores`` are those this process may use; memory in bytes."""

    processor: str
    cores: int
    threads: int
    memory_bytes: int
    accelerator: str | None


class Report(_Strict):
    """One run of ``llmquant eval``."""

    schema_version: Literal[1] = 1
    created: AwareDatetime
    command: str
    protocols: list[str]
    text: Text
    settings: Settings
    reference: str | None
    noise_floor: NoiseFloor | None
    models: list[ModelResult]
    versions: dict[str, str]
    hardware: Hardware

    def to_json(self) -> str:
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the report") -> Report:
        """Parse a report.

        Raises:
            UsageError: not JSON, another schema version, or fields that do not fit; names the source and the field.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as e:
            raise UsageError(f"{source} is not JSON: {e}") from e
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{source} has schema_version {version!r} and this llmquant reads {SCHEMA_VERSION}; "
                "run the evaluation again"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as e:
            first = e.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UsageError(f"{source}: {where}: {first['msg']}") from e

    def model(self, label: str) -> ModelResult:
        """The result with that label; raises KeyError."""
        for result in self.models:
            if result.label == label:
                return result
        raise KeyError(label)


def read_report(path: Path) -> Report:
    """A report from a file.

    Raises:
        UsageError: unreadable, or not a report of this version.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} cannot be read: {e}") from e
    return Report.from_json(text, str(path))
