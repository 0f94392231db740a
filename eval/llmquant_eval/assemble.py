"""From arrays of per-token scores to the metrics and results of a Report."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import llmquant
from llmquant_eval import machine
from llmquant_eval.models import ModelPath
from llmquant_eval.report import Cost, Metric, ModelResult, NoiseFloor, Report, Role, Settings, Text
from llmquant_eval.statistics import Estimate

if TYPE_CHECKING:
    from llmquant_eval.divergence import Divergence
    from llmquant_eval.plan import Plan, Request
    from llmquant_eval.protocols import GptqProtocol
    from llmquant_eval.scoring import Scores


def perplexity_metrics(own: Scores, base: Scores | None, protocol: GptqProtocol) -> dict[str, Metric]:
    """``perplexity``, and against a reference ``perplexity_ratio``."""
    windows, predictions = own.perplexity.losses.shape
    estimates: dict[str, tuple[Estimate, Any]] = {"perplexity": (own.perplexity.estimate, "perplexity")}
    if base is not None:
        estimates["perplexity_ratio"] = (own.perplexity.ratio_to(base.perplexity), "ratio")
    return {
        name: Metric(
            protocol=protocol.perplexity_id, unit=unit, value=estimate.value, standard_error=estimate.standard_error,
            tokens=windows * predictions, windows=windows,
        )
        for name, (estimate, unit) in estimates.items()
    }  # fmt: skip


def divergence_metrics(divergence: Divergence, protocol: GptqProtocol) -> dict[str, Metric]:
    """``kl_mean``, ``kl_median``, ``kl_p90`` … ``kl_max``, ``top1_agreement``, ``rms_delta_p``.

    Quantiles and the maximum carry no standard error: by-window formulas do not hold for them.
    """
    estimates: dict[str, tuple[Estimate, Any]] = {"kl_mean": (divergence.mean_kl, "nats")}
    for q, value in divergence.quantiles().items():
        name = "kl_median" if q == 0.5 else f"kl_p{100 * q:g}"
        estimates[name] = (Estimate(value, None), "nats")
    estimates["kl_max"] = (Estimate(divergence.max_kl, None), "nats")
    estimates["top1_agreement"] = (divergence.top1_agreement, "share")
    estimates["rms_delta_p"] = (divergence.rms_delta_p, "probability")
    return {
        name: Metric(
            protocol=protocol.divergence_id, unit=unit, value=estimate.value, standard_error=estimate.standard_error,
            tokens=divergence.tokens, windows=len(divergence.kl),
        )
        for name, (estimate, unit) in estimates.items()
    }  # fmt: skip


def model_result(
    plan: Plan, model: ModelPath, scores: dict[str, Scores], cost: Cost | None, kernels: dict[str, int]
) -> ModelResult:
    """One model's row of the Report."""
    known = llmquant.inspect(model.path)
    role: Role = "reference" if model is plan.reference else "candidate"
    own = scores[model.label]
    base = scores[plan.reference.label] if plan.reference is not None and role == "candidate" else None
    metrics = perplexity_metrics(own, base, plan.protocol)
    if own.divergence is not None:
        metrics |= divergence_metrics(own.divergence, plan.protocol)
    return ModelResult(
        label=model.label, role=role, source=model.source, weights_sha256=known.weights_sha256,
        tokenizer_sha256=plan.tokenizers_sha256[model.label], recipe_sha256=known.recipe_sha256,
        scheme=known.scheme, quantized_linears=known.quantized, linears=known.linears, parameters=known.parameters,
        bytes_on_disk=known.bytes_on_disk, bits_per_weight=known.bits_per_weight, kernels=kernels, metrics=metrics,
        excluded_tokens=0 if own.divergence is None else own.divergence.excluded, cost=cost,
    )  # fmt: skip


def make_report(request: Request, plan: Plan, floor: NoiseFloor | None, results: list[ModelResult]) -> Report:
    """The Report of a finished run, stamped with the time, versions and hardware of now."""
    divergence = [plan.protocol.divergence_id] if plan.reference is not None else []
    return Report(
        created=datetime.now(UTC).replace(microsecond=0),
        command=request.command(),
        protocols=[plan.protocol.perplexity_id, *divergence],
        text=Text(
            source=request.text, sha256=plan.text_sha256, tokens=len(plan.ids), windows=len(plan.windows),
            windows_available=plan.windows_available, window=plan.protocol.window,
        ),
        settings=Settings(
            dtype=plan.dtype, device=plan.device, kernel=request.kernel, batch_size=request.batch_size
        ),
        reference=None if plan.reference is None else plan.reference.label,
        noise_floor=floor,
        models=results,
        versions=machine.versions(),
        hardware=machine.hardware(plan.device),
    )  # fmt: skip
