"""An ONNX export as a model: ids in, logits out, computed by ONNX Runtime in a process of its own.

It is called as transformers' models are, so whoever scores those scores it by the same code. Rows
of a batch are run one by one.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.weights.exported import GENAI_CONFIG
from llmquant.conversion.onnx.worker import OnnxWorker
from llmquant.models.from_folder import read_config


@dataclass(frozen=True, slots=True)
class OnnxLogits:
    """What a call gives: float32 logits ``[batch, tokens, vocabulary]``."""

    logits: Tensor


class OnnxModel:
    """An export that is loaded.

    Args:
        path: a folder that ``llmquant export --to onnx`` wrote.
        threads: of ONNX Runtime; None takes torch's number.
        python: of the environment that has it; None looks for it.

    Attributes:
        worker: its process.
        config: transformers' config of the model.

    Raises:
        UsageError: no environment with ONNX Runtime.
        UnfitModelError: the folder is no export.
        LlmquantError: it cannot be loaded.
    """

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        python: str | os.PathLike[str] | None = None,
    ) -> None:
        self.config = read_config(path)
        self.worker = OnnxWorker(path, threads or torch.get_num_threads(), python)

    @property
    def kernels(self) -> dict[str, int]:
        """What multiplies: the execution provider, for all linears."""
        genai = json.loads((Path(self.worker.path) / GENAI_CONFIG).read_text(encoding="utf-8"))
        options = genai["model"]["decoder"]["session_options"].get("provider_options") or []
        names = [name for option in options for name in option] or ["cpu"]
        return {f"onnxruntime {names[0]}": int(self.config.get_text_config().num_hidden_layers)}

    def __call__(self, input_ids: Tensor, **_: Any) -> OnnxLogits:
        rows = [self.worker.logits(row.tolist()) for row in input_ids]
        return OnnxLogits(torch.stack(rows))

    def close(self) -> None:
        """End its process."""
        self.worker.close()
