"""How long a run would take on this machine, from its first two blocks: they are quantized, packed,
written and proved for real.

The first block also pays for the embedding, so all further ones are taken to cost what the second
did. Tensors that are copied, and the head of a run that quantizes it too, are not timed: next to
the blocks they are small.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from llmquant.checkpoint.manifest import prove_modules
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.quantization.blocks.full_device import full_device
from llmquant.quantization.blocks.hidden_states import StateStore
from llmquant.quantization.finish import store, write_config
from llmquant.quantization.memory import placement
from llmquant.quantization.options import QuantizeOptions
from llmquant.quantization.plan import BlockResult, WalkPlan
from llmquant.quantization.prepare import calibration_of, deterministic, prepare, selected
from llmquant.quantization.walk import walk
from llmquant.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the first block (with what comes before it), of the next one, and the number
    of blocks."""

    first: float
    later: float
    blocks: int

    @property
    def total(self) -> float:
        """Of the whole run."""
        return self.first + self.later * (self.blocks - 1)


def time_blocks(
    model: str | os.PathLike[str], recipe: Recipe, options: QuantizeOptions | None = None
) -> Timing:
    """Quantize the first two blocks of a model and throw them away.

    Args:
        model: folder or hub name.
        recipe: what the run would do; with its calibration text where it needs one.
        options: device and dtype.

    Raises:
        what :func:`llmquant.quantize` raises for the same request.
    """
    options = options or QuantizeOptions()
    plan = selected(prepare(model, recipe, options.device, options.dtype))
    calibration = calibration_of(plan, options.evaluation)
    windows = calibration.windows if calibration else ()
    seconds: list[float] = []
    left = "nothing was kept of the blocks that were timed"
    with (
        tempfile.TemporaryDirectory() as folder,
        deterministic(recipe.seed),
        full_device(plan, lambda: left),
    ):
        where = placement(plan, windows, options.max_memory)
        store = StateStore(plan.device, Path(folder), placement=where)
        began = time.perf_counter()
        for result in walk(plan, windows, lambda _: None, store):
            _write_and_prove(result, plan)
            if result.index is None:
                continue  # the embeddings: part of the first block's time
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            if len(seconds) == 2:
                break
    return Timing(seconds[0], seconds[-1], plan.blocks)


def _write_and_prove(result: BlockResult, plan: WalkPlan) -> None:
    """What a run does with a finished block, in a folder of its own."""
    schemes = {name: plan.selection.schemes[name] for name in result.weights}
    if not schemes:
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        CheckpointWriter(Path(folder) / "block") as writer,
    ):
        for name, (weight, _) in result.weights.items():
            store(name, weight, plan, writer)
        writer.finish_weights()
        write_config(writer, plan, schemes)
        prove_modules(
            CheckpointReader(writer.partial),
            {n: report.digest for n, (_, report) in result.weights.items()},
        )
        writer.publish()
