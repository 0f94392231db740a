"""How long a run would take on this machine, from its first two blocks: they are quantized, packed, written and proved for real.

The first block also pays for the embedding, so all further ones are taken to cost what the second did. Tensors that are copied,
and the head of a run that quantizes it too, are not timed: next to the blocks they are small.
"""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from llmquant import architectures
from llmquant.architectures import blocks_of
from llmquant.checkpoint import CheckpointReader, CheckpointWriter
from llmquant.devices import parse_device, parse_dtype
from llmquant.fit import check_fit
from llmquant.formats import FORMATS, Format, Scheme
from llmquant.hub import resolve
from llmquant.manifest import prove_modules
from llmquant.pipeline import QuantizeOptions, calibration_of, deterministic, refuse_quantized
from llmquant.recipe import Recipe
from llmquant.rotation import rotated
from llmquant.selection import Selection, linears_of, select
from llmquant.skeleton import empty_model
from llmquant.walk import BlockResult, WalkPlan, walk


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of the first block (with what comes before it), of the one behind it, and the number of blocks."""

    first: float
    later: float
    blocks: int

    @property
    def total(self) -> float:
        """Of the whole run."""
        return self.first + self.later * (self.blocks - 1)


def time_blocks(model: str | os.PathLike[str], recipe: Recipe, options: QuantizeOptions | None = None) -> Timing:
    """Quantize the first two blocks of a model and throw them away.

    Args:
        model: folder or hub name.
        recipe: what the run would do; with its calibration text where it needs one.
        options: device and dtype.

    Raises:
        what :func:`llmquant.quantize` raises for the same request.
    """
    options = options or QuantizeOptions()
    original = CheckpointReader(resolve(model))
    refuse_quantized(original)
    reader = rotated(original, recipe)
    device, dtype = parse_device(options.device), parse_dtype(options.dtype, auto=torch.float32)
    skeleton = empty_model(reader, dtype)
    architecture = architectures.find(skeleton, str(reader.config.get("model_type")))
    layout = FORMATS[recipe.format]
    selection = select(linears_of(skeleton), architecture, recipe, layout)
    check_fit(reader, skeleton)
    calibration = calibration_of(reader, recipe, options, skeleton)
    plan = WalkPlan(skeleton, architecture, reader, selection.specs, recipe, device, dtype, selection.head)
    seconds: list[float] = []
    began = time.perf_counter()
    with deterministic(recipe.seed):
        for result in walk(plan, calibration.windows if calibration else (), lambda _: None):
            _write_and_prove(result, reader, layout, selection)
            seconds.append(time.perf_counter() - began)
            began = time.perf_counter()
            if len(seconds) == 2:
                break
    return Timing(seconds[0], seconds[-1], len(blocks_of(skeleton, architecture)))


def _write_and_prove(result: BlockResult, reader: CheckpointReader, layout: Format, selection: Selection) -> None:
    """What a run does with a finished block, in a folder of its own."""
    schemes: dict[str, Scheme] = {}
    with tempfile.TemporaryDirectory() as folder, CheckpointWriter(Path(folder) / "block") as writer:
        for name, (weight, _) in result.weights.items():
            schemes[name] = selection.schemes[name]
            packed = layout.pack(weight, reader.info(f"{name}.weight").dtype, schemes[name].activations)
            writer.add_together({f"{name}.{suffix}": tensor for suffix, tensor in packed.items()})
        if not schemes:
            return
        writer.finish_weights()
        config = {k: v for k, v in reader.config.items() if k != "quantization_config"}
        writer.write_json("config.json", config | {"quantization_config": layout.config(schemes, selection.skipped)})
        for name, text in layout.side_files(layout.config(schemes, selection.skipped)).items():
            writer.write_text(name, text)
        prove_modules(CheckpointReader(writer.partial), {n: report.digest for n, (_, report) in result.weights.items()})
        writer.publish()
