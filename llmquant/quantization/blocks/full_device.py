"""A device without memory left, as a sentence that says what of this run needs less of it.

The number of calibration windows is not among it: a device holds one batch of them, and what passes
leave is on the CPU (:mod:`llmquant.quantization.blocks.hidden_states`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from llmquant.errors import LlmquantError
from llmquant.quantization.plan import WalkPlan
from llmquant.recipe import Recipe
from llmquant.runtime.memory import out_of_memory


@contextmanager
def full_device(plan: WalkPlan, reached: Callable[[], str]) -> Iterator[None]:
    """Work of ``plan`` on its device.

    Args:
        reached: how far it came and what that leaves, asked only after a failure.

    Raises:
        LlmquantError: the device has no memory left.
    """
    try:
        yield
    except RuntimeError as e:
        if plan.device.type == "cpu" or not out_of_memory(e):
            raise
        said = str(e).splitlines()[0].rstrip(".")
        raise LlmquantError(
            f"{plan.device} has no memory left ({said}); {reached()}. "
            f"Less is needed with {' or '.join(less(plan.recipe, plan.dtype))}: another run, which begins anew"
        ) from e


def less(recipe: Recipe, dtype: torch.dtype) -> list[str]:
    """What makes the need for memory on a device smaller, and how large it is now.

    Args:
        recipe: of the run.
        dtype: in which blocks run.
    """
    if recipe.calibration.source is None:
        return ["--device cpu"]
    whose, batch = (
        ("calibration", recipe.calibration.batch_size)
        if recipe.tune is None
        else ("tune", recipe.tune.batch_size)
    )
    found = []
    if batch > 1:
        found.append(f"{whose}.batch_size below {batch} in the recipe")
    if recipe.calibration.seqlen > 1:
        found.append(f"--seqlen below {recipe.calibration.seqlen}")
    if not recipe.gptq.true_sequential:
        found.append("gptq.true_sequential (one Hessian at a time)")
    if dtype == torch.float32:
        found.append("--dtype bfloat16")
    return [*found, "--device cpu"]
