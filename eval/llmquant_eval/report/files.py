"""Whether a file of results can be written, before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import llmquant
from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant import FileKind


def check_file(path: Path, kind: FileKind, *read: str | Path | None) -> None:
    """Raises UsageError if no file can be written to ``path``, if it is one of those that are
    ``read``, or if what stands there is not of this ``kind``: to be asked before any work is done
    for it."""
    if path.is_dir():
        raise UsageError(f"{path} is a folder; give a file, {path / 'results.json'} for example")
    if path.exists() and not path.is_file():
        return  # a device or a pipe
    for file in (f for f in read if f):
        read_from, _ = labelled(file)
        if path.exists() and read_from.exists() and path.samefile(read_from):
            raise UsageError(f"{path} is {file}, which is read here; give another file")
    llmquant.refuse_foreign(path, kind)
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UsageError(f"{path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: no permission to write in {folder}; choose another place")


def labelled(source: str | Path) -> tuple[Path, str | None]:
    """The file, and the label behind it in ``FILE#LABEL``, which chooses a model of a report."""
    path, (name, _, label) = Path(source), str(source).rpartition("#")
    return (path, None) if path.exists() or not name else (Path(name), label)
