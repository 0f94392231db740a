"""What a server has answered, on disk, so that an evaluation that breaks off resumes.

One JSON Lines file for each server and model, in a folder for caches: a line has the sha256 of a
prompt and what was answered. It is appended to as answers come, read by the next run and deleted by
one that finishes. Floats are written with all their digits. A line that a kill cut in two is asked
again.

A server of the same address and name may serve other weights by then, and figures of two models
would be mixed without a trace. So before the first kept answer of a run is used, the server is
asked that prompt once more (:meth:`KeptAnswers.agrees` says when two answers are of one model).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llmquant.errors import LlmquantError

LIMIT = 0.02
"""Nats that log-probabilities of one model may differ by in the mean: batches of another size round
otherwise (0.01 in bfloat16). Rounding weights to 4 bits changes them by 0.1 and more."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Of one prompt of P tokens: log-probability of tokens 1 … P-1 in nats, and whether each was
    the most likely one."""

    logprobs: list[float]
    greedy: list[bool]

    def agrees(self, other: PromptScores) -> bool:
        """Whether both can be one model's."""
        if len(self.logprobs) != len(other.logprobs):
            return False
        pairs = list(zip(self.logprobs, other.logprobs, strict=True))
        apart = [0.0 if a == b else abs(a - b) for a, b in pairs]
        return math.fsum(apart) <= LIMIT * max(1, len(apart))


def key_of(ids: Sequence[int], **options: object) -> str:
    """Hex sha256 of a prompt and what else determines its answer."""
    whole = json.dumps([list(ids), options], sort_keys=True)
    return hashlib.sha256(whole.encode()).hexdigest()


class KeptAnswers:
    """Answers by prompt. Several threads may add at the same time.

    Args:
        folder: made when the first answer is kept; None keeps nothing.
        server: address and model.

    Raises:
        LlmquantError: the file cannot be read, or later written.
    """

    def __init__(self, folder: Path | None, server: str) -> None:
        name = hashlib.sha256(server.encode()).hexdigest()[:32]
        self.path = None if folder is None else folder / f"{name}.jsonl"
        self._lock = threading.Lock()
        self._scores: dict[str, PromptScores] = {}
        self._texts: dict[str, str] = {}
        if self.path is not None and self.path.is_file():
            self._read(self.path)
        self.found = len(self)
        """Answers of an earlier run."""

    def __len__(self) -> int:
        return len(self._scores) + len(self._texts)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise LlmquantError(f"{path} cannot be read: {e}; delete it to start over") from e
        for line in lines:
            try:
                entry = json.loads(line)
                if "text" in entry:
                    self._texts[entry["key"]] = str(entry["text"])
                else:
                    logprobs = [float(x) for x in entry["logprobs"]]
                    greedy = [mark == "1" for mark in entry["greedy"]]
                    self._scores[entry["key"]] = PromptScores(logprobs, greedy)
            except (ValueError, KeyError, TypeError):  # the cut line of a killed run
                continue

    def scores(self, key: str) -> PromptScores | None:
        return self._scores.get(key)

    def text(self, key: str) -> str | None:
        return self._texts.get(key)

    def add_scores(self, key: str, scores: PromptScores) -> None:
        self._scores[key] = scores
        greedy = "".join("01"[mark] for mark in scores.greedy)
        self._append({"key": key, "logprobs": scores.logprobs, "greedy": greedy})

    def add_text(self, key: str, text: str) -> None:
        self._texts[key] = text
        self._append({"key": key, "text": text})

    def _append(self, entry: dict[str, object]) -> None:
        if self.path is None:
            return
        # The line end comes first: a line that was cut would swallow the next one.
        line = "\n" + json.dumps(entry)
        try:
            with self._lock:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as f:
                    f.write(line)
                    f.flush()
                    os.fsync(f.fileno())
        except OSError as e:
            raise LlmquantError(
                f"{self.path} cannot be written: {e}; free some space or give another --cache"
            ) from e

    def discard(self) -> None:
        """Forget everything, on disk too."""
        self._scores.clear()
        self._texts.clear()
        self.found = 0
        if self.path is not None:
            self.path.unlink(missing_ok=True)
