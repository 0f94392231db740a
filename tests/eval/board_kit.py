"""Reports made by hand for the tests of the leaderboard: two protocols' worth of figures, no model
behind them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from llmquant_eval.leaderboard.board import StoredReport
from llmquant_eval.report.results import (
    Breakdown,
    Bucket,
    Cost,
    Metric,
    ModelResult,
    TaskMetric,
    TaskResult,
)
from llmquant_eval.report.schema import (
    Hardware,
    NoiseFloor,
    ProtocolPass,
    Report,
    ReportText,
    Settings,
)

PPL, KL = "ppl/gptq-512", "kl/top-512"
NOON = datetime(2026, 1, 2, 12, tzinfo=UTC)


def cost(decode: float) -> Cost:
    """A cost with that decode speed in tokens/s."""
    return Cost(
        load_seconds=0.4,
        prefill_tokens_per_second=20 * decode,
        decode_tokens_per_second=decode,
        prompt_tokens=512,
        new_tokens=64,
        repeats=3,
        threads=2,
        peak_memory_bytes=4 * 10**8,
        memory_floor_bytes=3 * 10**8,
        device_peak_bytes=None,
    )


def metric(value: float, error: float | None, unit: Any, protocol: str) -> Metric:
    return Metric(
        protocol=protocol, unit=unit, value=value, standard_error=error, tokens=1022, windows=2
    )


def buckets(by: Any, edges: Sequence[float], scale: float) -> Breakdown:
    """A breakdown whose KL grows along the edges."""
    found = [
        Bucket(
            lower=low,
            upper=high,
            tokens=100,
            kl_mean=scale * (i + 1),
            standard_error=scale / 9,
            top1_agreement=0.9,
        )
        for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    return Breakdown(protocol=KL, by=by, buckets=found)


def candidate(
    label: str, ratio: float, size: int, decode: float | None = None, **more: Any
) -> ModelResult:
    """A model with that ratio of perplexity and size in bytes; its KL is the ratio's logarithm,
    nearly."""
    kl = max(ratio - 1, 1e-5)
    metrics = {
        "perplexity": metric(40 * ratio, 0.9, "perplexity", PPL),
        "perplexity_ratio": metric(ratio, 0.002, "ratio", PPL),
        "kl_mean": metric(kl, kl / 30, "nats", KL),
        "kl_p99": metric(5 * kl, None, "nats", KL),
        "top1_agreement": metric(1 - kl, 0.002, "share", KL),
    }
    fields: dict[str, Any] = {
        "label": label,
        "role": "candidate",
        "source": f"out/{label}",
        "weights_sha256": f"{abs(hash(label)):064x}"[-64:],
        "tokenizer_sha256": "b" * 64,
        "recipe_sha256": None,
        "scheme": "W4 g128 sym",
        "quantized_linears": 42,
        "linears": 42,
        "parameters": 5_800_000,
        "bytes_on_disk": size,
        "bits_per_weight": 4.125,
        "kernels": {"reference": 42},
        "metrics": metrics,
        "excluded_tokens": 0,
        "cost": None if decode is None else cost(decode),
        "breakdowns": [
            buckets("confidence", [0, 0.25, 0.5, 1.0], kl),
            buckets("context", [0, 1, 8, 64, 512], kl),
        ],
    }
    return ModelResult(**fields | more)


def reference(decode: float | None = None, **more: Any) -> ModelResult:
    return candidate(
        "base",
        1.0,
        12_000_000,
        decode,
        **{
            "role": "reference",
            "scheme": "float16",
            "bits_per_weight": None,
            "kernels": {},
            "breakdowns": [],
            "metrics": {"perplexity": metric(40.0, 0.9, "perplexity", PPL)},
        }
        | more,
    )


def report(*candidates: ModelResult, base: ModelResult | None = None, **more: Any) -> Report:
    """One run of these models against ``base``; ``more`` replaces fields of the Report."""
    floor = NoiseFloor(
        other_dtype="float32",
        kl_mean=metric(2.1e-4, 3e-6, "nats", KL),
        top1_agreement=metric(0.98, 0.001, "share", KL),
    )
    base = base or reference()
    fields: dict[str, Any] = {
        "created": NOON,
        "command": "llmquant quantize m -o out/x && llmquant eval out/x --text file:t.txt",
        "protocols": [PPL, KL],
        "passes": [one_pass()],
        "reference": base.label,
        "noise_floor": floor,
        "text": ReportText(
            source="file:t.txt",
            sha256="c" * 64,
            tokens=1024,
            windows=2,
            windows_available=2,
            window=512,
        ),
        "settings": Settings(dtype="bfloat16", device="cpu", kernel="auto", batch_size=None),
        "models": [base, *candidates],
        "versions": {"python": "3.11.7", "torch": "2.13.0"},
        "hardware": Hardware(
            processor="A CPU", cores=2, threads=2, memory_bytes=2**34, accelerator=None
        ),
    }
    return Report(**fields | more)


def one_pass(
    windows: int = 2, available: int = 2, perplexity: str = PPL, divergence: str = KL
) -> ProtocolPass:
    return ProtocolPass(
        perplexity=perplexity,
        divergence=divergence,
        tokens=1024,
        scored=511 * windows,
        windows=windows,
        windows_available=available,
    )


def task(correct: str, items_available: int | None = None) -> TaskResult:
    """A task with those right answers."""
    share = correct.count("1") / len(correct)
    return TaskResult(
        task="choice", version="1", lm_eval="0.4.13", few_shot=0, items=len(correct),
        items_available=items_available or len(correct), items_sha256="d" * 64,
        metrics={"acc": TaskMetric(value=share, standard_error=0.1, correct=correct)},
    )  # fmt: skip


def stored(*reports: Report) -> list[StoredReport]:
    """As if read from files, each made an hour after the one before."""
    return [
        StoredReport(Path(f"r{i}.json"), r.model_copy(update={"created": r.created + timedelta(hours=i)}))
        for i, r in enumerate(reports)
    ]  # fmt: skip


def four() -> Report:
    """A reference and three models, with speeds: one that loses in both, one on each end of the
    front."""
    return report(
        candidate("small", 1.20, 3_000_000, 90.0),
        candidate("good", 1.01, 4_000_000, 70.0),
        candidate("bad", 1.30, 5_000_000, 50.0, scheme="W3 g32 sym", bits_per_weight=3.5),
        base=reference(40.0),
    )
