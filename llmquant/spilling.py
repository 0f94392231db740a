"""Whether the hidden states of a walk fit in memory beside everything else, and what would save passes beside them.

It decides where they live and nothing that is computed. What the run needs is counted as a plan counts it
(:mod:`llmquant.forecast`), with a margin for what such a count may be short of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from llmquant.forecast import Work
from llmquant.states import IN_MEMORY, Placement
from llmquant.usage import available_bytes, resident_bytes
from llmquant.walkplan import WalkPlan

_SHARE = 0.8  # of the memory that the machine has left, where no limit was given
_MARGIN = 1.25


def placement(plan: WalkPlan, windows: Sequence[Tensor], limit: int | None, processes: int = 1) -> Placement:
    """Where hidden states belong, and whether what passes leave for later ones can be kept.

    Args:
        plan: the walk.
        windows: this process's calibration windows.
        limit: bytes of RAM for the whole process; None: most of what the machine has left.
        processes: that share this machine.
    """
    if not windows:
        return IN_MEMORY
    now = resident_bytes()
    allowed = limit if limit is not None else now + int(available_bytes() * _SHARE / processes)
    work = _work(plan, windows)
    fits = [now + _MARGIN * max(phases.values()) <= allowed for phases in (work.phases, work.phases_with_replay)]
    return Placement(spill=not fits[0], replays=fits[1])


def _work(plan: WalkPlan, windows: Sequence[Tensor]) -> Work:
    """The walk's, with the tokens that these windows really have."""
    shapes = {n: plan.reader.info(f"{n}.weight").shape for n in plan.specs}
    linears = {n: (rows, columns) for n, (rows, columns) in shapes.items()}
    hidden = int(plan.model.config.get_text_config().hidden_size)
    work = Work.of(plan.reader.tensors, linears, plan.architecture, hidden, plan.recipe, plan.dtype.itemsize)
    return replace(work, tokens=sum(w.numel() for w in windows))
