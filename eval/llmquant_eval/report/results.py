"""What a Report says of one model: its metrics, where its divergence sits, its tasks, its cost.

Every metric carries its protocol id, its standard error and the number of tokens and windows it is
made of. Unknown fields are errors, NaN and infinities are refused. The run around the models is in
:mod:`llmquant_eval.report.schema`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Finite = Annotated[float, Field(allow_inf_nan=False)]

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

Role = Literal["reference", "candidate"]

ErrorMethod = Literal["by window", "by chat", "block bootstrap"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class Metric(Strict):
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


class Cost(Strict):
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


class Bucket(Strict):
    """The positions whose confidence or context lies in ``[lower, upper)`` (the last bucket has its
    upper edge)."""

    lower: Finite
    upper: Finite
    tokens: int
    kl_mean: Finite
    standard_error: Finite | None
    top1_agreement: Finite


class Breakdown(Strict):
    """KL by the reference's confidence (probability of its first choice) or by context (tokens
    before the position)."""

    protocol: str
    by: Literal["confidence", "context"]
    buckets: list[Bucket]


class CompactKlShift(Strict):
    """What the compact form of a cached reference changed in this model's KL: compact - exact in
    nats, on a sample."""

    protocol: str
    form: str
    positions: int
    mean: Finite
    largest: Finite


class TaskMetric(Strict):
    """One figure of one task over ``items`` documents, as lm-eval aggregates it.

    ``correct`` has a ``1`` or ``0`` per item, in the task's order, where the metric is right or
    wrong for each.
    """

    value: Finite
    standard_error: Finite | None
    correct: Annotated[str, Field(pattern=r"^[01]+$")] | None


class PairedMetric(Strict):
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


class SampleFile(Strict):
    """A JSON Lines file with everything lm-eval logged for each item; ``path`` is relative to the
    report."""

    path: str
    sha256: Sha256


class TaskResult(Strict):
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


class ModelResult(Strict):
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
