"""From arrays of per-token scores to the metrics and results of a Report."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import llmquant
from llmquant_eval.models.resolve import AnyModel
from llmquant_eval.report import machine
from llmquant_eval.report.results import (
    Breakdown,
    CompactKlShift,
    Cost,
    Metric,
    ModelResult,
    Role,
    TaskResult,
)
from llmquant_eval.report.schema import (
    Missing,
    NoiseFloor,
    ProtocolPass,
    Report,
    ReportText,
    Settings,
)
from llmquant_eval.report.statistics import Estimate, exponential, scaled
from llmquant_eval.scoring.breakdowns import breakdowns
from llmquant_eval.scoring.reference_cache import compact_kl_shift

if TYPE_CHECKING:
    from llmquant_eval.run.plan import EvaluationPlan
    from llmquant_eval.run.request import Request
    from llmquant_eval.scoring.divergence import Divergence
    from llmquant_eval.scoring.protocols import WindowProtocol
    from llmquant_eval.scoring.score_models import Scores
    from llmquant_eval.scoring.token_stream import TokenStream

Units = dict[str, tuple[Estimate, Any]]


@dataclass(frozen=True, slots=True)
class Measured:
    """All that was measured of one model. ``scores`` in the order of the plan's streams, None for
    what a server did not answer."""

    scores: Sequence[Scores | None]
    kernels: Mapping[str, int] = field(default_factory=dict)
    cost: Cost | None = None
    tasks: Sequence[TaskResult] = ()


def perplexity_metrics(own: Scores, base: Scores | None, stream: TokenStream) -> dict[str, Metric]:
    """``perplexity``, or for ``ppl/word`` ``word_perplexity``, ``byte_perplexity`` and
    ``bits_per_byte``.

    Against a reference also ``perplexity_ratio`` or ``word_perplexity_ratio``.
    """
    estimates: Units = {}
    if stream.words is None or stream.bytes_ is None:
        estimates["perplexity"] = (own.perplexity.estimate, "perplexity")
        if base is not None:
            estimates["perplexity_ratio"] = (own.perplexity.ratio_to(base.perplexity), "ratio")
    else:
        per_byte = own.perplexity.per(stream.bytes_)
        estimates["word_perplexity"] = (exponential(own.perplexity.per(stream.words)), "perplexity")
        estimates["byte_perplexity"] = (exponential(per_byte), "perplexity")
        estimates["bits_per_byte"] = (scaled(per_byte, 1.0 / math.log(2.0)), "bits")
        if base is not None:
            ratio = own.perplexity.ratio_to(base.perplexity, stream.words)
            estimates["word_perplexity_ratio"] = (ratio, "ratio")
    layout = own.perplexity.layout
    return _metrics(estimates, stream.protocol.perplexity_id, layout.tokens, layout.windows)


def divergence_metrics(divergence: Divergence, protocol: WindowProtocol) -> dict[str, Metric]:
    """``kl_mean``, ``kl_median``, ``kl_p90`` … ``kl_max``, ``top1_agreement``, ``rms_delta_p``.

    Quantiles and the maximum carry no standard error: formulas for means do not hold for them.
    """
    estimates: Units = {"kl_mean": (divergence.mean_kl, "nats")}
    for q, value in divergence.quantiles().items():
        name = "kl_median" if q == 0.5 else f"kl_p{100 * q:g}"
        estimates[name] = (Estimate(value, None), "nats")
    estimates["kl_max"] = (Estimate(divergence.max_kl, None), "nats")
    estimates["top1_agreement"] = (divergence.top1_agreement, "share")
    estimates["rms_delta_p"] = (divergence.rms_delta_p, "probability")
    return _metrics(estimates, protocol.divergence_id, divergence.tokens, divergence.layout.windows)


def _metrics(estimates: Units, protocol: str, tokens: int, windows: int) -> dict[str, Metric]:
    return {
        name: Metric(
            protocol=protocol,
            unit=unit,
            value=estimate.value,
            standard_error=estimate.standard_error,
            error_method=estimate.method,
            tokens=tokens,
            windows=windows,
        )
        for name, (estimate, unit) in estimates.items()
    }


def _pass_results(
    own: Scores, base: Scores | None, stream: TokenStream
) -> tuple[dict[str, Metric], list[Breakdown], CompactKlShift | None]:
    metrics = perplexity_metrics(own, base, stream)
    if own.divergence is None:
        return metrics, [], None
    metrics |= divergence_metrics(own.divergence, stream.protocol)
    where = breakdowns(own.divergence, stream.windows, stream.protocol.divergence_id)
    form = own.cache_form or ""
    return metrics, where, compact_kl_shift(own.cache_errors, stream.protocol.divergence_id, form)


def model_result(
    plan: EvaluationPlan, model: AnyModel, measured: Measured, reference: Measured | None
) -> ModelResult:
    """One model's row of the Report; ``reference`` is None for the reference and where there is
    none."""
    role: Role = "reference" if model is plan.reference else "candidate"
    metrics: dict[str, Metric] = {}
    where: list[Breakdown] = []
    shifts: list[CompactKlShift] = []
    for i, stream in enumerate(plan.streams):
        own = measured.scores[i]
        if own is None:
            continue
        base = None if reference is None else reference.scores[i]
        of_pass, parts, shift = _pass_results(own, base, stream)
        metrics |= {
            name if name not in metrics else f"{name}@{m.protocol}": m
            for name, m in of_pass.items()
        }
        where += parts
        shifts += [shift] if shift is not None else []
    excluded = sum(
        s.divergence.excluded for s in measured.scores if s is not None and s.divergence is not None
    )
    return ModelResult(
        label=model.label,
        role=role,
        source=model.source,
        tokenizer_sha256=plan.tokenizers_sha256[model.label],
        kernels=dict(measured.kernels),
        metrics=metrics,
        breakdowns=where,
        cache_errors=shifts,
        tasks=list(measured.tasks),
        excluded_tokens=excluded,
        cost=measured.cost,
        **_identity(plan.inspections.get(model.label)),
    )


def _identity(known: llmquant.Inspection | None) -> dict[str, Any]:
    """What is known of the weights: everything of a folder, nothing of a server."""
    if known is None:
        return {
            "weights_sha256": None,
            "recipe_sha256": None,
            "scheme": "served",
            "quantized_linears": 0,
            "linears": 0,
            "parameters": None,
            "bytes_on_disk": None,
            "bits_per_weight": None,
        }
    return {
        "weights_sha256": known.weights_sha256,
        "recipe_sha256": known.recipe_sha256,
        "scheme": known.scheme,
        "quantized_linears": known.quantized,
        "linears": known.linears,
        "parameters": known.parameters,
        "bytes_on_disk": known.bytes_on_disk,
        "bits_per_weight": known.bits_per_weight,
    }


def make_report(
    request: Request,
    plan: EvaluationPlan,
    floor: NoiseFloor | None,
    results: list[ModelResult],
    missing: list[Missing],
) -> Report:
    """The Report of a finished run, stamped with the time, versions and hardware of now."""
    # Where only served models are compared, no divergence is among them.
    known = {metric.protocol for r in results for metric in r.metrics.values()}
    passes = [
        ProtocolPass(
            perplexity=s.protocol.perplexity_id,
            divergence=_if_in(known, s.protocol.divergence_id),
            tokens=s.tokens,
            scored=s.layout.tokens,
            windows=len(s.windows),
            windows_available=s.available,
            ids_sha256=s.sha256(),
        )
        for s in plan.streams
    ]
    named = [name for p in passes for name in (p.perplexity, p.divergence) if name is not None]
    tasks = dict.fromkeys(t.protocol for r in results for t in r.tasks)
    return Report(
        created=datetime.now(UTC).replace(microsecond=0),
        command=request.command(),
        protocols=[*named, *tasks],
        passes=passes,
        text=_text(plan),
        settings=Settings(
            dtype=plan.dtype,
            dtype_reason=plan.computing.dtype_reason,
            device=plan.device,
            kernel=request.kernel,
            batch_size=request.batch_size,
        ),
        reference=None if plan.reference is None else plan.reference.label,
        noise_floor=floor,
        models=results,
        missing=missing,
        versions=machine.versions(),
        hardware=machine.hardware(plan.device),
    )


def _if_in(known: Collection[str], protocol: str) -> str | None:
    return protocol if protocol in known else None


def _text(plan: EvaluationPlan) -> ReportText | None:
    if plan.text_source is None or plan.text_sha256 is None:
        return None
    first = plan.streams[0]
    return ReportText(
        source=plan.text_source,
        sha256=plan.text_sha256,
        tokens=first.tokens,
        windows=len(first.windows),
        windows_available=first.available,
        window=first.protocol.window,
        rows=plan.text_rows,
    )
