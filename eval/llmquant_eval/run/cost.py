"""What a model costs to run, for its row in a report: load time, prefill and decode speed, peak
memory, at batch 1.

A prompt of 512 tokens (fewer where the context is shorter), 64 new ones, the median of three
repetitions in one process of its own (:mod:`llmquant_eval.speed.process`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.models.kept_work import KeptWork
from llmquant_eval.models.resolve import max_positions
from llmquant_eval.report.results import Cost
from llmquant_eval.run.plan import EvaluationPlan
from llmquant_eval.run.request import Request
from llmquant_eval.speed.process import Conditions, RefusedError, measure_apart
from llmquant_eval.speed.schema import Point

Progress = Callable[[str, int, int], None]
"""Called with (stage, steps done, steps in all)."""
PROMPT_TOKENS = 512
NEW_TOKENS = 64
REPEATS = 3


@dataclass(frozen=True, slots=True)
class CostRun(Conditions):
    """How a model is measured for a report."""

    new_tokens: int = NEW_TOKENS
    repeats: int = REPEATS
    prompt_tokens: int = PROMPT_TOKENS


def measure_cost(path: Path, run: CostRun) -> Cost:
    """Measure one model.

    Raises:
        UsageError: the context is too short for a prompt and the new tokens.
        RefusedError: the model cannot be loaded.
        LlmquantError: the process failed; carries the end of its stderr.
    """
    prompt_tokens, positions = run.prompt_tokens, max_positions(path)
    if positions is not None:
        prompt_tokens = min(prompt_tokens, positions - run.new_tokens - 1)
    if prompt_tokens < 1:
        raise UsageError(
            f"{path} takes {positions} tokens: too few for {run.new_tokens} new ones; give --no-cost"
        )
    point = Point(prompt_tokens=prompt_tokens, batch_size=1)
    try:
        times = measure_apart(path, [point], run)
    except RefusedError:
        raise  # so is its quality
    except LlmquantError as e:
        raise LlmquantError(f"{e}\nPass --no-cost to evaluate its quality alone") from e
    timing = times.timings[0]
    return Cost(
        load_seconds=times.load_seconds,
        prefill_tokens_per_second=prompt_tokens / statistics.median(timing.prefill_seconds),
        decode_tokens_per_second=run.new_tokens / statistics.median(timing.decode_seconds),
        prompt_tokens=prompt_tokens,
        new_tokens=run.new_tokens,
        repeats=run.repeats,
        threads=times.threads,
        peak_memory_bytes=timing.peak_memory_bytes,
        memory_floor_bytes=times.memory_floor_bytes,
        device_peak_bytes=timing.device_peak_bytes,
    )


def costs_of(
    request: Request, plan: EvaluationPlan, kept: KeptWork, progress: Progress
) -> dict[str, Cost]:
    """Of each model of this process, by label."""
    run = CostRun(plan.dtype, plan.device, request.kernel, request.threads)
    costs = {}
    for done, model in enumerate(plan.local):
        progress("speed and memory", done, len(plan.local))
        found = kept.get("cost", model.label)
        cost = measure_cost(model.path, run) if found is None else Cost.model_validate(found)
        if found is None:
            kept.add(cost.model_dump(mode="json"), "cost", model.label)
        costs[model.label] = cost
    progress("speed and memory", len(plan.local), len(plan.local))
    return costs
