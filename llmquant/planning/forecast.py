"""What a run will need: memory, disk and, from one block that was timed, time. From headers alone,
except for the timing.

Memory is counted phase by phase, as the run goes through them; the largest one is the peak. Each
phase's copies were counted in the code and checked against the kernel's count of real runs
(``tests/test_forecast.py``, ``bench/memory.py``):

- *embedding*: the tensors outside the blocks in the dtype of the run, beside the largest of them as
  it is stored;
- *pass*: a block in the dtype of the run, all hidden states, and what one batch leaves between a
  block's linears;
- *statistics* of the widest input, or of several experts: a Hessian each (two where the original's
  inputs are watched too) while a batch is added to it;
- *packing*: the token embeddings, where they are quantized: as they are stored, as codes, and as
  the words that these are packed into;
- *rounding*: that Hessian, its factor, and what making the factor takes; then some float32 copies
  of one linear;
- *tuning*: latents, gradients and Adam's two moments for every linear of a block, and activations
  kept for the backward pass;
- *copying* a tensor that is not quantized: one mapping of it.

``LIBRARIES`` is what the process has before it reads a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llmquant.planning.preview import Plan
from llmquant.quantization.memory import Work
from llmquant.recipe import Recipe

LIBRARIES = 480_000_000
"""Bytes resident once torch and transformers are loaded and a block has run; measured on Linux,
torch 2.13 for CPUs."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of a run on a CPU.

    Attributes:
        phases: phase → bytes that the process has in RAM at its worst moment, libraries included.
        states: of them, hidden states, which ``--max-memory`` can keep in files instead.
        replay: of them, what is kept only where there is room for it, and saves passes through a
            block.
        output: of weight files.
        scratch: on the output's disk beside the result while the run lasts: a shard's side file,
            saved hidden states.
        accelerator: on the device if the run is on one: the phases without libraries and states.
    """

    phases: Mapping[str, int]
    states: int
    replay: int
    output: int
    scratch: int
    accelerator: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def disk(self) -> int:
        return self.output + self.scratch


def forecast(
    plan: Plan, recipe: Recipe, itemsize: int = 4, max_shard_size: int = 5_000_000_000
) -> Forecast:
    """Forecast a run of ``recipe``.

    Args:
        plan: of the same recipe.
        recipe: its calibration sizes count, its text does not.
        itemsize: bytes of the dtype in which blocks run.
        max_shard_size: as the run would get it.
    """
    linears = {m.name: m.shape for m in plan.linears}
    work = Work.of(
        plan.source, linears, plan.architecture, plan.hidden, recipe, itemsize, plan.embedding
    )
    shard = min(max_shard_size, plan.tensor_bytes)
    return Forecast(
        phases={name: nbytes + LIBRARIES for name, nbytes in work.phases_with_replay.items()},
        states=work.states,
        replay=work.replay,
        output=plan.bytes_on_disk,
        scratch=shard + 2 * work.states,
        accelerator=max(work.phases.values()) - work.states,
    )
