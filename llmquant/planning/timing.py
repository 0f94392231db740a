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
from llmquant.models.architectures import blocks_of
from llmquant.models.selection import Selection
from llmquant.quantization.finish import write_config
from llmquant.quantization.plan import BlockResult
from llmquant.quantization.prepare import Prepared, deterministic, prepare
from llmquant.quantization.run import QuantizeOptions
from llmquant.quantization.walk import walk
from llmquant.quantization.write import store
from llmquant.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the first block (with what comes before it), of the one behind it, and the number
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
    prepared = prepare(model, recipe, options.device, options.dtype)
    selection, calibration = prepared.selection(), prepared.calibration(options.evaluation)
    plan = prepared.plan(selection)
    seconds: list[float] = []
    began = time.perf_counter()
    with deterministic(recipe.seed):
        for result in walk(plan, calibration.windows if calibration else (), lambda _: None):
            _write_and_prove(result, prepared, selection)
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            if len(seconds) == 2:
                break
    return Timing(seconds[0], seconds[-1], len(blocks_of(plan.model, plan.architecture)))


def _write_and_prove(result: BlockResult, prepared: Prepared, selection: Selection) -> None:
    """What a run does with a finished block, in a folder of its own."""
    schemes = {name: selection.schemes[name] for name in result.weights}
    if not schemes:
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        CheckpointWriter(Path(folder) / "block") as writer,
    ):
        for name, (weight, _) in result.weights.items():
            store(name, weight, schemes[name].activations, prepared.reader, writer, prepared.layout)
        writer.finish_weights()
        write_config(writer, prepared.reader, prepared.layout, schemes, selection)
        prove_modules(
            CheckpointReader(writer.partial),
            {n: report.digest for n, (_, report) in result.weights.items()},
        )
        writer.publish()
