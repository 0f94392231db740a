"""A packed model in memory cannot be saved by ``save_pretrained``, and says so instead of writing something wrong.

Its buffers are what a kernel multiplies by, not what a file layout stores, and no loader would take them for weights. The
folder that the model was loaded from is the checkpoint.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NoReturn

from torch import nn
from transformers import PreTrainedModel

from llmquant.errors import UsageError


def refuse_saving(model: nn.Module, path: Path) -> None:
    """Make ``save_pretrained`` and ``push_to_hub`` of a packed model, and of the models inside it, raise UsageError."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for method in ("save_pretrained", "push_to_hub"):
                setattr(module, method, partial(_refuse, path))


def _refuse(path: Path, *args: object, **kwargs: object) -> NoReturn:
    raise UsageError(
        f"this model's linears are packed in memory for a kernel, which is not what files hold; copy {path} instead, "
        "or write another layout, or a dense checkpoint, with llmquant convert"
    )
