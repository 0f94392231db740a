"""The Report: one evaluation run as JSON, enough to repeat it and to know what may be compared with
it.

Every metric carries its protocol id, its standard error and the number of tokens and windows it is
made of. Hashes say which weights, tokenizer, recipe and text were used; versions, hardware, dtype
and kernel say on what. A reader of another schema version must refuse rather than guess, and
unknown fields are errors (``extra="forbid"``).

``to_json`` and ``from_json`` are inverse: floats are written with all their digits, NaN and
infinities are refused.
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
ErrorMethod = Literal["by window", "block bootstrap"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Metric(_Strict):
    """One measured number. ``unit``: perplexity, ratio, nats, bits, share (0 … 1) or probability.

    ``error_method`` says how ``standard_error`` was computed; None where there is none.
    """

    protocol: str
    unit: Literal["perplexity", "ratio", "nats", "bits", "share", "probability"]
    value: Finite
    standard_error: Finite | None
    error_method: ErrorMethod | None = None
    tokens: int
    windows: int


class Cost(_Strict):
    """What a model costs to run, measured in a process of its own (see
    :mod:`llmquant_eval.run.cost`).

    Seconds; tokens per second at batch 1, the median of ``repeats``; bytes. ``memory_floor_bytes``
    is the resident set after the imports and before the model, so the model's own part is the
    difference. ``device_peak_bytes`` is the accelerator's, None on CPU.
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


class Bucket(_Strict):
    """The positions whose confidence or context lies in ``[lower, upper)`` (the last bucket has its
    upper edge)."""

    lower: Finite
    upper: Finite
    tokens: int
    kl_mean: Finite
    standard_error: Finite | None
    top1_agreement: Finite


class Breakdown(_Strict):
    """KL by the reference's confidence (probability of its first choice) or by context (tokens
    before the position)."""

    protocol: str
    by: Literal["confidence", "context"]
    buckets: list[Bucket]


class CompactKlShift(_Strict):
    """What the compact form of a cached reference changed in this model's KL: compact - exact in
    nats, on a sample."""

    protocol: str
    form: str
    positions: int
    mean: Finite
    largest: Finite


class TaskMetric(_Strict):
    """One figure of one task over ``items`` documents, as lm-eval aggregates it.

    ``correct`` has a ``1`` or ``0`` per item, in the task's order, where the metric is right or
    wrong for each.
    """

    value: Finite
    standard_error: Finite | None
    correct: Annotated[str, Field(pattern=r"^[01]+$")] | None


class PairedMetric(_Strict):
    """The same items answered by the reference and this model.

    ``lost`` items the reference had right and this model has wrong, ``gained`` the other way round;
    ``difference`` is candidate minus reference with its paired standard error; ``p_value`` is
    McNemar's exact test, two-sided.
    """

    lost: int
    gained: int
    both_right: int
    both_wrong: int
    difference: Finite
    standard_error: Finite | None
    p_value: Finite


class SampleFile(_Strict):
    """A JSON Lines file with everything lm-eval logged for each item; ``path`` is relative to the
    report."""

    path: str
    sha256: Sha256


class TaskResult(_Strict):
    """One lm-eval task. ``items_sha256`` is over the documents' hashes: two results are paired only
    if it is equal."""

    task: str
    version: str | None
    lm_eval: str
    few_shot: int
    items: int
    items_available: int
    items_sha256: Sha256
    metrics: dict[str, TaskMetric]
    paired: dict[str, PairedMetric] = {}
    samples: SampleFile | None = None

    @property
    def protocol(self) -> str:
        return f"task/{self.task}"


class ModelResult(_Strict):
    """One model of the run: who it is, how big, and what it scored.

    What a running server does not tell (weights, sizes) is None. Metrics of the run's first
    protocol go by their plain name; a later protocol's metric of the same name is
    ``name@protocol``.
    """

    label: str
    role: Role
    source: str
    weights_sha256: Sha256 | None
    tokenizer_sha256: Sha256
    recipe_sha256: Sha256 | None
    scheme: str
    quantized_linears: int
    linears: int
    parameters: int | None
    bytes_on_disk: int | None
    bits_per_weight: Finite | None
    kernels: dict[str, int]
    metrics: dict[str, Metric]
    breakdowns: list[Breakdown] = []
    cache_errors: list[CompactKlShift] = []
    tasks: list[TaskResult] = []
    excluded_tokens: int
    cost: Cost | None


class NoiseFloor(_Strict):
    """KL and top-1 agreement of the reference with itself at ``other_dtype``: what rounding alone
    looks like."""

    other_dtype: str
    kl_mean: Metric
    top1_agreement: Metric


class ProtocolPass(_Strict):
    """One protocol of the run and how much of the text it scored; fewer windows than available is a
    partial run."""

    perplexity: str
    divergence: str | None
    tokens: int
    scored: int
    windows: int
    windows_available: int


class ReportText(_Strict):
    """The evaluation text, and how much of it the run's first protocol scored.

    :class:`ProtocolPass` has every protocol.
    """

    source: str
    sha256: Sha256
    tokens: int
    windows: int
    windows_available: int
    window: int


class Settings(_Strict):
    """How the models were run, as asked for: ``kernel`` "auto" and ``batch_size`` None were chosen
    automatically.

    ``dtype_reason`` says why the dtype is what it is where ``auto`` was asked for; older reports do
    not have it.
    """

    dtype: str
    dtype_reason: str | None = None
    device: str
    kernel: str
    batch_size: int | None


class Hardware(_Strict):
    """The machine. ``cores`` are those this process may use; memory in bytes.

    ``instruction_sets`` are those of the processor that torch may use; older reports do not have
    them.
    """

    processor: str
    cores: int
    threads: int
    memory_bytes: int
    accelerator: str | None
    instruction_sets: list[str] | None = None


class Report(_Strict):
    """One run of ``llmquant eval``: its command, settings and the results of its models."""

    schema_version: Literal[1] = 1
    created: AwareDatetime
    command: str
    protocols: list[str]
    passes: list[ProtocolPass] = []
    text: ReportText | None
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
            UsageError: not JSON, another schema version, or fields that do not fit; names the
                source and the field.
        """
        try:
            raw = json.loads(text)
        except json.JSONDecodeError as e:
            raise UsageError(
                f"{source} is not JSON ({e}); give a file that `llmquant eval --output` wrote"
            ) from e
        version = raw.get("schema_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise UsageError(
                f"{source} has schema_version {version}, of a newer llmquant; this one reads {SCHEMA_VERSION}. Update llmquant, "
                "or run the evaluation again"
            )
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
