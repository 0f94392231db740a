"""Folders that ``llmquant export --to onnx`` writes: how they are known, and what they are."""

from __future__ import annotations

import os
from pathlib import Path

GENAI_CONFIG = "genai_config.json"
MODEL = "model.onnx"
DATA = f"{MODEL}.data"


def is_onnx(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is for onnxruntime-genai and has no weights that llmquant loads."""
    path = Path(path)
    return (path / GENAI_CONFIG).is_file() and not any(path.glob("*.safetensors"))
