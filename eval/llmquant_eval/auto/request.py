"""What ``llmquant auto`` was asked for, as one value that refuses to be wrong."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from llmquant.errors import UsageError
from llmquant_eval.auto.bounds import Bounds
from llmquant_eval.cli_options import share_of

DEFAULT_WINDOWS = 128
"""Held-out windows that are scored where nothing is said: enough to tell a loss of a percent."""

_DURATION = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m(?:in)?)?(?:(\d+(?:\.\d+)?)s?)?")


@dataclass(frozen=True, slots=True)
class AutoRequest:
    """The command's options.

    Attributes:
        data: sources of text; divided into calibration and held-out parts unless ``calibration``
            names another source for the former.
        rungs: recipes to try instead of the ladder, in this order; ``mixed:BITS`` allocates.
        max_bytes: of weight files.
        fit: bytes of RAM to run in.
        time_budget: seconds of all rungs together.
        fastest: choose by measured decoding speed, not by size.
        alpha: acceptable probability of choosing a candidate that is beyond the bound.
        keep_candidates: do not delete folders that can no longer be chosen.
    """

    model: str
    output: Path
    data: tuple[str, ...]
    bounds: Bounds
    calibration: str | None = None
    nsamples: int | None = None
    seqlen: int | None = None
    rungs: tuple[str, ...] = ()
    layout: str | None = None
    engine: str = "any"
    max_bytes: int | None = None
    fit: int | None = None
    time_budget: float | None = None
    fastest: bool = False
    alpha: float = 0.05
    tasks: str | None = None
    include_path: str | None = None
    limit: int | None = None
    window: int | None = None
    max_windows: int = DEFAULT_WINDOWS
    bos: str = "default"
    dtype: str = "auto"
    device: str = "auto"
    kernel: str = "auto"
    threads: int | None = None
    max_memory: int | None = None
    overwrite: bool = False
    keep_candidates: bool = False
    command: str = "llmquant auto"

    def __post_init__(self) -> None:
        if not self.data:
            raise UsageError("give a text of yours with --data FILE; several with several --data")
        if self.output.name in ("", ".."):
            raise UsageError(f"-o {self.output} is no name for a new folder; give one, such as out")
        if self.max_bytes is not None and self.fit is not None:
            raise UsageError("--max-bytes and --fit both limit the size; give one of them")
        if not 0 < self.alpha < 0.5:
            raise UsageError(f"--alpha {self.alpha:g} decides nothing; give a level such as 0.05")
        if (self.bounds.task_drop is None) != (self.tasks is None):
            raise UsageError("--max-task-drop is measured by --tasks; give both or neither")
        if self.tasks is None and (self.limit, self.include_path) != (None, None):
            raise UsageError("--limit and --include-path belong to --tasks; leave them out")
        if self.max_windows < 1:
            raise UsageError(f"--max-windows {self.max_windows} scores nothing; give 1 or more")
        for option, size in (("--max-bytes", self.max_bytes), ("--fit", self.fit)):
            if size is not None and size < 1:
                raise UsageError(f"{option} {size} holds no model; give a size such as 8GiB")

    @property
    def work(self) -> Path:
        """Where everything but the chosen folder is kept, beside it."""
        return self.output.with_name(f"{self.output.name}.auto")


def parse_bound(option: str, text: str | None, example: str) -> float | None:
    """A share; None where none is given.

    Raises:
        UsageError: no number; names the option.
    """
    if text is None:
        return None
    share = share_of(text)
    if share is None or not math.isfinite(share):
        raise UsageError(f"{option} {text!r} is not a number; write {example}")
    return share


def parse_duration(option: str, text: str) -> float:
    """Seconds of ``2h``, ``90m``, ``1h30m``, ``45s`` or ``45``.

    Raises:
        UsageError: something else, or no time at all.
    """
    match = _DURATION.fullmatch(text.replace(" ", "").lower())
    parts = [float(p) if p else 0.0 for p in match.groups()] if match else [0.0]
    seconds = sum(part * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
    if not match or seconds <= 0:
        raise UsageError(f"{option} {text!r} is not a time; write 2h, 90m, 1h30m or 45s")
    return seconds
