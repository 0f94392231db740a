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
            f"Less is needed with {' or '.join(less(plan))}: another run, which begins anew"
        ) from e


def less(plan: WalkPlan) -> list[str]:
    """What makes the need for memory on the device smaller, most of it first, and how large it is
    now."""
    recipe = plan.recipe
    if recipe.calibration.source is None:
        return ["--device cpu"]
    whose = "calibration" if recipe.tune is None else "tune"
    found = []
    if plan.batch_size > 1:
        found.append(f"{whose}.batch_size below {plan.batch_size} in the recipe")
    if recipe.calibration.seqlen > 1:
        found.append(f"--seqlen below {recipe.calibration.seqlen}")
    if not recipe.gptq.true_sequential:
        found.append("gptq.true_sequential (one Hessian at a time)")
    if plan.dtype == torch.float32:
        found.append("--dtype bfloat16")
    return [*found, "--device cpu"]
