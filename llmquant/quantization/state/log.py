"""The log of a run: one JSON line per linear, per block and per turn of events, for people and for
plots.

It holds times and memory, which no two runs share, so it lies beside the model and not in it: a
folder's files are the same whenever the run is repeated. A continued run appends to the log of the
one before it.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import torch

from llmquant.checkpoint.atomic import disk
from llmquant.checkpoint.manifest import versions
from llmquant.errors import DiskError
from llmquant.quantization.state.outcome import Outcome
from llmquant.quantization.state.resume import SavedRun
from llmquant.recipe import Recipe
from llmquant.runtime import signals as interruption
from llmquant.runtime.memory import peak_resident_bytes, resident_bytes


class RunLog:
    """Writes to ``path``, or nowhere; line by line, so that it can be followed. Leaving it notes
    how the run ended.

    Raises (all methods):
        DiskError: the disk refused.
    """

    def __init__(self, path: Path | None, *, append: bool) -> None:
        self._path, self._mode = path, "a" if append else "w"
        self._file: IO[Any] | None = None
        self._device = torch.device("cpu")
        self._run: SavedRun | None = None
        self._begun = self._block_begun = time.monotonic()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._ended(error)
        finally:
            if self._file is not None:
                self._file.close()

    def _ended(self, error: BaseException | None) -> None:
        if self._run is None:
            return
        if error is None:
            self._write(
                "done",
                seconds=round(time.monotonic() - self._begun, 3),
                peak_bytes=peak_resident_bytes(),
            )
            return
        event = "interrupted" if interruption.stops(error) else "failed"
        with suppress(DiskError):  # the full disk that ended the run refuses this line too
            self._write(event, finished=self._run.blocks, error=str(error) or type(error).__name__)

    def _write(self, event: str, **facts: Any) -> None:
        if self._path is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "event": event,
            **facts,
        }
        with disk(self._path):
            self._opened(self._path).write(json.dumps(line, ensure_ascii=False) + "\n")

    def _opened(self, path: Path) -> IO[Any]:
        if self._file is None:
            self._file = path.open(self._mode, encoding="utf-8", errors="replace", buffering=1)
        return self._file

    def start(self, recipe: Recipe, run: SavedRun, device: torch.device) -> None:
        """The run begins, or goes on behind ``run.resumed`` blocks."""
        self._run, self._device = run, device
        self._write(
            "start",
            recipe_sha256=recipe.sha256(),
            blocks=run.total,
            finished_before=run.resumed,
            spilled=run.store.placement.spill,
            device=str(device),
            threads=torch.get_num_threads(),
            versions=versions(),
        )

    def block(self, run: SavedRun, done: Outcome) -> None:
        """A block is finished and kept: a line for each of its linears and one for itself."""
        for name, m in done.modules.items():
            self._write(
                "module",
                block=run.blocks,
                module=name,
                scheme=m.spec,
                weight_error=m.weight_error,
                output_error=m.output_error,
                damping=m.damping,
                dead=m.dead,
                tokens=m.tokens,
                dropped=m.dropped,
                seconds=round(m.seconds, 4),
                peak_bytes=m.peak,
                **({"fallback": m.fallback} if m.fallback else {}),
            )
        now = time.monotonic()
        each = (now - self._begun) / (run.blocks - run.resumed)
        tuned = [
            {"before": t.before, "after": t.after, "step": t.step, "steps": t.steps}
            for t in done.tuned.values()
        ]
        self._write(
            "block",
            block=run.blocks,
            of=run.total,
            seconds=round(now - self._block_begun, 4),
            left_seconds=round(each * (run.total - run.blocks), 1),
            resident_bytes=resident_bytes(),
            peak_bytes=peak_resident_bytes(),
            **(
                {"device_peak_bytes": torch.cuda.max_memory_allocated(self._device)}
                if self._device.type == "cuda"
                else {}
            ),
            **({"tuned": tuned[0]} if tuned else {}),
        )
        self._block_begun = now

    def phase(self, name: str) -> None:
        """What comes behind the blocks."""
        self._write(name, peak_bytes=peak_resident_bytes())
