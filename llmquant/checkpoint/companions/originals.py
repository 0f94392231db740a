"""The models that a run reads: no destination may hold anything of them, wherever links lead."""

from __future__ import annotations

import os
from pathlib import Path

from llmquant.checkpoint.atomic import refuse_held
from llmquant.checkpoint.companions.files import files_read
from llmquant.checkpoint.gguf.header import shards_of
from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.weights.files import weight_files
from llmquant.checkpoint.weights.json_files import read_json
from llmquant.errors import UsageError


def refuse_source(
    path: Path, model: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None
) -> None:
    """Refuse a destination that is the model, or that holds something that is read of it: replacing
    it would delete that.

    Args:
        path: the destination, a folder or a file.
        model: a folder, a GGUF file or a hub name.
        folder: the model's, where it is known; else it is looked for.

    Raises:
        UsageError: it is.
        CheckpointError: the model cannot be found or read.
    """
    source = resolve(model) if folder is None else Path(folder)
    if path.is_dir() and path.samefile(source):
        raise UsageError(f"-o {path} is the model itself; choose another folder")
    named = Path(model).expanduser()
    imported = shards_of(named) if named.is_file() else ()
    weights = weight_files(source, read_json(source / "config.json")).files
    refuse_held(path, f"the model {model}", [source, *imported, *files_read(source, weights)])
