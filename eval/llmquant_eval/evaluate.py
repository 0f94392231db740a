"""A whole evaluation: models and a text in, a Report out.

The order is chosen for memory and for early errors: everything that can be refused is refused before a weight is read;
then each model's cost is measured in a process of its own while this one is still small; then the noise floor, with
the reference twice in memory; then the one pass, with reference and candidates side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmquant_eval import models
from llmquant_eval.assemble import divergence_metrics, make_report, model_result
from llmquant_eval.cost import measure_apart
from llmquant_eval.plan import Plan, Request, make_plan
from llmquant_eval.report import Cost, NoiseFloor, Report
from llmquant_eval.scoring import score

# The noise floor is a scale to read KL by, not a result: a few windows say where it lies.
NOISE_TOKENS = 4096

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""


def _silent(stage: str, done: int, total: int) -> None:
    """No progress."""


def evaluate(request: Request, progress: Progress = _silent) -> Report:
    """Run an evaluation.

    Raises:
        UsageError: the request cannot be right (models, window, dtype, tokenizers that differ).
        SourceError: the text is missing, empty or shorter than a window.
        CheckpointError: a folder that is not a model.
        QuantizationError: a model's output is NaN or infinite.
        LlmquantError: measuring a model's cost failed.
    """
    plan = make_plan(request)
    costs = _costs(plan, request.kernel, progress) if request.cost else {}
    # TF32 keeps 10 bits of a float32 product: the papers' figures, and KL at float32, are taken without it.
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return _score(request, plan, costs, progress)
    finally:
        torch.set_float32_matmul_precision(precision)


def _costs(plan: Plan, kernel: str, progress: Progress) -> dict[str, Cost]:
    costs = {}
    for done, model in enumerate(plan.models):
        progress("speed and memory", done, len(plan.models))
        costs[model.label] = measure_apart(model.path, plan.dtype, plan.device, kernel)
    progress("speed and memory", len(plan.models), len(plan.models))
    return costs


def _score(request: Request, plan: Plan, costs: dict[str, Cost], progress: Progress) -> Report:
    loaded: dict[str, Any] = {}
    floor = None
    label = None if plan.reference is None else plan.reference.label
    if plan.reference is not None:
        loaded[plan.reference.label] = models.load_model(plan.reference.path, plan.dtype, plan.device, request.kernel)
        if request.noise_floor:
            floor = _noise_floor(request, plan, plan.reference, loaded[plan.reference.label], progress)
    for model in plan.models:
        if model is not plan.reference:
            loaded[model.label] = models.load_model(model.path, plan.dtype, plan.device, request.kernel)
    scores = score(
        loaded, plan.ids, plan.windows, reference=label, batch_size=request.batch_size,
        advance=lambda done, total: progress("perplexity and KL" if label else "perplexity", done, total),
    )  # fmt: skip
    results = [
        model_result(plan, m, scores, costs.get(m.label), models.kernels_used(loaded[m.label])) for m in plan.models
    ]
    return make_report(request, plan, floor, results)


def _noise_floor(
    request: Request, plan: Plan, reference: models.ModelPath, model: Any, progress: Progress
) -> NoiseFloor:
    """The reference against itself at the other dtype, on the first few windows."""
    dtype = models.other_dtype(plan.dtype)
    other = f"{reference.label} in {dtype}"
    twins = {reference.label: model, other: models.load_model(reference.path, dtype, plan.device, "auto")}
    scores = score(
        twins, plan.ids, plan.windows[: max(2, NOISE_TOKENS // plan.protocol.window)], reference=reference.label,
        batch_size=request.batch_size, advance=lambda done, total: progress("noise floor", done, total),
    )  # fmt: skip
    divergence = scores[other].divergence
    assert divergence is not None  # score() compares every model but the reference
    metrics = divergence_metrics(divergence, plan.protocol)
    return NoiseFloor(other_dtype=dtype, kl_mean=metrics["kl_mean"], top1_agreement=metrics["top1_agreement"])
