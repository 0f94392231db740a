"""The state of an unfinished training run, in ``.NAME.qat`` beside its destination.

``run.json`` says which run it is, ``teacher.bin`` holds the targets, ``state.safetensors`` all that
a step depends on: parameters, both moments of AdamW, the best state so far, and as metadata the
numbers. It is replaced by a rename, so at every instant there is a whole one; continuing from it is
the same computation on the same numbers. When a save takes long it is made more rarely.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmquant.checkpoint.atomic import disk, fsync_path, remove
from llmquant.checkpoint.manifest import MANIFEST, read_manifest
from llmquant.errors import CheckpointError, UsageError
from llmquant.quantization.state.fingerprint import Facts, differences

_EVERY = 60.0  # seconds between saves, at least
_SHARE = 20  # a save may take one in so many parts of the time
_SEPARATOR = "|"
_PARTS = {"first": "exp_avg", "second": "exp_avg_sq", "count": "step"}


@dataclass(slots=True)
class Course:
    """Where a run is.

    Attributes:
        step: steps taken.
        start: held-out KL of the start.
        best: the smallest so far, and the step after which it was measured.
        waited: measurements since then.
        heldout: (step, KL) of every measurement.
        losses: of every step.
        stopped: why it ended before its last step.
        measured: the step whose held-out KL was measured last; -1: none.
    """

    step: int = 0
    start: float = 0.0
    best: float = 0.0
    best_step: int = 0
    waited: int = 0
    heldout: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    stopped: str | None = None
    measured: int = -1


class SavedTraining:
    """The folder of one run's state.

    Args:
        output: the run's destination.
    """

    def __init__(self, output: Path) -> None:
        self.folder = output.with_name(f".{output.name}.qat")
        self._saved, self._took = time.monotonic(), 0.0

    @property
    def teacher(self) -> Path:
        """The file of targets."""
        return self.folder / "teacher.bin"

    @property
    def _record(self) -> Path:
        return self.folder / "run.json"

    @property
    def _state(self) -> Path:
        return self.folder / "state.safetensors"

    def begin(self, facts: Facts, *, restart: bool) -> None:
        """Make the folder, or find that of the same run.

        Raises:
            UsageError: it is another run's; says what differs.
            DiskError: the disk refused.
        """
        record = self._record
        with disk(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if restart or not record.is_file():
                self._clear()
            if record.is_file():
                try:
                    before = json.loads(record.read_text(encoding="utf-8"))
                except ValueError as e:
                    raise CheckpointError(
                        f"{record} is damaged; add --restart to start over"
                    ) from e
                different = differences(before, facts)
                if different:
                    raise UsageError(
                        f"{self.folder} has the saved state of an interrupted run with other settings: {different}. "
                        "Repeat that run's command to resume it, or add --restart to delete the state and start over"
                    )
                return
            self._replace(record, json.dumps(facts, indent=1).encode())

    def _clear(self) -> None:
        """Remove what the folder holds; first what a run goes on from, last what says whose it is:
        half removed it must not be another run's. The folder itself stays, since it is locked."""
        for path in (self._state, self.teacher, *self.folder.iterdir()):
            if path != self._record:
                path.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def forget_used(self, output: Path) -> None:
        """Remove the state of a run that was killed between giving its result the name and this:
        one that is older than the result, and of the same text."""
        try:
            made = read_manifest(output).qat
            known = json.loads(self._record.read_text(encoding="utf-8"))
            saved, used = (p.stat().st_mtime_ns for p in (self._state, output / MANIFEST))
        except (CheckpointError, OSError, ValueError):
            return
        if (
            made is not None
            and saved <= used
            and known.get("training token ids") == made.ids_sha256
        ):
            self.remove()

    def _replace(self, path: Path, data: bytes) -> None:
        partial = path.with_suffix(".partial")
        partial.write_bytes(data)
        fsync_path(partial)
        partial.replace(path)
        fsync_path(self.folder)

    def due(self) -> bool:
        """Whether it is time to save again."""
        return time.monotonic() - self._saved > max(_EVERY, _SHARE * self._took)

    def save(self, course: Course, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Make a state durable.

        Args:
            tensors: by part (parameters, moments, best) and name.

        Raises:
            DiskError: the disk refused.
        """
        begun = time.monotonic()
        flat = {
            f"{part}{_SEPARATOR}{name}": t.detach().cpu().contiguous()
            for part, named in tensors.items()
            for name, t in named.items()
        }
        partial = self._state.with_suffix(".partial")
        with disk(self.folder):
            save_file(flat, partial, metadata={"course": json.dumps(asdict(course))})
            fsync_path(partial)
            os.replace(partial, self._state)  # noqa: PTH105 - as atomic as rename
            fsync_path(self.folder)
        self._saved = time.monotonic()
        self._took = self._saved - begun

    def load(self) -> tuple[Course, dict[str, dict[str, Tensor]]] | None:
        """The state that was saved last, or None.

        Raises:
            CheckpointError: it is damaged.
        """
        if not self._state.is_file():
            return None
        try:
            with safe_open(self._state, framework="pt") as file:
                course: dict[str, Any] = json.loads(file.metadata()["course"])
                parts: dict[str, dict[str, Tensor]] = {}
                for key in file.keys():  # noqa: SIM118 - no mapping
                    part, _, name = key.partition(_SEPARATOR)
                    parts.setdefault(part, {})[name] = file.get_tensor(key)
            course["heldout"] = [(int(n), float(kl)) for n, kl in course["heldout"]]
            return Course(**course), parts
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as e:
            raise CheckpointError(
                f"{self._state} is damaged ({e}); add --restart to start over"
            ) from e

    def remove(self) -> None:
        """Delete the state."""
        remove(self.folder)


def moments(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """Both moments of AdamW and its count of steps by the names of its parameters, in the order of
    its groups. One that never had a gradient (an expert that no token was routed to) has none."""
    found: dict[str, dict[str, Tensor]] = {part: {} for part in _PARTS}
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        for part, key in _PARTS.items() if parameter in optimizer.state else ():
            found[part][name] = optimizer.state[parameter][key]
    return found


def put_moments(
    optimizer: torch.optim.Optimizer, names: list[str], parts: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """The inverse of :func:`moments`."""
    for name, parameter in zip(names, _parameters(optimizer), strict=True):
        if name in parts.get("count", {}):
            state = {key: parts[part][name].clone() for part, key in _PARTS.items()}
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].to(parameter.device)
            optimizer.state[parameter] = state


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
