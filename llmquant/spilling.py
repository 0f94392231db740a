"""Whether the hidden states of a walk fit in memory beside everything else.

An estimate, from above: it decides where the states live and nothing that is computed. What a block needs is counted from its
shapes: its weights at the dtype it runs in (twice where the original's stay beside them), and for its widest linear the float32
weight with its working copies and the Hessian with its factor.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from llmquant.architectures import blocks_of
from llmquant.usage import available_bytes, resident_bytes
from llmquant.walk import WalkPlan

_SHARE = 0.8  # of the memory that the machine has left, where no limit was given
_WEIGHT_COPIES, _HESSIAN_COPIES = 6, 4


def must_spill(plan: WalkPlan, windows: Sequence[Tensor], limit: int | None, processes: int = 1) -> bool:
    """Whether hidden states belong in files.

    Args:
        plan: the walk.
        windows: this process's calibration windows.
        limit: bytes of RAM for the whole process; None: most of what the machine has left.
        processes: that share this machine.
    """
    if not windows:
        return False
    now = resident_bytes()
    allowed = limit if limit is not None else now + int(available_bytes() * _SHARE / processes)
    return now + working_set(plan) + states_bytes(plan, windows) > allowed


def states_bytes(plan: WalkPlan, windows: Sequence[Tensor]) -> int:
    """Of all streams that a block needs at once."""
    hidden = int(plan.model.config.get_text_config().hidden_size)
    recipe = plan.recipe
    aims_at_original = recipe.tune is not None or (recipe.method == "gptq" and recipe.gptq.asymmetric > 0)
    streams = 3 if aims_at_original else 1
    streams += recipe.tune is not None and recipe.tune.target == "block"
    return sum(w.numel() for w in windows) * hidden * plan.dtype.itemsize * streams


def working_set(plan: WalkPlan) -> int:
    """Bytes for the largest block and the widest linear in work."""
    blocks = blocks_of(plan.model, plan.architecture)
    block = max((sum(p.numel() for p in b.parameters()) for b in blocks), default=0) * plan.dtype.itemsize * 2
    shapes = [plan.reader.info(f"{name}.weight").shape for name in plan.specs]
    weight = max((rows * columns for rows, columns in shapes), default=0) * 4 * _WEIGHT_COPIES
    hessian = max((columns * columns for _, columns in shapes), default=0) * 4 * _HESSIAN_COPIES
    return block + weight + hessian
