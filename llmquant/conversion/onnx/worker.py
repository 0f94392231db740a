"""A model that onnxruntime-genai runs in a process of the ONNX environment, behind two pipes (see
``inside/worker.py`` for what goes over them)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from llmquant.checkpoint.weights.exported import GENAI_CONFIG
from llmquant.conversion.onnx.environment import clean_environment, find_onnx
from llmquant.errors import LlmquantError, UnfitModelError

_TAIL = 800
_STOP_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class OnnxTimes:
    """Seconds to the first new token and for those after it, once for each repetition; of the
    fastest of those; the process's highest resident set in bytes."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    fastest: float
    peak_bytes: int


class OnnxWorker:
    """The process and its model. One request at a time; any thread may make it.

    Args:
        path: a folder that ``llmquant export --to onnx`` wrote, or that the builder did.
        threads: to compute with; None leaves ONNX Runtime's own number.
        python: of the environment; None looks for it.

    Attributes:
        load_seconds: of the model.
        floor_bytes: the process's resident set before it was loaded.
        version: of onnxruntime-genai.

    Raises:
        UsageError: the environment is not there.
        UnfitModelError: the folder is no export.
        LlmquantError: the model cannot be loaded.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        python: str | os.PathLike[str] | None = None,
    ) -> None:
        self.path = Path(path)
        if not (self.path / GENAI_CONFIG).is_file():
            raise UnfitModelError(
                f"{self.path} has no {GENAI_CONFIG}, so it is no ONNX export; llmquant export --to onnx makes one"
            )
        environment = find_onnx(python)
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._lock = threading.Lock()
        self._next = 0
        self._process = subprocess.Popen(
            environment.command("worker", str(self.path), str(threads or 0)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=clean_environment(),
        )
        self._end = weakref.finalize(self, _end, self._process, self._stderr)
        with ExitStack() as failed:
            failed.callback(self.close)
            ready, _ = self._receive()
            failed.pop_all()
        self.load_seconds = float(ready["loaded"])
        self.floor_bytes = int(ready["floor"])
        self.version = str(ready["version"])

    def open(self, length: int) -> int:
        """Begin a sequence of at most ``length`` positions; returns its number."""
        self._next += 1
        self._ask({"do": "open", "id": self._next, "length": length})
        return self._next

    def append(self, sequence: int, tokens: Sequence[int], *, every: bool = False) -> Tensor:
        """Run tokens through the model, after those that the sequence has.

        Returns:
            float32 logits ``[vocabulary]`` after the last token, or ``[tokens, vocabulary]``.

        Raises:
            LlmquantError: the model failed, or the process is gone.
        """
        request = {"do": "append", "id": sequence, "tokens": list(tokens), "all": every}
        head, body = self._ask(request)
        logits = torch.frombuffer(bytearray(body), dtype=torch.float32).view(head["shape"])
        return logits if every else logits[-1]

    def forget(self, sequence: int) -> None:
        """End a sequence."""
        self._ask({"do": "close", "id": sequence})

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """float32 ``[tokens, vocabulary]`` of one text from its beginning."""
        sequence = self.open(len(tokens) + 1)
        try:
            return self.append(sequence, tokens, every=True)
        finally:
            self.forget(sequence)

    def time(self, tokens: Sequence[int], new: int, repeats: int) -> OnnxTimes:
        """Time a prompt and ``new`` greedy tokens after its first."""
        request = {"do": "time", "tokens": list(tokens), "new": new, "repeats": repeats}
        head, _ = self._ask(request)
        return OnnxTimes(
            prefill=tuple(head["prefill"]),
            decode=tuple(head["decode"]),
            fastest=float(head["fastest"]),
            peak_bytes=int(head["peak"]),
        )

    def close(self) -> None:
        """End the process; also done when nobody has the object any more."""
        self._end()

    def __enter__(self) -> OnnxWorker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _ask(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        with self._lock:
            try:
                assert self._process.stdin is not None
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
            except (OSError, ValueError) as e:
                raise LlmquantError(self._gone()) from e
            return self._receive()

    def _receive(self) -> tuple[dict[str, Any], bytes]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise LlmquantError(self._gone())
        head = json.loads(line)
        body = self._process.stdout.read(head["bytes"])
        if len(body) != head["bytes"]:
            raise LlmquantError(self._gone())
        if "error" in head:
            raise LlmquantError(f"ONNX Runtime failed on {self.path}: {head['error']}")
        return head, body

    def _gone(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP_SECONDS)
        said = ""
        with contextlib.suppress(OSError, ValueError):
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip()[-_TAIL:]
        return (
            f"the process that runs {self.path} in ONNX Runtime ended "
            f"(exit {self._process.returncode}): {said or 'it said nothing'}"
        )


def _end(process: subprocess.Popen[bytes], stderr: IO[bytes]) -> None:
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()
    stderr.close()
