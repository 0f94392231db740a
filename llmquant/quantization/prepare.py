"""What every run over a model begins with: quantize, allocate and the timing of a plan ask for the
same things in the same order.

Nothing here reads a weight; everything that model, recipe, device and text alone can refuse is
refused here.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from llmquant.checkpoint.detect import unquantized
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.data.calibration import Calibration, calibrate
from llmquant.data.sources import read_documents
from llmquant.errors import SourceError, UsageError
from llmquant.formats import Format, layout_of
from llmquant.models import architectures
from llmquant.models.architectures import Architecture
from llmquant.models.from_folder import empty_model, load_tokenizer
from llmquant.models.rotated import rotated
from llmquant.models.selection import Linears, Selection, linears_of, select
from llmquant.models.tensor_check import check_fit
from llmquant.quantization.plan import WalkPlan
from llmquant.quantization.steps.rescaling import RescaledReader
from llmquant.recipe import Recipe
from llmquant.runtime.computing import Computing
from llmquant.runtime.devices import CALIBRATION, parse_device, parse_dtype
from llmquant.runtime.distributed import ALONE, World


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model and a recipe that go together.

    Attributes:
        original: the checkpoint as it is.
        reader: as the run reads it: rotated where the recipe wants that, and with powers of two
            moved between layers where scales need it.
        skeleton: the model on the meta device.
        linears: that could be quantized.
        layout: the recipe's format.
        device, dtype: that blocks run on and in.
        computing: the same with its reason, threads and processor.
    """

    original: CheckpointReader
    reader: RescaledReader
    skeleton: PreTrainedModel
    architecture: Architecture
    linears: Linears
    layout: Format
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    computing: Computing

    def selection(self) -> Selection:
        """Which linears the recipe quantizes, and how; raises what
        :func:`llmquant.models.selection.select` does."""
        return select(self.linears, self.architecture, self.recipe, self.layout)

    def calibration(self, evaluation: str | None = None) -> Calibration | None:
        """The recipe's calibration windows; None where it names no text and needs none.

        Args:
            evaluation: text that it must not overlap with, as a source.
        """
        wanted = self.recipe.calibration
        if wanted.source is None:
            if evaluation:
                raise UsageError(
                    f"--eval-text {evaluation} is compared with the calibration text, and this run has none; leave it out"
                )
            if not self.recipe.needs_text:
                return None
            raise SourceError(
                f"method {self.recipe.steps} needs a calibration text: --calibration file:PATH, "
                "jsonl:PATH#FIELD or hf:NAME[:CONFIG]:SPLIT[:FIELD] (or --method rtn, which needs none)"
            )
        documents = read_documents(wanted.source)
        positions = getattr(self.skeleton.config, "max_position_embeddings", None)
        return calibrate(
            documents,
            load_tokenizer(self.reader.path),
            nsamples=wanted.nsamples,
            seqlen=wanted.seqlen,
            seed=self.recipe.seed,
            packing=wanted.packing,
            evaluation=read_documents(evaluation) if evaluation else None,
            vocab_size=int(self.skeleton.config.vocab_size),
            max_positions=positions if isinstance(positions, int) else None,
        )

    def plan(self, selection: Selection | None, world: World = ALONE) -> WalkPlan:
        """The walk that quantizes the selection; None: a walk for something else."""
        specs, head = ({}, None) if selection is None else (selection.specs, selection.head)
        return WalkPlan(
            self.skeleton,
            self.architecture,
            self.reader,
            specs,
            self.recipe,
            self.device,
            self.dtype,
            head,
            world,
        )


def prepare(
    model: str | os.PathLike[str], recipe: Recipe, device: str = "cpu", dtype: str = "auto"
) -> Prepared:
    """Bring model and recipe together.

    Args:
        model: folder or hub name of an unquantized decoder LLM.
        recipe: what is to be done.
        device: torch device for the blocks.
        dtype: in which they run: ``auto`` is float32.

    Raises:
        UsageError: the model is quantized, or there is no such format, device or dtype.
        CheckpointError, ArchitectureError: the model cannot be read or walked.
    """
    original = unquantized(model)
    layout = layout_of(recipe.format)
    seen = rotated(original, recipe)
    on, chosen = parse_device(device), parse_dtype(dtype, auto=CALIBRATION)
    skeleton = empty_model(seen, chosen.dtype)
    architecture = architectures.find(skeleton, str(seen.config.get("model_type")))
    check_fit(seen, skeleton)
    return Prepared(
        original,
        RescaledReader(seen, architecture, recipe),
        skeleton,
        architecture,
        linears_of(skeleton),
        layout,
        recipe,
        on,
        chosen.dtype,
        Computing.of(on, chosen),
    )


class deterministic:  # noqa: N801 - used as a with-statement verb
    """Seed torch and switch TF32 off for the length of a run; both are put back afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self._rng = torch.get_rng_state()
        self._precision = torch.get_float32_matmul_precision()
        torch.manual_seed(self.seed)
        torch.set_float32_matmul_precision("highest")

    def __exit__(self, *exc: object) -> None:
        torch.set_rng_state(self._rng)
        torch.set_float32_matmul_precision(self._precision)
        gc.collect()
