"""One model's speed and memory, measured in a process of its own.

A fresh process (``python -m llmquant_eval.speed.process``) because peak memory and load time belong
to a process: measured after another model they would be the other's. The child prints one JSON
object on stdout.

* load: ``llmquant.load`` until the model is ready, imports not counted; the files are in the page
  cache or not, as they happen to be.
* prefill: prompts of random ids until the first new token exists.
* decode: greedy through ``generate`` with the KV cache, from the first new token to the last; the
  minimum length stands at the maximum so that an end-of-text token cannot shorten it. Prefill and
  decode come from one ``generate``, whose streamer is called as tokens appear; a short one before
  it warms up the allocator, the thread pool and what kernels pack at first use.
* memory: the highest resident set, file-backed pages of mapped weights included, and the resident
  set after the imports as the floor under it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import llmquant
from llmquant.errors import LlmquantError
from llmquant_eval.speed.schema import Point, ProcessTimes, Timing

_SEED = 0
_WARM_UP_TOKENS = 4
_STDERR_TAIL = 1500
_KILLED = -9


@dataclass(frozen=True, slots=True)
class Conditions:
    """How a model is measured: where and with what, and how many tokens how often."""

    dtype: str = "auto"
    device: str = "cpu"
    kernel: str = "auto"
    threads: int | None = None
    new_tokens: int = 64
    repeats: int = 1

    def arguments(self) -> list[str]:
        """The options of ``python -m llmquant_eval.speed.process`` that say the same."""
        given = {field.name: getattr(self, field.name) for field in fields(Conditions)}
        return [
            word
            for name, value in given.items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]


class RefusedError(LlmquantError):
    """The model cannot be loaded, whoever loads it: says what loading it said, and has its exit
    code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """Errors of what is loaded, apart from those of measuring it."""
    try:
        yield
    except LlmquantError as e:
        raise RefusedError(str(e), e.exit_code) from e


class Clock:
    """A streamer: ``generate`` calls ``put`` with the prompt, then with each new token as soon as
    it is known."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called when generation is over; the last ``put`` has the time."""


def generate_once(model: Any, prompt: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prefill (to the first new token) and for the ``new_tokens`` after it."""
    import torch

    clock = Clock()
    with torch.inference_mode():
        model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            streamer=clock,
            do_sample=False,
            min_new_tokens=new_tokens + 1,
            max_new_tokens=new_tokens + 1,
        )
    if len(clock.times) != new_tokens + 2:
        raise LlmquantError(
            f"the model generated {len(clock.times) - 1} tokens where {new_tokens + 1} were asked for"
        )
    return clock.times[1] - clock.times[0], clock.times[-1] - clock.times[1]


def _plain_greedy(model: Any) -> None:
    """Drop the checkpoint's sampling and length settings: they would only be warned about."""
    kept = model.generation_config
    pad = kept.pad_token_id if kept.pad_token_id is not None else 0
    model.generation_config = type(kept)(eos_token_id=kept.eos_token_id, pad_token_id=pad)


def measure(path: Path, points: Sequence[Point], conditions: Conditions) -> ProcessTimes:
    """Measure one model in *this* process; :func:`measure_apart` is what to call from a process
    that did other work.

    Raises:
        LlmquantError: the model cannot be loaded, or a point needs more memory than there is.
    """
    import torch
    import transformers

    from llmquant_eval.models.resolve import kernels_used, load_model

    if llmquant.is_onnx(path):
        return _measure_onnx(path, points, conditions)
    # Lazy modules: import them before the floor is read.
    _ = (transformers.AutoModelForCausalLM, llmquant.load)
    floor = llmquant.resident_bytes()
    began = time.perf_counter()
    with _loading():
        model = load_model(path, conditions.dtype, conditions.device, conditions.kernel)
    loaded = time.perf_counter() - began
    _plain_greedy(model)
    ordered = sorted(points, key=lambda p: (p.batch_size * p.prompt_tokens, p.batch_size))
    return ProcessTimes(
        load_seconds=loaded,
        threads=torch.get_num_threads(),
        dtype=str(model.dtype).removeprefix("torch."),
        kernels=kernels_used(model),
        memory_floor_bytes=floor,
        timings=tuple(_timed(model, point, conditions) for point in ordered),
    )


def _measure_onnx(path: Path, points: Sequence[Point], conditions: Conditions) -> ProcessTimes:
    """An ONNX export, measured in the process that runs it."""
    import torch

    if crowd := next((p for p in points if p.batch_size > 1), None):
        raise LlmquantError(
            f"{path} is an ONNX export, which is measured one sequence at a time, not {crowd}"
        )
    with _loading():
        model = llmquant.OnnxModel(path, conditions.threads)
    with contextlib.closing(model):
        vocabulary = model.config.get_text_config().vocab_size
        seeded = torch.Generator().manual_seed(_SEED)
        timings = []
        for point in sorted(points, key=lambda p: p.prompt_tokens):
            ids = torch.randint(0, vocabulary, (point.prompt_tokens,), generator=seeded).tolist()
            model.worker.time(ids, min(conditions.new_tokens, _WARM_UP_TOKENS), 1)
            times = model.worker.time(ids, conditions.new_tokens, conditions.repeats)
            timings.append(
                Timing(
                    point=point,
                    prefill_seconds=times.prefill,
                    decode_seconds=times.decode,
                    peak_memory_bytes=times.peak_bytes,
                    device_peak_bytes=None,
                )
            )
        return ProcessTimes(
            load_seconds=model.worker.load_seconds,
            threads=conditions.threads or torch.get_num_threads(),
            dtype="float32",
            kernels=model.kernels,
            memory_floor_bytes=model.worker.floor_bytes,
            timings=tuple(timings),
        )


def _timed(model: Any, point: Point, conditions: Conditions) -> Timing:
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    seeded = torch.Generator().manual_seed(_SEED)
    shape = (point.batch_size, point.prompt_tokens)
    ids = torch.randint(0, vocabulary, shape, generator=seeded).to(model.device)
    new = conditions.new_tokens
    try:
        generate_once(model, ids, min(new, _WARM_UP_TOKENS))
        times = [generate_once(model, ids, new) for _ in range(conditions.repeats)]
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as e:
        if isinstance(e, RuntimeError) and "memory" not in str(e):
            raise
        raise LlmquantError(
            f"not enough memory for {point}; lower --batch-size or --prompt-tokens"
        ) from e
    prefill, decode = zip(*times, strict=True)
    on_cuda = conditions.device.startswith("cuda")
    return Timing(
        point=point,
        prefill_seconds=prefill,
        decode_seconds=decode,
        peak_memory_bytes=llmquant.peak_resident_bytes(),
        device_peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
    )


def measure_apart(path: Path, points: Sequence[Point], conditions: Conditions) -> ProcessTimes:
    """Measure one model in a fresh process.

    Raises:
        RefusedError: the model cannot be loaded.
        LlmquantError: the process failed; carries the end of its stderr.
    """
    module = [sys.executable, "-m", "llmquant_eval.speed.process"]
    sizes = [f"{p.batch_size}x{p.prompt_tokens}" for p in points]
    command = [*module, "--model", str(path), "--points", ",".join(sizes), *conditions.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == _KILLED:
        raise LlmquantError(
            f"measuring the speed of {path} was killed, probably by the system for memory; "
            "give it a smaller batch, shorter prompts, or a machine with more memory"
        )
    if done.returncode != 0 and done.stdout.startswith("{"):
        raise RefusedError(**json.loads(done.stdout))
    if done.returncode != 0:
        raise LlmquantError(
            f"measuring the speed of {path} failed (exit {done.returncode}); the end of its output:\n"
            f"{done.stderr.strip()[-_STDERR_TAIL:]}"
        )
    try:
        return ProcessTimes.model_validate_json(done.stdout)
    except ValidationError as e:
        raise LlmquantError(
            f"measuring the speed of {path} printed something else than times: {e}"
        ) from e


def _points(text: str) -> list[Point]:
    sizes = (size.split("x") for size in text.split(","))
    return [Point(batch_size=int(b), prompt_tokens=int(p)) for b, p in sizes]


def main(arguments: list[str] | None = None) -> int:
    """The child process: measure, print one JSON object, of times or of why the model cannot be
    loaded; other errors go to stderr in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m llmquant_eval.speed.process", description="Measure one model; print JSON."
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--points", type=_points, required=True)
    for field in fields(Conditions):
        kind = str if field.name in ("dtype", "device", "kernel") else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    given = vars(parser.parse_args(arguments))
    path, points = given.pop("model"), given.pop("points")
    conditions = Conditions(**given)
    try:
        llmquant.set_threads(conditions.threads)
        times = measure(path, points, conditions)
    except RefusedError as e:
        print(json.dumps({"message": str(e), "exit_code": e.exit_code}))
        return e.exit_code
    except LlmquantError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    print(times.model_dump_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
