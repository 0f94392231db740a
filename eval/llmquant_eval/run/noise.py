"""The noise floor: the reference against itself at the other dtype, a scale to read KL by."""

from __future__ import annotations

from collections.abc import Callable

import llmquant
from llmquant_eval.models.kept_work import KeptWork
from llmquant_eval.models.resolve import load_model, other_dtype
from llmquant_eval.report.schema import NoiseFloor
from llmquant_eval.run.build_report import divergence_metrics
from llmquant_eval.run.loaded import LoadedModels
from llmquant_eval.run.plan import EvaluationPlan
from llmquant_eval.run.request import Request
from llmquant_eval.scoring.reference_cache import CachedReference
from llmquant_eval.scoring.score_models import Advance, score_models

# It is no result: a few windows say where it lies.
NOISE_TOKENS, NOISE_TOKENS_SLOW = 4096, 1024


def noise_floor(
    request: Request,
    plan: EvaluationPlan,
    loaded: LoadedModels,
    cached: CachedReference | None,
    kept: KeptWork,
    advance: Callable[[str], Advance],
) -> NoiseFloor | None:
    """On the first few windows of the first protocol; None where nothing has a divergence to read
    by it.

    Args:
        cached: the reference's answers to that protocol, with ``--cache``.
        advance: of the name of a stage.
    """
    reference = plan.reference
    if reference is None or len(plan.local) < 2:
        return None
    if (found := kept.get("noise floor")) is not None:
        return NoiseFloor.model_validate(found)
    whole = plan.streams[0]
    dtype = other_dtype(plan.dtype)
    # bfloat16 where `auto` avoids it would take longer than all the rest.
    slow = (
        dtype == "bfloat16"
        and llmquant.parse_dtype("auto", plan.device, stored=dtype).name == "float32"
    )
    stream = whole.first(whole.reaching(NOISE_TOKENS_SLOW if slow else NOISE_TOKENS))
    other = f"{reference.label} in {dtype}"
    twins = {other: load_model(reference.path, dtype, plan.device, "auto")}
    if cached is None:
        twins[reference.label] = loaded.get(reference)
    scores = score_models(
        twins,
        stream,
        reference=reference.label if cached is None else None,
        cached=cached,
        batch_size=request.batch_size,
        advance=advance("noise floor"),
        kept=kept,
    )
    divergence = scores[other].divergence
    assert divergence is not None  # score_models() compares every model but the reference
    metrics = divergence_metrics(divergence, stream.protocol)
    floor = NoiseFloor(
        other_dtype=dtype, kl_mean=metrics["kl_mean"], top1_agreement=metrics["top1_agreement"]
    )
    kept.add(floor.model_dump(mode="json"), "noise floor")
    return floor
