"""What may be written over: a file that an earlier run of the same command left, an empty one, and
nothing else. A name that was mistyped must not cost a model's config or somebody's notes.

A file is known by how it begins or ends: every kind has a mark that its writer puts there. It is
written whole or not at all.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquant.errors import LlmquantError, UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class FileKind(StrEnum):
    """What a file of results is, as messages say it."""

    REPORT = "report"
    SPEED = "speed report"
    VERDICT = "verdict"
    ITEMS = "result of validate"
    PROFILE = "drift profile"
    PAGE = "page"
    MARKDOWN = "Markdown page"
    PLOT = "plot"
    RECIPE = "recipe"
    GGUF = "GGUF file"


_ENDS = 4096  # bytes of a file's beginning and of its end in which a mark stands (PDF: the end)


def _kind(name: str) -> str:
    return rf'\A\s*\{{\s*("schema_version":\s*\d+,\s*)?"kind":\s*"{name}"'


_MARKS: dict[FileKind, str] = {
    FileKind.REPORT: r'\A\s*\{\s*"schema_version":\s*\d+,\s*"created":',
    FileKind.SPEED: _kind("speed"),
    FileKind.VERDICT: _kind("verdict"),
    FileKind.ITEMS: _kind("items"),
    FileKind.PROFILE: _kind("drift-profile"),
    # The other two are of pages before they had a generator.
    FileKind.PAGE: '<meta name="generator" content="llmquant">'
    r"|\A<!doctype html>\n(?s:.{0,300})default-src 'none'; style-src 'unsafe-inline'; "
    r'|\A<!doctype html><html lang="en"><meta charset="utf-8"><title>Drift of ',
    FileKind.MARKDOWN: r"Rendered by `llmquant leaderboard`"
    r"|\A# (SHIP|DON'T SHIP|INCONCLUSIVE)\n\n.*\n\n- baseline: `",
    FileKind.PLOT: "[Mm]atplotlib",
    # Any recipe and any GGUF file: these are replaced with --overwrite only.
    FileKind.RECIPE: r"(?m)^(method|weights|overrides|calibration):",
    FileKind.GGUF: r"\AGGUF",
}


def refuse_foreign(path: Path, kind: FileKind) -> None:
    """Refuse to write over a file that is neither empty nor of the kind that is to be written.

    Raises:
        UsageError: it is something else, or cannot be read.
    """
    if not path.is_file():
        return  # nothing, a folder, a device or a pipe
    try:
        with path.open("rb") as file:
            ends = file.read(_ENDS)
            file.seek(max(len(ends), path.stat().st_size - _ENDS))
            ends += file.read()
    except OSError as e:
        raise UsageError(f"{path} cannot be read: {e.strerror or e}; give another file") from e
    if ends and not re.search(_MARKS[kind], ends.decode(errors="replace")):
        raise UsageError(
            f"{path} exists and is no {kind} of llmquant's, so it is not written over; give another file, or remove it"
        )


def write_file(path: Path, text: str) -> None:
    """:func:`replace_file`; raises LlmquantError where that fails."""
    try:
        replace_file(path, text)
    except OSError as e:
        raise LlmquantError(f"{path} cannot be written: {e}") from e


def save_figure(figure: Figure, path: Path, **how: Any) -> None:
    """Draw one of matplotlib's figures into a file, whole or not at all.

    Args:
        path: its ending says what kind of picture.
        how: as for ``Figure.savefig``.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, format=path.suffix[1:].lower(), **how)
    replace_file(path, drawn.getvalue())


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all, texts as UTF-8: beside it, fsync, rename. Keeps the mode of
    a file that was there. A device or a pipe (``/dev/stdout``) is written to: a rename
    would put a file in its place."""
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        temporary.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
