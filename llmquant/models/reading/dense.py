"""An unquantized folder through transformers' own loading, which knows every historical renaming.

transformers is given tensors, not the folder: which files count is decided once, by the reader. Of
tensors without data it tells the same things (what is missing, left over, of another shape), so
whether a folder loads is known without reading a weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from llmquant.checkpoint.companions.confusion import CONFUSED, first_line
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import CheckpointError
from llmquant.models.from_folder import causal_model, read_config, read_generation_config
from llmquant.models.reading.leftovers import leftover_notes
from llmquant.models.reading.matrices import as_in_memory
from llmquant.models.reading.tower import tower_of
from llmquant.models.rows.table import ARCHITECTURES
from llmquant.models.tensor_check import refuse_mismatch

if TYPE_CHECKING:
    from collections.abc import Iterator


def load_dense(
    reader: CheckpointReader, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedModel, list[str]]:
    """The model, and what people should know of the folder.

    Raises:
        CheckpointError: a folder that does not fit the model its config describes.
        ArchitectureError: not a causal language model that transformers knows.
    """
    with _silence(bars=True):
        model, notes = _loaded(reader, reader.read_all(), dtype)
    model.config._name_or_path = str(reader.path)
    generation = read_generation_config(reader.path)
    if generation is not None:
        model.generation_config = generation
    moved: nn.Module = model
    moved.to(device)
    return model, notes


def check_dense(reader: CheckpointReader) -> list[str]:
    """What :func:`load_dense` would say, from headers alone.

    Raises:
        what :func:`load_dense` raises, but for damage that only the weights show.
    """
    empty = {
        n: torch.empty(i.shape, dtype=i.dtype, device="meta") for n, i in reader.tensors.items()
    }
    with _silence(bars=False):
        return _loaded(reader, empty, torch.float32, device_map="meta")[1]


def _loaded(
    reader: CheckpointReader, tensors: Mapping[str, Tensor], dtype: torch.dtype, **options: Any
) -> tuple[PreTrainedModel, list[str]]:
    empty = causal_model(reader, dtype)
    tower = tower_of(reader, read_config(reader.path))
    if tower is not None:
        row = ARCHITECTURES.get(tower.kind)
        width = getattr(tower.config, "hidden_size", None)
        tensors = as_in_memory(tensors, row and tower.placed(row), width)
        named = {n: tower.text_name(n) for n in tensors}
        tensors = {new: tensors[n] for n, new in named.items() if new is not None}
    try:
        result: Any = type(empty).from_pretrained(
            None,
            config=empty.config,
            state_dict=dict(tensors),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **options,
        )
    except CONFUSED as e:
        raise CheckpointError(f"{reader.path} cannot be loaded: {first_line(e)}") from e
    model, info = result
    refuse_mismatch(reader, model, info["missing_keys"], info["unexpected_keys"])
    for name, stored, wanted in sorted(info["mismatched_keys"]):
        raise CheckpointError(
            f"{reader.path}: {name} is {list(stored)} in the checkpoint, config.json makes it {list(wanted)}"
        )
    return model, [*reader.notes, *leftover_notes(reader, model, info["unexpected_keys"])]


@contextmanager
def _silence(*, bars: bool) -> Iterator[None]:
    """No table of keys from transformers, since what it says is said here; progress bars or not."""
    level, shown = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    if not bars:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if shown:
            transformers_logging.enable_progress_bar()
