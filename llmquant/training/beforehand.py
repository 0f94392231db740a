"""What a run is refused for before a weight is rounded or trained: from the options, and from the
config and the tokenizer of a model.

A model that is not quantized yet is rounded for minutes or hours before it is trained, so all of it
is asked of the original first (:func:`check_recipe`). What needs no text is asked when such a run
is planned (:func:`check_plan`), and all of it of a quantized folder when a run is prepared.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llmquant.checkpoint.detect import quantization_of
from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.checkpoint.sources.floats import as_floats
from llmquant.errors import UsageError
from llmquant.models.from_folder import context_length, load_tokenizer, read_config
from llmquant.recipe import Recipe
from llmquant.recipe_sections import QAT
from llmquant.runtime.devices import ChosenDtype, make_current, parse_device, parse_dtype
from llmquant.training.options import QatOptions
from llmquant.training.teacher.targets import TargetFile, Wanted
from llmquant.training.teacher.text import Calibrated, TrainingText, check_length, read_text

_LARGEST_SEED = 2**63 - 1


def check_recipe(model: str | os.PathLike[str], recipe: Recipe, options: QatOptions) -> None:
    """Refuse what training would be refused for once the model is rounded.

    Args:
        model: the unquantized original.
        recipe: with a ``qat`` section that has a text.
        options: of the training.

    Raises:
        UsageError, SourceError: as :func:`llmquant.training.run.qat`.
    """
    section, folder = recipe.qat, resolve(model)
    assert section is not None  # it is what is checked
    device, _ = where_of(options)
    check_hidden(section, rotated=recipe.rotation is not None)
    text = text_of(section, folder, recipe.seed, options)
    if section.top_k:
        target_file(Path(), wanted_of(section, text), folder, device).check_size(options.max_cache)


def check_plan(model: str | os.PathLike[str], recipe: Recipe) -> None:
    """Refuse what :func:`check_recipe` refuses by the recipe and the config alone.

    Args:
        model: the unquantized original.
        recipe: with or without a ``qat`` section.

    Raises:
        UsageError: hidden states of a rotated model, or windows longer than the context.
    """
    if recipe.qat is None:
        return
    check_hidden(recipe.qat, rotated=recipe.rotation is not None)
    check_length(recipe.qat, context_length(read_config(model)))


def where_of(options: QatOptions) -> tuple[torch.device, ChosenDtype]:
    """The device and the dtype of products.

    Raises:
        UsageError: there is no such device or dtype, or it is float16.
    """
    device = parse_device(options.device)
    make_current(device)
    dtype = parse_dtype(options.dtype, device, stored=torch.bfloat16)
    if dtype.dtype == torch.float16:
        raise UsageError("training in float16 loses small gradients; give float32 or bfloat16")
    return device, dtype


def check_seed(seed: int) -> None:
    """Raises UsageError where a recipe would refuse it."""
    if not 0 <= seed <= _LARGEST_SEED:
        raise UsageError(f"seed {seed} is not between 0 and {_LARGEST_SEED}")


def check_hidden(section: QAT, *, rotated: bool) -> None:
    """Raises UsageError where hidden states are compared with a rotated model's."""
    if section.hidden_loss and rotated:
        raise UsageError(
            "the hidden states of a rotated model are not its original's; leave out qat.hidden_loss (--hidden-loss)"
        )


def text_of(
    section: QAT,
    folder: Path,
    seed: int,
    options: QatOptions,
    calibrated: Calibrated | None = None,
) -> TrainingText:
    """The text of a run, by the tokenizer and the context of the model in ``folder``.

    Raises:
        UsageError: none is named, or what :func:`llmquant.training.teacher.text.read_text` raises.
        SourceError: as there.
    """
    if section.source is None:
        raise UsageError(
            "training needs a text; give llmquant qat one with --data SOURCE, llmquant quantize with --calibration "
            "SOURCE, or a recipe as qat.source"
        )
    config = read_config(folder)
    return read_text(
        section,
        section.source,
        load_tokenizer(folder),
        seed=seed,
        vocab_size=int(config.get_text_config().vocab_size),
        max_positions=context_length(config),
        evaluation=options.evaluation,
        calibrated=calibrated,
    )


def original_of(reference: str | os.PathLike[str]) -> CheckpointReader:
    """The model that is trained towards.

    Raises:
        UsageError: it is quantized.
    """
    reader = CheckpointReader(resolve(reference))
    label = quantization_of(as_floats(reader))
    if label is not None:
        raise UsageError(
            f"the reference {reader.path} is quantized ({label['quant_method']}), so training would learn its errors; "
            "give --reference the unquantized original"
        )
    return reader


def wanted_of(section: QAT, text: TrainingText) -> Wanted:
    """What is asked of the original."""
    return Wanted(
        (*text.heldout, *text.training),
        len(text.heldout),
        section.top_k,
        section.temperature,
        section.hidden_loss > 0,
        section.micro_batch,
    )


def target_file(path: Path, wanted: Wanted, original: Path, device: torch.device) -> TargetFile:
    """The file of what the model in ``original`` says."""
    config = read_config(original).get_text_config()
    width = int(getattr(config, "hidden_size", 0))
    return TargetFile(path, wanted, int(config.vocab_size), width, device)
