"""What every run over a model begins with: quantize, allocate and the timing of a plan ask for the
same things in the same order.

Nothing here reads a weight; everything that model, recipe, device and text alone can refuse is
refused here.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from llmquant.checkpoint.detect import unquantized
from llmquant.checkpoint.manifest import read_manifest
from llmquant.data.calibration import MIN_TOKENS, Calibration, calibrate, check_numbers
from llmquant.data.sources import read_documents
from llmquant.errors import CheckpointError, SourceError, UsageError
from llmquant.formats import layout_of
from llmquant.formats.dense import Dense
from llmquant.kernels.gpu.attention import use_grouped_sdpa
from llmquant.models import architectures
from llmquant.models.block_inputs import refuse_walk
from llmquant.models.from_folder import context_length, empty_model, load_tokenizer, read_config
from llmquant.models.groups import fit_groups
from llmquant.models.precision import stays_float32, stored_buffers
from llmquant.models.reading.engine_names import engine_names
from llmquant.models.reading.fit import fitted, placeless
from llmquant.models.reading.linears import linears_of
from llmquant.models.reading.stored_dtype import SOURCE, StoredReader, as_stored
from llmquant.models.rotation.rotated import growth, rotated
from llmquant.models.selection import select
from llmquant.models.tensor_check import check_side_files
from llmquant.quantization.plan import SourceModel, WalkPlan
from llmquant.quantization.steps.rescaling import RescaledReader
from llmquant.recipe import Recipe
from llmquant.runtime.devices import (
    CALIBRATION,
    ROUNDING,
    ChosenDtype,
    make_current,
    parse_device,
    parse_dtype,
)
from llmquant.runtime.distributed import ALONE, World


def prepare(
    model: str | os.PathLike[str],
    recipe: Recipe,
    device: str = "cpu",
    dtype: str = "auto",
    store_dtype: str = SOURCE,
    world: World = ALONE,
) -> WalkPlan:
    """Bring model and recipe together; what is to be quantized is not selected yet.

    Args:
        model: folder or hub name of an unquantized decoder LLM.
        recipe: what is to be done.
        device: torch device for the blocks.
        dtype: in which they run: ``auto`` is float32.
        store_dtype: of the result's scales and of what is not quantized; see
            :mod:`llmquant.models.reading.stored_dtype`.
        world: the processes that do it together.

    Raises:
        UsageError: the model is quantized, or there is no such format, device or dtype.
        CheckpointError, ArchitectureError: the model cannot be read or walked.
    """
    given = unquantized(model)
    model_type = str(given.config.get("model_type"))
    # Of such a model tensors have other names too; that would be the symptom.
    architectures.refuse_kind(read_config(given.path))
    layout_of(recipe.format)
    on, precision = parse_device(device), passes_dtype(recipe, dtype)
    make_current(on)
    use_grouped_sdpa(on)
    fit = fitted(given, precision.dtype)
    recipe, shorter = _within_context(recipe, context_length(fit.model.config))
    if fit.tower is None:
        architecture = architectures.find(fit.model, model_type)
    else:
        architecture = architectures.find(fit.model, fit.tower.kind, fit.tower.placed)
    check_side_files(given.path)
    seen = rotated(fit.reader, recipe)
    # A rotated model has a head of its own.
    skeleton = fit.model if seen is fit.reader else empty_model(seen, precision.dtype)
    rescaled = RescaledReader(seen, architecture, recipe)
    stored = as_stored(rescaled, store_dtype, frozenset(fit.leftovers), _kept(fit.model))
    source = SourceModel(
        fit.reader,
        rescaled,
        stored,
        skeleton,
        architecture,
        linears_of(skeleton, placeless(fit)),
        engine_names(fit),
        fit.leftovers,
        (*fit.notes, *shorter, *_quantized_before(given.path), *growth(seen, stored, recipe)),
    )
    return WalkPlan(source, recipe, on, precision, world=world)


def _within_context(recipe: Recipe, longest: int | None) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe with calibration windows that the model has positions for, and what is said of
    it. One that means its length is left to :func:`check_calibration`."""
    wanted = recipe.calibration
    if wanted.strict_seqlen:
        return recipe.updated({"calibration.strict_seqlen": False}), ()
    if not recipe.needs_text and wanted.source is None:
        return recipe, ()
    if longest is None or not MIN_TOKENS <= longest < wanted.seqlen:
        return recipe, ()
    note = (
        f"the model has {longest:,} positions, so a calibration window has {longest:,} tokens instead of the recipe's "
        f"{wanted.seqlen:,}"
    )
    return recipe.updated({"calibration.seqlen": longest}), (note,)


def passes_dtype(recipe: Recipe, dtype: str) -> ChosenDtype:
    """The dtype that a run computes in, and why.

    Raises:
        UsageError: there is no such dtype.
    """
    return parse_dtype(dtype, auto=CALIBRATION if recipe.needs_text else ROUNDING)


def _quantized_before(folder: Path) -> tuple[str, ...]:
    """A note where ``convert --to dense`` wrote the folder: its numbers are a quantized model's."""
    try:
        manifest = read_manifest(folder)
    except CheckpointError:  # none, or another tool's
        return ()
    if not manifest.conversions or manifest.conversions[-1].format != Dense.name:
        return ()
    base = f" of {manifest.base_model}" if manifest.base_model else ""
    return (
        f"{folder} holds the numbers{base} after a quantization; what this run loses is measured against "
        "those, and not against the model before it",
    )


def _kept(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a tensor is stored in float32 if the checkpoint has it so: a buffer, which is small
    and often a router's, and what transformers keeps in float32 in any dtype of 16 bits."""
    buffers = {name for name, _ in stored_buffers(model)}
    return lambda name: name in buffers or stays_float32(model, name, torch.float16)


def selected(plan: WalkPlan) -> WalkPlan:
    """The plan with what its recipe quantizes, and how. Its recipe then has group sizes that fit;
    raises what :func:`llmquant.models.selection.select` does."""
    source = plan.source
    recipe, changes = fit_groups(source.linears, plan.architecture, plan.recipe, plan.layout)
    selection = select(source.linears, plan.architecture, recipe, plan.layout)
    if isinstance(source.reader, StoredReader):
        # Codes are chosen from what the checkpoint has.
        full = source.reader.in_full([f"{name}.weight" for name in selection.schemes])
        source = replace(source, reader=full)
    return replace(
        plan, source=source, recipe=recipe, selection=replace(selection, regrouped=changes)
    )


def check_calibration(plan: WalkPlan) -> None:
    """Refuse what :func:`calibration_of` refuses before it reads a text.

    Raises:
        UsageError: numbers that cannot be right for this model.
    """
    wanted = plan.recipe.calibration
    check_numbers(
        wanted.nsamples,
        wanted.seqlen,
        plan.recipe.seed,
        wanted.packing,
        context_length(plan.model.config),
    )


def calibration_of(plan: WalkPlan, evaluation: str | None = None) -> Calibration | None:
    """The recipe's calibration windows; None where it names no text and needs none.

    Args:
        plan: of model and recipe.
        evaluation: text that it must not overlap with, as a source.
    """
    recipe, config = plan.recipe, plan.model.config
    wanted = recipe.calibration
    if wanted.source is None:
        if evaluation:
            raise UsageError(
                f"--eval-text {evaluation} is compared with the calibration text, and this run has none; leave it out"
            )
        if not recipe.needs_text:
            return None
        raise SourceError(
            f"method {recipe.steps} needs a calibration text: --calibration file:PATH, "
            "jsonl:PATH#FIELD or hf:NAME[:CONFIG]:SPLIT[:FIELD] (or --method rtn, which needs none)"
        )
    if recipe.needs_text:
        refuse_walk(plan.model)
    documents = read_documents(wanted.source)
    return calibrate(
        documents,
        load_tokenizer(plan.reader.path),
        nsamples=wanted.nsamples,
        seqlen=wanted.seqlen,
        seed=recipe.seed,
        packing=wanted.packing,
        evaluation=read_documents(evaluation) if evaluation else None,
        vocab_size=int(config.get_text_config().vocab_size),
        max_positions=context_length(plan.model.config),
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
