"""The JSON files of a model folder: config, index, tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmquant.checkpoint.weights.headers import stranger
from llmquant.errors import CheckpointError, UnfitModelError


def lost(path: Path) -> str | None:
    """What is wrong with a link to nothing, as a cache without its blobs has; None for anything
    else."""
    if not path.is_symlink() or path.exists():
        return None
    return (
        f"{path} is a link to {path.readlink()}, which cannot be found (a cache that was moved, or a "
        "download that stopped); fetch the model again"
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: missing, unreadable or not an object; names the file, and says what it is
            instead where that can be told.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        if (target := lost(path)) is not None:
            raise CheckpointError(target) from e
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
