"""What a server has answered, on disk, so that an evaluation that breaks off resumes.

One JSON Lines file for each server and model, in a folder for caches: a line has a prompt and what
was answered. It is appended to as answers come, read by the next run and deleted by one that
finishes. Floats are written with all their digits. A line that a kill cut in two is asked again.

A file holds answers of one model, but a server of the same address and name may serve other
weights by the next run, and figures of two models would be mixed without a trace. So a run that
finds a file asks the server its first prompt once more, before it uses or adds a line. That prompt
is asked alone both times, so that one model gives one answer.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llmquant.errors import LlmquantError

LIMIT = 0.001
"""Nats that two answers of one model may differ by in the mean: servers write few digits. 8-bit
weights change examples/tiny-llama by 0.011, another batch in bfloat16 by as much."""


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Of one prompt of P tokens: log-probability of tokens 1 … P-1 in nats, and whether each was
    the most likely one."""

    logprobs: list[float]
    greedy: list[bool]


Answer = PromptScores | str


def agree(one: Answer, other: Answer) -> bool:
    """Whether both can be one model's answers to one prompt, asked alone each time."""
    if isinstance(one, str) or isinstance(other, str):
        return one == other
    if len(one.logprobs) != len(other.logprobs):
        return False
    pairs = list(zip(one.logprobs, other.logprobs, strict=True))
    apart = [0.0 if a == b else abs(a - b) for a, b in pairs]
    return math.fsum(apart) <= LIMIT * max(1, len(apart))


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids; and, where text is asked for, what else determines it."""

    ids: Sequence[int]
    options: Mapping[str, object] | None = None

    @property
    def key(self) -> str:
        """Hex sha256."""
        whole = json.dumps([list(self.ids), self.options], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()


class KeptAnswers:
    """Answers by prompt. Several threads may add at the same time.

    Args:
        folder: made when the first answer is kept; None keeps nothing.
        server: address and model.

    Attributes:
        first: the prompt that was answered first, and its answer; None where nothing is kept.

    Raises:
        LlmquantError: the file cannot be read, or later written.
    """

    def __init__(self, folder: Path | None, server: str) -> None:
        name = hashlib.sha256(server.encode()).hexdigest()[:32]
        self.path = None if folder is None else folder / f"{name}.jsonl"
        self._lock = threading.Lock()
        self._answers: dict[str, Answer] = {}
        self.first: tuple[Prompt, Answer] | None = None
        if self.path is not None and self.path.is_file():
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._answers)

    def _read(self, path: Path) -> None:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise LlmquantError(f"{path} cannot be read: {e}; delete it to start over") from e
        for line in lines:
            try:
                entry = json.loads(line)
                prompt = Prompt([int(i) for i in entry["prompt"]], entry["options"])
                if prompt.options is not None:
                    self._put(prompt, str(entry["text"]))
                else:
                    logprobs = [float(x) for x in entry["logprobs"]]
                    greedy = [mark == "1" for mark in entry["greedy"]]
                    self._put(prompt, PromptScores(logprobs, greedy))
            except (ValueError, KeyError, TypeError):  # the cut line of a killed run
                continue

    def _put(self, prompt: Prompt, answer: Answer) -> None:
        self._answers[prompt.key] = answer
        self.first = self.first or (prompt, answer)

    def scores(self, ids: Sequence[int]) -> PromptScores | None:
        """What was answered to a prompt that was scored."""
        answer = self._answers.get(Prompt(ids).key)
        return answer if isinstance(answer, PromptScores) else None

    def text(self, prompt: Prompt) -> str | None:
        """What was written after a prompt."""
        answer = self._answers.get(prompt.key)
        return answer if isinstance(answer, str) else None

    def add(self, prompt: Prompt, answer: Answer) -> None:
        with self._lock:
            self._put(prompt, answer)
            if self.path is None:
                return
            entry: dict[str, object] = {"prompt": list(prompt.ids), "options": prompt.options}
            if isinstance(answer, str):
                entry["text"] = answer
            else:
                entry["logprobs"] = answer.logprobs
                entry["greedy"] = "".join("01"[mark] for mark in answer.greedy)
            self._append(self.path, json.dumps(entry))

    @staticmethod
    def _append(path: Path, line: str) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("a", encoding="utf-8") as f:
                f.write("\n" + line)  # a line end first: a line that was cut would swallow this one
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:
            raise LlmquantError(
                f"{path} cannot be written: {e}; free some space or give another --cache"
            ) from e

    def discard(self) -> None:
        """Forget everything, on disk too."""
        self._answers.clear()
        self.first = None
        if self.path is not None:
            self.path.unlink(missing_ok=True)
