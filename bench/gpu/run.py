"""Everything that is to be known of a GPU, in one run that ends in time.

    python bench/gpu/run.py --out gpu.json [--model DIR …] [--budget 420] [--steps products,…]

``rounding``: quantizing each model (tiny-llama) on the device against quantizing it on the CPU,
digests and codes. ``models``: what the CPU packed, on the CPU and on the device by each kernel,
held against the original, and tokens per second. ``block``: seconds of GPTQ for one decoder block
of Llama-3-8B. ``large``: tokens per second of random weights in the shape of Llama-3-8B.
``products``: every kernel against cuBLAS on linears of Llama-3-8B and 70B.

A step that fails says so in the JSON and does not stop the others; the exit code is 1 then. A step
that has no time left counts what it leaves out. ``make gpu`` runs the tests of kernels first.
``--device cpu --tiny`` runs the same code on small shapes anywhere.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import clock
import models
import products
import rounding
import torch
import transformers

import llmquant
from llmquant.kernels import KERNELS
from llmquant.spec import QuantSpec

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
LLAMA_8B = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "blocks": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
}  # fmt: skip
SMALL = LLAMA_8B | {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "blocks": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
SHARES = {"rounding": 0.15, "models": 0.35, "block": 0.4, "products": 0.85, "large": 1.0}
"""Steps in order, and the part of the budget at whose end each has to be done."""


def machine(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "python": platform.python_version(), "torch": torch.__version__,
        "transformers": transformers.__version__, "device": str(device),
        "processor": llmquant.this_processor().name,
    }  # fmt: skip
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": gpu.total_memory,
            "cuda": torch.version.cuda, "hip": torch.version.hip,
        }  # fmt: skip
    return facts


class Run:
    """The steps, as methods by name."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.device = torch.device(options.device)
        self.dtype = torch.bfloat16
        self.tiny = options.tiny
        self.group, self.prefill = (64, 32) if options.tiny else (128, models.PREFILL)
        self.names = tuple(n for n in KERNELS if n not in products.LEFT_OUT and self.is_here(n))
        self.started = time.perf_counter()

    def is_here(self, name: str) -> bool:
        """Whether a kernel is of this kind of device."""
        return name == "reference" or name.startswith("cpu") == (self.device.type == "cpu")

    def in_time(self, step: str) -> bool:
        return time.perf_counter() - self.started < SHARES[step] * self.options.budget

    def rounding(self) -> dict[str, Any]:
        return {path.name: self.quantized(path) for path in self.options.model}

    def quantized(self, model: Path) -> dict[str, Any]:
        made = self.folder / model.name
        made.mkdir(exist_ok=True)
        text = TINY / "calibration.txt"
        return rounding.quantized(model, text, made, self.device, self.options.group)

    def models(self) -> dict[str, Any]:
        found, text = {}, TINY / "heldout.txt"
        for path in self.options.model:
            packed = self.folder / path.name / "gptq-cpu"
            if not packed.is_dir():
                self.quantized(path)
            load = partial(llmquant.load, packed, dtype="bfloat16", device=self.device)
            in_time = partial(self.in_time, "models")
            kl = models.distances(path, packed, text, load, self.names, in_time)
            speeds = models.each_kernel(load, self.names, in_time, self.prefill)
            found[path.name] = {"kl_nats_per_token": kl, "speeds": speeds}
        return found

    def block(self) -> dict[str, Any]:
        linears = rounding.BLOCK_8B
        if self.tiny:
            linears = {n: (out // 64, in_ // 64) for n, (out, in_) in linears.items()}
        return rounding.block(self.device, linears, QuantSpec(4, 32 if self.tiny else 128))

    def large(self) -> dict[str, Any]:
        spec, config = QuantSpec(4, self.group), SMALL if self.tiny else LLAMA_8B

        def make(*, kernel: str) -> Any:
            return models.random_llama(config, spec, self.device, self.dtype, kernel)

        # The package that tunes itself comes last: it takes longest until it runs.
        names = sorted(
            (n for n in self.names if n != "reference"), key=products.TUNES_ITSELF.__contains__
        )
        return models.each_kernel(make, names, partial(self.in_time, "large"), self.prefill)

    def products(self) -> dict[str, Any]:
        seconds, cold = (0.001, 1 << 16) if self.tiny else (0.02, clock.COLD)
        setting = products.Setting(self.device, self.dtype, seconds, cold, self.names)
        jobs = products.all_jobs()
        if self.tiny:
            specs = [QuantSpec(4, 64), QuantSpec(4, 64, False), QuantSpec(8, 64)]
            jobs = [
                products.Job(spec, shape, (1, 5))
                for spec in specs
                for shape in ((128, 128), (64, 256))
            ]
        return products.Products(setting, partial(self.in_time, "products")).measure(jobs)


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a step found, or how it failed: the others are still to be run on a machine that is lent
    for minutes."""
    started = time.perf_counter()
    try:
        found = work()
    except Exception as e:  # noqa: BLE001 - kept as the step's result; the run exits with 1
        traceback.print_exc()
        found = {"error": f"{type(e).__name__}: {e}"}
    return found | {"step_seconds": time.perf_counter() - started}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=420, help="seconds")
    parser.add_argument(
        "--model",
        type=Path,
        action="append",
        help="folder of a dense model; more than once for more",
    )
    parser.add_argument("--group", type=int, default=64, help="columns of a group in models")
    parser.add_argument("--steps", default=",".join(SHARES), help="of " + ", ".join(SHARES))
    parser.add_argument("--tiny", action="store_true", help="small shapes: does it run at all?")
    options = parser.parse_args()
    options.model = options.model or [TINY]
    steps = options.steps.split(",")
    if unknown := [s for s in steps if s not in SHARES]:
        parser.error(f"--steps: {', '.join(unknown)} is none of {', '.join(SHARES)}")
    if options.device != "cpu" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch {torch.__version__} finds no GPU")
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(options, Path(folder))
        report: dict[str, Any] = {"machine": machine(run.device), "tiny": options.tiny}
        for step in (s for s in SHARES if s in steps):
            print(f"--- {step}", flush=True)
            report[step] = attempt(getattr(run, step))
            # After every step: a machine that is taken back leaves what was found.
            options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    failed = [s for s in steps if "error" in report[s]]
    print(f"{options.out}: {len(steps)} steps, failed: {', '.join(failed) or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
