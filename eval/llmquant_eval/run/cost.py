"""What a model costs to run: load time, prefill and decode speed, peak memory; each model in a
process of its own.

A fresh process (``python -m llmquant_eval.run.cost``) because peak memory and load time belong to a
process: measured after another model they would be the other's. The child prints one JSON object on
stdout.

* ``load``: ``llmquant.load`` until the model is ready, imports not counted; the files are in the
  page cache or not, as they happen to be.
* ``prefill``: a prompt of 512 random ids (fewer when the context is shorter) until the first new
  token exists.
* ``decode``: greedy through ``generate`` with the KV cache at batch 1, from the first new token to
  the last; the minimum length stands at the maximum so that an end-of-text token cannot shorten it.
  Both are the median of ``repeats`` runs after one warm-up, and both come from one ``generate``:
  its streamer is called as tokens appear.
* ``memory``: the highest resident set, file-backed pages of mapped weights included, and the
  resident set after the imports as the floor under it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import llmquant
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.report.results import Cost

PROMPT_TOKENS = 512
NEW_TOKENS = 64
REPEATS = 3
_SEED = 0
_STDERR_TAIL = 1500


@dataclass(frozen=True, slots=True)
class CostRun:
    """How a model is measured: where and with what, and how many tokens how often."""

    dtype: str = "auto"
    device: str = "cpu"
    kernel: str = "auto"
    threads: int | None = None
    prompt_tokens: int = PROMPT_TOKENS
    new_tokens: int = NEW_TOKENS
    repeats: int = REPEATS

    def arguments(self) -> list[str]:
        """The options of ``python -m llmquant_eval.run.cost`` that say the same."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return [
            word
            for name, value in given.items()
            if value is not None
            for word in (f"--{name.replace('_', '-')}", str(value))
        ]


class _Clock:
    """A streamer: ``generate`` calls ``put`` with the prompt, then with each new token as soon as
    it is known."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Called when generation is over; the last ``put`` has the time."""


def _generate_once(model: Any, prompt: Any, new_tokens: int) -> tuple[float, float]:
    """Seconds for the prefill (to the first new token) and for the ``new_tokens`` after it."""
    import torch

    clock = _Clock()
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


def measure(path: Path, run: CostRun) -> Cost:
    """Measure one model in *this* process; :func:`measure_apart` is what to call from a process
    that did other work.

    Raises:
        UsageError: the context is too short for a prompt and the new tokens.
    """
    import torch
    import transformers

    from llmquant import peak_resident_bytes, resident_bytes
    from llmquant_eval.models.resolve import load_model, max_positions

    _ = (
        transformers.AutoModelForCausalLM,
        llmquant.load,
    )  # lazy modules: import them before the floor is read
    positions = max_positions(path)
    new, prompt_tokens = run.new_tokens, run.prompt_tokens
    if positions is not None:
        prompt_tokens = min(prompt_tokens, positions - new - 1)
    if prompt_tokens < 1:
        raise UsageError(
            f"{path} takes {positions} tokens: too few for {new} new ones; give --no-cost"
        )
    floor = resident_bytes()
    began = time.perf_counter()
    model = load_model(path, run.dtype, run.device, run.kernel)
    loaded = time.perf_counter() - began
    vocabulary = model.config.get_text_config().vocab_size
    seeded = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(0, vocabulary, (1, prompt_tokens), generator=seeded).to(model.device)
    _plain_greedy(model)
    # Warm-up: allocator, thread pool, first-use packing of kernels.
    _generate_once(model, ids, min(new, 4))
    times = [_generate_once(model, ids, new) for _ in range(run.repeats)]
    prefill, decode = zip(*times, strict=True)
    on_cuda = run.device.startswith("cuda")
    return Cost(
        load_seconds=loaded,
        prefill_tokens_per_second=prompt_tokens / statistics.median(prefill),
        decode_tokens_per_second=new / statistics.median(decode),
        prompt_tokens=prompt_tokens,
        new_tokens=new,
        repeats=run.repeats,
        threads=torch.get_num_threads(),
        peak_memory_bytes=peak_resident_bytes(),
        memory_floor_bytes=floor,
        device_peak_bytes=torch.cuda.max_memory_allocated() if on_cuda else None,
    )


def measure_apart(path: Path, run: CostRun) -> Cost:
    """Measure one model in a fresh process.

    Raises:
        LlmquantError: the process failed; carries the end of its stderr.
    """
    module = [sys.executable, "-m", "llmquant_eval.run.cost"]
    command = [*module, "--model", str(path), *run.arguments()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LlmquantError(
            f"measuring the speed of {path} failed (exit {done.returncode}); the end of its output:\n"
            f"{done.stderr.strip()[-_STDERR_TAIL:]}\nPass --no-cost to evaluate its quality alone"
        )
    try:
        return Cost.model_validate_json(done.stdout)
    except ValidationError as e:
        raise LlmquantError(
            f"measuring the speed of {path} printed something else than a cost: {e}"
        ) from e


def main(arguments: list[str] | None = None) -> int:
    """The child process: measure, print one JSON object; errors go to stderr in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m llmquant_eval.run.cost", description="Measure one model; print JSON."
    )
    parser.add_argument("--model", type=Path, required=True)
    for field in fields(CostRun):
        kind = str if field.name in ("dtype", "device", "kernel") else int
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    given = vars(parser.parse_args(arguments))
    path = given.pop("model")
    run = CostRun(**given)
    try:
        llmquant.set_threads(run.threads)
        cost = measure(path, run)
    except LlmquantError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return e.exit_code
    print(json.dumps(cost.model_dump()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
