"""Where a run gets the teacher's targets from: a file that was filled once, or the teacher itself.

The file has a record for every window: token ids and log-probabilities of the top ``k``, that of
all others together, the last hidden states where the loss wants them, and a checksum. It is filled
in order, so that an interrupted run finds how far it came by reading it. Held-out windows come
first and at temperature 1; those trained on follow at the loss's.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant.checkpoint.atomic import disk
from llmquant.errors import QuantizationError, UsageError
from llmquant.training.teacher.loss import Targets, make_targets
from llmquant.training.teacher.text import Window

OnProgress = Callable[[str, int, int], None]
_UINT16 = 1 << 16


class TargetSource(Protocol):
    """Targets of windows by their numbers: held-out windows first, then those trained on."""

    def targets(self, indices: Sequence[int]) -> list[Targets]:
        """Of all positions of each window but its last."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is asked of the teacher.

    Attributes:
        windows: held-out ones first.
        heldout: how many those are.
        k: logits per position; 0: all.
        temperature: of the windows trained on.
        hidden: whether hidden states are wanted too.
        together: windows that the teacher is asked for at once.
    """

    windows: Sequence[Window]
    heldout: int
    k: int
    temperature: float
    hidden: bool
    together: int = 1

    def at(self, index: int) -> float:
        """The temperature of a window's targets."""
        return 1.0 if index < self.heldout else self.temperature


class Teacher:
    """Asks the model each time; nothing is kept.

    Raises (``targets``):
        QuantizationError: the teacher's logits are NaN or infinite.
    """

    def __init__(self, model: PreTrainedModel, wanted: Wanted) -> None:
        self._model, self._wanted = model, wanted

    @torch.no_grad()
    def targets(self, indices: Sequence[int]) -> list[Targets]:
        ids = torch.stack([self._wanted.windows[i].ids for i in indices]).to(self._model.device)
        out = self._model(ids, use_cache=False, output_hidden_states=self._wanted.hidden)
        found = [
            make_targets(
                out.logits[row, :-1],
                self._wanted.k,
                self._wanted.at(index),
                out.hidden_states[-1][row, :-1] if self._wanted.hidden else None,
            )
            for row, index in enumerate(indices)
        ]
        if not bool(torch.stack([torch.isfinite(t.logprobs).all() for t in found]).all()):
            raise QuantizationError(
                "the reference model gives NaN or infinite logits on the training text; use --dtype float32, "
                "or another reference"
            )
        return found


class TargetFile:
    """A file of records, filled once and then mapped.

    Args:
        path: of the file.
        wanted: what it holds.
        vocab_size: ids are kept in two bytes where that is enough.
        width: of hidden states.
        device: of the targets.
    """

    def __init__(
        self, path: Path, wanted: Wanted, vocab_size: int, width: int, device: torch.device
    ) -> None:
        self._path, self._wanted, self._device = path, wanted, device
        positions = len(wanted.windows[0].counts)
        k = min(wanted.k, vocab_size)
        fields: list[Any] = [
            ("ids", np.uint16 if vocab_size <= _UINT16 else np.int32, (positions, k)),
            ("logprobs", np.float32, (positions, k)),
            ("rest", np.float32, (positions,)),
        ]
        if wanted.hidden:
            fields.append(("hidden", np.float16, (positions, width)))
        self._dtype = np.dtype([*fields, ("crc", np.uint32)])
        self._map: np.memmap[Any, np.dtype[Any]] | None = None

    @property
    def nbytes(self) -> int:
        """Of the whole file."""
        return self._dtype.itemsize * len(self._wanted.windows)

    def check_size(self, limit: int) -> None:
        """Raises UsageError where the file would be larger than ``limit`` bytes."""
        if self.nbytes > limit:
            windows, k = len(self._wanted.windows), self._wanted.k
            fits = max(1, int(k * limit / self.nbytes))
            raise UsageError(
                f"the reference's top {k} logits of {windows:,} windows take {self.nbytes / 1e6:,.0f} MB on disk, more than "
                f"--max-cache allows ({limit / 1e6:,.0f} MB); give --top-k {fits}, fewer --nsamples, or a larger --max-cache"
            )

    def filled(self) -> int:
        """Windows that are in the file, whole."""
        if not self._path.is_file():
            return 0
        whole = self._path.stat().st_size // self._dtype.itemsize
        if not whole:
            return 0
        records = np.memmap(self._path, self._dtype, "r", shape=(whole,))
        for i in range(min(whole, len(self._wanted.windows))):
            if int(records[i]["crc"]) != _checksum(records[i]):
                return i
        return min(whole, len(self._wanted.windows))

    def fill(self, teacher: Callable[[], TargetSource], on_progress: OnProgress) -> None:
        """Ask for what is missing.

        Args:
            teacher: makes who is asked; not called where nothing is missing.

        Raises:
            DiskError: the disk refused.
        """
        done, total, size = self.filled(), len(self._wanted.windows), self._wanted.together
        if done == total:
            return
        done -= done % size  # the same windows are asked for at once as in a run without a break
        asked = teacher()
        with disk(self._path), self._path.open("r+b" if done else "wb") as file:
            file.truncate(done * self._dtype.itemsize)
            file.seek(0, os.SEEK_END)
            for i in range(done, total, size):
                on_progress("asking the reference", i, total)
                for targets in asked.targets(range(i, min(i + size, total))):
                    file.write(self._record(targets).tobytes())
                file.flush()
            os.fsync(file.fileno())

    def _record(self, targets: Targets) -> np.ndarray[Any, Any]:
        record = np.zeros((), self._dtype)
        record["ids"] = targets.ids.cpu().numpy()
        record["logprobs"] = targets.logprobs.cpu().numpy()
        record["rest"] = targets.rest.cpu().numpy()
        if targets.hidden is not None:
            record["hidden"] = targets.hidden.to(torch.float16).cpu().numpy()
        record["crc"] = _checksum(record)
        return record

    def targets(self, indices: Sequence[int]) -> list[Targets]:
        return [self._read(i) for i in indices]

    def _read(self, index: int) -> Targets:
        if self._map is None:
            self._map = np.memmap(self._path, self._dtype, "r", shape=(len(self._wanted.windows),))
        record = self._map[index]
        hidden = self._tensor(record["hidden"]) if self._wanted.hidden else None
        ids = self._tensor(record["ids"].astype(np.int64))
        return Targets(ids, self._tensor(record["logprobs"]), self._tensor(record["rest"]), hidden)

    def _tensor(self, values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.array(values)).to(self._device)


def _checksum(record: Any) -> int:
    names = [n for n in record.dtype.names if n != "crc"]
    total = 1
    for name in names:
        total = zlib.crc32(np.ascontiguousarray(record[name]).tobytes(), total)
    return total
