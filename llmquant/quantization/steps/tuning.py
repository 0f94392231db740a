"""Tuning a block of a walked model: binds :func:`llmquant.algorithms.tune` to a decoder block and
its captured inputs.

The block's linears are replaced call by call, so that nothing in it changes until the best state is
known; then that is written into the block, and what the next block reads comes from it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from llmquant.algorithms import TuneOptions, tune
from llmquant.models.block_inputs import BlockInput, run_with
from llmquant.records import TuneReport
from llmquant.weight import QuantizedWeight


def tune_block(
    block: nn.Module,
    name: str,
    originals: Mapping[str, Tensor],
    starts: Mapping[str, QuantizedWeight],
    inputs: Sequence[BlockInput],
    targets: Sequence[Tensor],
    options: TuneOptions,
    dtype: torch.dtype,
) -> tuple[dict[str, QuantizedWeight], TuneReport]:
    """Move a block's linears together and write the result into it.

    Args:
        block: with its quantized weights in place.
        name: the block's full name.
        originals: float32 weights ``[out, in]`` of its linears, by full name.
        starts: their quantized forms.
        inputs: what the quantized blocks before it deliver.
        targets: the wanted output for each of them.
        options: see :class:`llmquant.algorithms.TuneOptions`.
        dtype: in which the block runs.
    """
    start = time.perf_counter()
    place = {full: f"{full.removeprefix(f'{name}.')}.weight" for full in starts}

    def forward(weights: Mapping[str, Tensor], batch: int) -> Tensor:
        return run_with(
            block,
            {place[full]: weight.to(dtype) for full, weight in weights.items()},
            inputs[batch],
        )

    tuned = tune(originals, starts, forward, targets, options, name)
    for full, weight in tuned.weights.items():
        block.get_parameter(place[full]).data.copy_(weight.dequantize(dtype))
    report = TuneReport(
        before=tuned.before,
        after=tuned.after,
        step=tuned.step,
        steps=tuned.steps,
        seconds=time.perf_counter() - start,
    )
    return tuned.weights, report
