"""What quantizing costs on a device: GPTQ of one decoder block of Llama-3-8B; and whether a run on
the device gives what the CPU gives."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from clock import wait

import llmquant
from llmquant.algorithms import GPTQOptions, factorize, gptq
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.spec import QuantSpec

BLOCK_8B = {
    "q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096), "o_proj": (4096, 4096),
    "gate_proj": (14336, 4096), "up_proj": (14336, 4096), "down_proj": (4096, 14336),
}  # fmt: skip


def block(
    device: torch.device, linears: dict[str, tuple[int, int]], spec: QuantSpec
) -> dict[str, Any]:
    """Seconds for each linear, Hessians drawn: factorizing included, collecting them not."""
    options, taken = GPTQOptions(), {}
    for name, (out, in_) in linears.items():
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(2 * in_, in_, device=device, generator=generator)
        weight = torch.randn(out, in_, device=device, generator=generator) * 0.02
        hessian = x.T @ x
        del x
        wait(device)
        started = time.perf_counter()
        gptq(weight, factorize(hessian, options, name), spec, options, name)
        wait(device)
        taken[name] = time.perf_counter() - started
    return {"seconds": taken, "block_seconds": sum(taken.values()), "spec": str(spec)}


def quantized(
    model: Path, calibration: Path, folder: Path, device: torch.device, group: int
) -> dict[str, Any]:
    """Quantize on the CPU and on the device, by rounding and by GPTQ; compare the numbers."""
    found = {}
    for method in ("rtn", "gptq"):
        recipe = {"method": method, "weights": {"bits": 4, "group_size": group}}
        if method == "gptq":
            recipe["calibration"] = {
                "source": f"file:{calibration}", "nsamples": 16, "seqlen": 256,
            }  # fmt: skip
        made, seconds = [], {}
        for label, where in (("cpu", "cpu"), ("device", str(device))):
            started = time.perf_counter()
            made.append(folder / f"{method}-{label}")
            llmquant.quantize(
                str(model), str(made[-1]), llmquant.Recipe.model_validate(recipe),
                llmquant.QuantizeOptions(device=where, overwrite=True, resume=False),
            )  # fmt: skip
            seconds[label] = time.perf_counter() - started
        found[method] = {"seconds": seconds} | compared(*made)
    return found


def compared(first: Path, second: Path) -> dict[str, Any]:
    """How many modules have the same digest, and the share of equal codes."""
    a, b = (PackedCheckpoint(CheckpointReader(path)) for path in (first, second))
    same = equal = codes = 0
    for name in a.schemes:
        one, two = a.weight(name), b.weight(name)
        same += one.digest() == two.digest()
        equal += int((one.codes == two.codes).sum())
        codes += one.codes.numel()
    return {"modules": len(a.schemes), "same_digest": same, "equal_codes": equal / codes}
