"""The engines that bench/cpu.py measures beside llmquant: each in a process of its own environment,
asked for one measurement at a time.

``measure("prefill")`` is seconds of a prompt, ``measure("decode")`` the best seconds of one token.
"""

from __future__ import annotations

import json
import subprocess

import llmquant

Sizes = tuple[int, int, int]
"""Tokens of a prefill, of the prompt before decoding, and tokens decoded."""

LLAMA = """
import sys, time, json
from llama_cpp import Llama
path, clock, threads, prefill, prompt, steps = sys.argv[1], getattr(time, sys.argv[2]), *map(int, sys.argv[3:])
model = Llama(path, n_threads=threads, n_threads_batch=threads, n_ctx=1024, n_batch=512, logits_all=False, verbose=False)
ids = [5 + i * 37 % 4000 for i in range(prefill)]
for line in sys.stdin:
    model.reset()
    if line.strip() == "prefill":
        started = clock(); model.eval(ids); best = clock() - started
    else:
        model.eval(ids[:prompt]); best = 1e9
        for i in range(steps):
            started = clock(); model.eval([ids[i]]); best = min(best, clock() - started)
    print(json.dumps(best), flush=True)
"""


class LlamaCpp:
    """llama.cpp in its own environment; ``clock`` names a function of :mod:`time`."""

    def __init__(self, python: str, gguf: str, threads: int, sizes: Sizes, clock: str) -> None:
        arguments = [clock, *(str(n) for n in (threads, *sizes))]
        self.child = subprocess.Popen(
            [python, "-c", LLAMA, gguf, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def measure(self, what: str) -> float:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.write(what + "\n")
        self.child.stdin.flush()
        return float(json.loads(self.child.stdout.readline()))

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()


class Onnx:
    """An ONNX export in onnxruntime-genai."""

    def __init__(self, folder: str, threads: int, sizes: Sizes) -> None:
        self.worker = llmquant.OnnxWorker(folder, threads)
        self.prefill, self.prompt, self.steps = sizes
        self.ids = [5 + i * 37 % 4000 for i in range(self.prefill)]

    def measure(self, what: str) -> float:
        if what == "prefill":
            return self.worker.time(self.ids, 0, 1).prefill[0]
        return self.worker.time(self.ids[: self.prompt], self.steps, 1).fastest

    def close(self) -> None:
        self.worker.close()
