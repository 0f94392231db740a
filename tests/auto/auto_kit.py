"""What the tests of ``llmquant auto`` share: results of models that were never run."""

from __future__ import annotations

import math

import numpy as np

from llmquant_eval.report.results import Cost, Metric, ModelResult, PairedMetric, TaskResult
from llmquant_eval.report.statistics import ratio_of_sums

ZERO = "0" * 64
TOKENS = 100  # of a window


def metric(value: float, error: float | None, windows: int = 30, **changes: object) -> Metric:
    """A number with its error."""
    given = {
        "protocol": "kl/top-101",
        "unit": "nats",
        "value": value,
        "standard_error": error,
        "error_method": None if error is None else "by window",
        "tokens": TOKENS * windows,
        "windows": windows,
    }
    return Metric.model_validate(given | changes)


def metric_of(sums: np.ndarray) -> Metric:
    """The mean KL of windows with these sums."""
    estimate = ratio_of_sums(sums, np.full(len(sums), float(TOKENS)))
    return metric(estimate.value, estimate.standard_error, len(sums))


def task(lost: int, gained: int, items: int, name: str = "acc") -> TaskResult:
    """A task with its flips."""
    paired = PairedMetric(
        lost=lost,
        gained=gained,
        both_right=items - lost - gained,
        both_wrong=0,
        difference=(gained - lost) / items,
        standard_error=None,
        p_value=1.0,
    )
    return TaskResult(
        task="mine",
        version=None,
        lm_eval="0",
        few_shot=0,
        items=items,
        items_available=items,
        items_sha256=ZERO,
        metrics={},
        paired={name: paired},
    )


def model_result(
    nbytes: int, kl: float, error: float = 0.0005, decode: float | None = None
) -> ModelResult:
    """A candidate of a size and a loss; its perplexity ratio is what the KL would make of it."""
    cost = None
    if decode is not None:
        cost = Cost(
            load_seconds=1,
            prefill_tokens_per_second=1,
            decode_tokens_per_second=decode,
            prompt_tokens=1,
            new_tokens=1,
            repeats=1,
            threads=1,
            peak_memory_bytes=1,
            memory_floor_bytes=1,
            device_peak_bytes=None,
        )
    metrics = {
        "kl_mean": metric(kl, error),
        "perplexity": metric(40.0, 1.0, unit="perplexity"),
        "perplexity_ratio": metric(math.exp(kl), error, unit="ratio"),
    }
    return ModelResult(
        label="candidate",
        role="candidate",
        source="candidate",
        weights_sha256=ZERO,
        tokenizer_sha256=ZERO,
        recipe_sha256=ZERO,
        scheme="W4",
        quantized_linears=1,
        linears=1,
        parameters=1,
        bytes_on_disk=nbytes,
        bits_per_weight=4.0,
        kernels={},
        metrics=metrics,
        excluded_tokens=0,
        cost=cost,
    )
