"""What a run will need: memory, disk and, from one block that was timed, time. From headers alone, except for the timing.

Memory is counted phase by phase, as the run goes through them; the largest one is the peak. Each phase's copies were counted in
the code and checked against the kernel's count of real runs (``tests/test_forecast.py``, ``bench/memory.py``):

- *embedding*: the tensors outside the blocks in the dtype of the run, beside the largest of them as it is stored;
- *pass*: a block in the dtype of the run, all hidden states, and what one batch leaves between a block's linears;
- *statistics* of the widest input: one Hessian (two where the original's inputs are watched too) while a batch is added to it;
- *rounding*: that Hessian, its factor, and what making the factor takes; then some float32 copies of one linear;
- *tuning*: latents, gradients and Adam's two moments for every linear of a block, and activations kept for the backward pass;
- *copying* a tensor that is not quantized: one mapping of it.

``LIBRARIES`` is what the process has before it reads a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from llmquant.plan import Plan, PlannedModule
from llmquant.recipe import Recipe

LIBRARIES = 480_000_000
"""Bytes resident once torch and transformers are loaded and a block has run; measured on Linux, torch 2.13 for CPUs."""
_FLOAT32 = 4
# Float32 copies of a linear beside its mapping: rounding and its error without statistics, and with them.
_ROUNDING_COPIES, _GPTQ_COPIES = 4.25, 7.0
# Matrices the size of the Hessian while it is factorized: itself, the factor and LAPACK's copies.
_FACTOR_COPIES = 5.5
# Values per token that a pass leaves between linears: multiples of the widest input and of the hidden size.
_WIDE_VALUES, _HIDDEN_VALUES = 3.0, 4.0
# Of a tuned block: the original, the latent, its gradient, two moments, the rounded weight and the best one so far.
_TUNE_COPIES, _TUNE_ACTIVATIONS = 7.0, 3.0


@dataclass(frozen=True, slots=True)
class Forecast:
    """Bytes of a run on a CPU.

    Attributes:
        phases: phase → bytes that the process has in RAM at its worst moment, libraries included.
        states: of them, hidden states, which ``--max-memory`` can keep in files instead.
        output: of weight files.
        scratch: on the output's disk beside the result while the run lasts: a shard's side file, saved hidden states.
        accelerator: on the device if the run is on one: the phases without libraries and states.
    """

    phases: Mapping[str, int]
    states: int
    output: int
    scratch: int
    accelerator: int

    @property
    def peak(self) -> int:
        return max(self.phases.values())

    @property
    def disk(self) -> int:
        return self.output + self.scratch


def forecast(plan: Plan, recipe: Recipe, itemsize: int = 4, max_shard_size: int = 5_000_000_000) -> Forecast:
    """Forecast a run of ``recipe``.

    Args:
        plan: of the same recipe.
        recipe: its calibration sizes count, its text does not.
        itemsize: bytes of the dtype in which blocks run.
        max_shard_size: as the run would get it.
    """
    sizes = _Sizes.of(plan, recipe, itemsize)
    states = sizes.states if recipe.needs_text else 0
    phases = {"copying": sizes.largest_copied, "rounding": sizes.data_free_rounding}
    if recipe.needs_text:
        phases = {"copying": sizes.largest_copied + states} | {
            name: nbytes + sizes.block + states for name, nbytes in sizes.calibrated(recipe).items()
        }
        phases["embedding"] = sizes.outer * itemsize + sizes.largest_copied + sizes.states_of_one
    worst = max(phases.values())
    shard = min(max_shard_size, plan.tensor_bytes)
    return Forecast(
        phases={name: nbytes + LIBRARIES for name, nbytes in phases.items()},
        states=states,
        output=plan.bytes_on_disk,
        scratch=shard + 2 * states,
        accelerator=worst - states,
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the phases are made of, in bytes unless said otherwise."""

    block: int  # the largest block's parameters at the run's dtype
    outer: int  # elements of everything outside the blocks and the head
    largest_copied: int
    largest_linear: int  # elements
    widest: int  # input columns of the widest linear
    hidden: int
    batch_tokens: int
    states_of_one: int
    streams: int
    itemsize: int
    source_itemsize: int
    block_linears: int  # elements of a block's quantized linears
    inputs: tuple[int, ...]  # widths of a block's distinct inputs

    @classmethod
    def of(cls, plan: Plan, recipe: Recipe, itemsize: int) -> _Sizes:
        blocks: dict[str, int] = {}
        outer = 0
        for name, info in plan.source.items():
            place = name.removeprefix(f"{plan.blocks}.").partition(".")[0] if name.startswith(f"{plan.blocks}.") else ""
            if place:
                blocks[place] = blocks.get(place, 0) + math.prod(info.shape)
            elif not name.startswith("lm_head."):
                outer += math.prod(info.shape)
        linears = [m for m in plan.modules if m.name.startswith(f"{plan.blocks}.")] or list(plan.modules)
        first = [m for m in linears if m.name.startswith(f"{plan.blocks}.{min(blocks, key=int, default='0')}.")]
        packed = {f"{m.name}.weight" for m in plan.modules}
        text = recipe.calibration
        hidden = plan.hidden
        aims = recipe.tune is not None or (recipe.method == "gptq" and recipe.gptq.asymmetric > 0)
        batch = min(text.batch_size if recipe.tune is None else recipe.tune.batch_size, text.nsamples)
        return cls(
            block=max(blocks.values(), default=0) * itemsize,
            outer=outer,
            largest_copied=max((i.nbytes for n, i in plan.source.items() if n not in packed), default=0),
            largest_linear=max(math.prod(m.shape) for m in plan.modules),
            widest=max(m.shape[1] for m in plan.modules),
            hidden=hidden,
            batch_tokens=batch * text.seqlen,
            states_of_one=text.nsamples * text.seqlen * hidden * itemsize,
            streams=(3 if aims else 1) + (recipe.tune is not None and recipe.tune.target == "block"),
            itemsize=itemsize,
            source_itemsize=max(i.dtype.itemsize for i in plan.source.values()),
            block_linears=sum(math.prod(m.shape) for m in first),
            inputs=_inputs(first),
        )

    @property
    def states(self) -> int:
        return self.states_of_one * self.streams

    @property
    def data_free_rounding(self) -> int:
        return int(self.largest_linear * (self.source_itemsize + _ROUNDING_COPIES * _FLOAT32))

    @property
    def activations(self) -> int:
        """What one batch leaves between a block's linears."""
        values = _WIDE_VALUES * self.widest + _HIDDEN_VALUES * self.hidden
        return int(self.batch_tokens * values * self.itemsize)

    def calibrated(self, recipe: Recipe) -> dict[str, int]:
        """Phases of a block, beside the block and the states."""
        aims = recipe.method == "gptq" and recipe.gptq.asymmetric > 0
        hessian = self.widest**2 * _FLOAT32
        watched = hessian * (2 if aims else 1)
        if recipe.awq is not None or not recipe.gptq.true_sequential:
            watched += sum(n**2 for n in self.inputs[1:]) * _FLOAT32
        weights = int(self.largest_linear * _FLOAT32 * (_GPTQ_COPIES if recipe.method == "gptq" else _ROUNDING_COPIES + 2))
        factor = int((_FACTOR_COPIES - 1) * hessian) if recipe.method == "gptq" else 0
        found = {
            "pass": self.activations,
            "statistics": watched + self.activations * (2 if aims else 1),
            "rounding": watched + max(factor, weights + (hessian if recipe.method == "gptq" else 0)),
        }
        if recipe.tune is not None:
            found["tuning"] = int(self.block_linears * _FLOAT32 * _TUNE_COPIES + _TUNE_ACTIVATIONS * self.activations)
        return found


def _inputs(block: Sequence[PlannedModule]) -> tuple[int, ...]:
    """Widths of a block's distinct inputs, widest first: q, k and v share one, as do gate and up."""
    widths = sorted({(m.name.rpartition(".")[0], m.shape[1]) for m in block}, key=lambda n: -n[1])
    return tuple(width for _, width in widths) or (0,)
