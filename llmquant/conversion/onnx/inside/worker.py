"""A model of onnxruntime-genai behind two pipes: requests in, logits out.

``python worker.py FOLDER THREADS`` (0 threads: ONNX Runtime's own number). A request is a line of
JSON on stdin: ``{"do": "open", "id": 1, "length": 64}`` begins a sequence of at most so many
positions, ``{"do": "append", "id": 1, "tokens": [..], "all": false}`` runs tokens through the
model, ``close`` forgets a sequence, and ``time`` measures. An answer is a line of JSON on stdout,
then as many bytes as it says: float32 logits ``[rows, vocabulary]`` of the last token, or of all
appended ones. What goes wrong with a request is answered as ``{"error": ...}``; what libraries
print goes to stderr.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import time
from typing import Any, BinaryIO

import numpy as np
import onnxruntime_genai as og


class Worker:
    """The model and its open sequences."""

    def __init__(self, folder: str, threads: int) -> None:
        config = og.Config(folder)
        if threads:
            options = {"intra_op_num_threads": threads, "inter_op_num_threads": 1}
            decoder = {"decoder": {"session_options": options}}
            config.overlay(json.dumps({"model": decoder}))
        began = time.perf_counter()
        self.model = og.Model(config)
        self.loaded = time.perf_counter() - began
        self.open: dict[int, Any] = {}

    def generator(self, length: int) -> Any:
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=length, do_sample=False)
        return og.Generator(self.model, params)

    def answer(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        what = request["do"]
        if what == "open":
            self.open[request["id"]] = self.generator(request["length"])
        elif what == "close":
            self.open.pop(request["id"], None)
        elif what == "append":
            rows = self.append(self.open[request["id"]], request["tokens"], request["all"])
            return {"shape": list(rows.shape)}, rows.tobytes()
        elif what == "time":
            return self.times(request["tokens"], request["new"], request["repeats"]), b""
        return {}, b""

    def append(self, generator: Any, tokens: list[int], every: bool) -> Any:
        generator.append_tokens(np.array(tokens, np.int32))
        logits = generator.get_output("logits") if every else generator.get_logits()
        return np.ascontiguousarray(np.asarray(logits, np.float32)[0])

    def times(self, tokens: list[int], new: int, repeats: int) -> dict[str, Any]:
        """Seconds to the first new token, for the ``new`` after it (greedy), and of the fastest of
        those."""
        prefill, decode, fastest = [], [], 0.0
        for _ in range(repeats):
            generator = self.generator(len(tokens) + new + 2)
            clock = [time.perf_counter()]
            feed = tokens
            for _ in range(new + 1):
                generator.append_tokens(np.array(feed, np.int32))
                feed = [int(np.asarray(generator.get_logits()).argmax())]
                clock.append(time.perf_counter())
            prefill.append(clock[1] - clock[0])
            decode.append(clock[-1] - clock[1])
            steps = [after - before for before, after in itertools.pairwise(clock[1:])]
            fastest = min([*steps, *([fastest] if fastest else [])], default=0.0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"prefill": prefill, "decode": decode, "fastest": fastest, "peak": peak}


def serve(worker: Worker, stdin: BinaryIO, stdout: BinaryIO) -> None:
    for line in stdin:
        try:
            head, body = worker.answer(json.loads(line))
        except Exception as e:  # noqa: BLE001 - whatever it was, llmquant is told
            head, body = {"error": f"{type(e).__name__}: {e}"}, b""
        stdout.write(json.dumps({**head, "bytes": len(body)}).encode() + b"\n" + body)
        stdout.flush()


def main(folder: str, threads: int) -> None:
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not come between the answers
    og.disable_telemetry_events()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    worker = Worker(folder, threads)
    ready = {"loaded": worker.loaded, "floor": peak, "version": og.__version__, "bytes": 0}
    stdout.write(json.dumps(ready).encode() + b"\n")
    stdout.flush()
    serve(worker, sys.stdin.buffer, stdout)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
