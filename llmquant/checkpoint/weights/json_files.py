"""The JSON files of a model folder: config, index, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmquant.checkpoint.weights.headers import stranger
from llmquant.errors import CheckpointError, UnfitModelError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable or not an object; names the file, and says what it is
            instead where that can be told.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UnfitModelError(
            f"{path} is missing; is {path.parent} a Hugging Face model folder?"
        ) from e
    except (OSError, ValueError, RecursionError) as e:
        what = stranger(path, but=(b"{", b"["))
        raise CheckpointError(
            f"{path} cannot be read as JSON: {f'it is {what}' if what else e}"
        ) from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds {type(value).__name__}, not a JSON object")
    return value
