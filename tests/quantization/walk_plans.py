"""Plans of walks for tests: chosen linears of a small model on the recipe's grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from llmquant.formats import Scheme
from llmquant.models.selection import Selection
from llmquant.quantization.plan import WalkPlan
from llmquant.quantization.prepare import prepare
from llmquant.recipe import Recipe

THREE_BITS = {
    "weights.bits": 3,
    "weights.group_size": 16,
    "weights.symmetric": False,
    "scales.steps": 4,
    "calibration.batch_size": 2,
    "gptq.block_size": 10,
}


def plan_of(
    folder: Path,
    recipe: Recipe,
    *,
    select: Callable[[str], bool] = lambda _: True,
    head: bool = False,
) -> WalkPlan:
    """A plan that quantizes every selected linear of the blocks, and the head if wanted, whatever
    the recipe's format can hold."""
    plan = prepare(folder, recipe)
    linears = plan.source.linears
    names = [
        n
        for n in linears.shapes
        if n.startswith(f"{plan.architecture.blocks}.") and select(n) and n not in linears.routers
    ]
    name = linears.head if head else None
    schemes = {
        n: Scheme(recipe.weights.spec) for n in (*names, *([name] if name is not None else []))
    }
    return replace(plan, selection=Selection(schemes, {}, name))
