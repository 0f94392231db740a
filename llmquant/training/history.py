"""What a training run leaves beside its folder: a JSON line per step and measurement, and a curve.

They hold times, which no two runs share, so they lie beside the model and not in it.
"""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from llmquant.checkpoint.atomic import disk
from llmquant.training.state.saved import Course
from llmquant.written import save_figure

_RESOLUTION = 150


class TrainingLog:
    """Writes to ``path``, or nowhere; line by line, so that it can be followed.

    Raises (all methods):
        DiskError: the disk refused.
    """

    def __init__(self, path: Path | None, *, append: bool) -> None:
        self._path, self._mode = path, "a" if append else "w"
        self._file: IO[str] | None = None
        self._begun = time.monotonic()

    def __call__(self, event: str, **facts: Any) -> None:
        if self._path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        seconds = round(time.monotonic() - self._begun, 3)
        line = {"time": now, "event": event, "seconds": seconds, **facts}
        with disk(self._path):
            if self._file is None:
                self._file = self._path.open(self._mode, encoding="utf-8", buffering=1)
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def draw_losses(course: Course, path: Path) -> str | None:
    """The curve of the losses as a PNG; why there is none, or None."""
    if find_spec("matplotlib") is None:
        return "no loss curve was drawn: matplotlib is not installed (pip install 'llmquant[eval]')"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.plot(
        range(1, len(course.losses) + 1), course.losses, lw=0.8, alpha=0.6, label="loss of a step"
    )
    steps, values = zip(*course.heldout, strict=True)
    axes.plot(steps, values, marker="o", ms=4, label="held-out KL")
    axes.plot([course.best_step], [course.best], "k*", ms=11, label="kept")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_yscale("log")
    axes.legend(frameon=False)
    try:
        save_figure(figure, path, dpi=_RESOLUTION, metadata={"Software": None})
    except (OSError, ValueError) as e:
        return f"no loss curve was drawn into {path}: {getattr(e, 'strerror', None) or e}"
    return None
