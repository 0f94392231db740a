"""A run of several processes, beside what one does alone: what it must refuse, and the part of
those that do not write.

The first process goes the way of a run alone. The others carry their share of the hidden states
through the same walk, so that its sums are whole and its linears are shared out, and then wait for
the folder to be proved. What needs more than sums of the shares (tuning's gradients, SmoothQuant's
samples of rows) is refused, and no state is kept to continue from: hidden states are spread over
processes that may be others next time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from llmquant.checkpoint.atomic import disk, remove
from llmquant.errors import UsageError
from llmquant.quantization.blocks.full_device import full_device
from llmquant.quantization.blocks.hidden_states import Placement, StateStore
from llmquant.quantization.plan import WalkPlan, batched
from llmquant.quantization.state.resume import kept_blocks
from llmquant.quantization.walk import walk


def check_together(
    plan: WalkPlan, windows: Sequence[Tensor], destination: Path, *, restart: bool
) -> None:
    """Wait until every process has looked at the request; each looks at the same.

    Raises:
        UsageError: several processes cannot do it.
        ParallelError: another process is gone.
    """
    world, recipe = plan.world, plan.recipe
    if world.size == 1:
        return
    alone = [name for name in ("smooth", "tune") if getattr(recipe, name) is not None]
    if alone:
        raise UsageError(
            f"{' and '.join(alone)} works in one process only, not in {world.size}: run it without torchrun"
        )
    batches = len(batched(windows, plan.batch_size))
    if windows and batches < world.size:
        raise UsageError(
            f"{world.size} processes share {batches} calibration batches of up to {plan.batch_size} windows; start fewer "
            "processes, or lower calibration.batch_size in the recipe"
        )
    if kept_blocks(destination) and not restart:
        raise UsageError(
            f"{destination} has the saved state of an interrupted run of one process: repeat its command to resume it, or add "
            "--restart to delete that state and start over"
        )
    world.barrier()


def assist(
    plan: WalkPlan, windows: Sequence[Tensor], destination: Path, placement: Placement
) -> None:
    """Walk along with the first process, which writes.

    Args:
        plan: the same in every process.
        windows: likewise; the walk takes its share.
        destination: what the first process makes; files for hidden states stand beside it.
        placement: where hidden states are kept.

    Raises:
        LlmquantError: this process's device has no memory left.
    """
    left = f"process {plan.world.rank} of {plan.world.size} ends, and the run with it"
    with _states(plan, destination, placement) as store, full_device(plan, lambda: left):
        for _ in walk(plan, windows, lambda _: None, store):
            pass


@contextmanager
def _states(plan: WalkPlan, destination: Path, placement: Placement) -> Iterator[StateStore]:
    if not placement.spill:
        yield StateStore(plan.device, placement=placement)
        return
    folder = destination.with_name(f".{destination.name}.process-{plan.world.rank}")
    remove(folder)
    try:
        with disk(folder):
            folder.mkdir(parents=True)
            yield StateStore(plan.device, folder, placement=placement)
    finally:
        remove(folder)
