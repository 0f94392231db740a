"""What the CPU kernel reaches: against the memory and the dense layers of the machine, and whole
models against llama.cpp.

    python bench/cpu.py [--threads 2] [--out FILE] kernels [--bits 4,8,3,2] [--rows 1,2,…]
    python bench/cpu.py [--threads 2] [--out FILE] models PACKED DENSE [--gguf FILE --llama-python
    ENV/bin/python] [--onnx FOLDER]
    python bench/cpu.py --threads 1 --cpu-time …

``kernels``: for every width and number of rows one linear of ``--shape``, packed and as dense
float32 and bfloat16 layers, timed in turn within one process. Every candidate has as many copies of
its weights as exceed ``--cold`` bytes and walks through them, so that weights come from memory, as
they do in a model. Packed bytes per second are held against the speed of summing a large array.

``models``: decoding (one token behind a prompt of 64) and prefill (512 tokens) of the packed
folder, the dense one in float32 and bfloat16, and llama.cpp on a GGUF of the same model in a Python
environment that has llama-cpp-python, and ONNX Runtime on an export; rounds in turn, the best of
each.

With ``--cpu-time`` and one thread the processor's time is counted instead of the clock's: on a
machine that is busy with other work it leaves out what a process waits for the others.

Times are the best of many, ratios are within one run; the instruction sets are in the JSON. Hold
the run to fewer with ``ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cpu_engines import LlamaCpp, Onnx
from transformers.cache_utils import DynamicCache

import llmquant
from llmquant.kernels import KERNELS, native
from llmquant.planning.advice.in_turn import in_turn, random_weight, walking
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
PREFILL, PROMPT, STEPS = 512, 64, 24
SIZES = (PREFILL, PROMPT, STEPS)


def machine(threads: int) -> dict[str, Any]:
    """What a figure needs beside it."""
    processor = llmquant.this_processor()
    return {
        "processor": processor.name,
        "instruction_sets": list(processor.instruction_sets),
        "kernel_instructions": native.current_instructions(),
        "threads": threads,
        "torch": torch.__version__,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "load": list(os.getloadavg()),
    }


def read_bandwidth() -> float:
    """Bytes per second of summing 256 MiB."""
    array = torch.ones(64 << 20)
    return array.nbytes / in_turn({"sum": array.sum}, 0.5)["sum"]


def times_packed(
    kernel: Any, weight: QuantizedWeight, x: torch.Tensor, prepared: Any
) -> torch.Tensor:
    """x times one packed copy of the weight."""
    y: torch.Tensor = kernel.linear(x, prepared, weight.spec, weight.shape)
    return y


def kernel_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One record per width and number of rows."""
    out, in_ = options.shape
    records = []
    dense = torch.randn(out, in_)
    denses = {
        dtype: [
            dense.to(dtype).clone()
            for _ in range(max(2, options.cold // (out * in_ * dtype.itemsize) + 1))
        ]
        for dtype in (torch.float32, torch.bfloat16)
    }
    for bits in options.bits:
        spec = QuantSpec(bits, options.group, not options.asymmetric)
        kernel = KERNELS[options.kernel]
        weight = random_weight((out, in_), spec)
        first = kernel.prepare(weight, torch.float32)
        packed = sum(t.nbytes for t in first.values())
        copies = [first] + [
            {n: t.clone() for n, t in first.items()} for _ in range(options.cold // packed + 1)
        ]
        for rows in options.rows:
            x = torch.randn(rows, in_)
            short = x.to(torch.bfloat16)
            linear = partial(times_packed, kernel, weight)
            times = in_turn(
                {
                    "packed float32": walking(copies, partial(linear, x)),
                    "packed bfloat16": walking(copies, partial(linear, short)),
                    "dense float32": walking(
                        denses[torch.float32], partial(torch.nn.functional.linear, x)
                    ),
                    "dense bfloat16": walking(
                        denses[torch.bfloat16], partial(torch.nn.functional.linear, short)
                    ),
                },
                options.seconds,
                time.process_time if options.cpu_time else time.perf_counter,
            )
            fastest = min(times["dense float32"], times["dense bfloat16"])
            record = {
                "spec": str(spec),
                "rows": rows,
                "seconds": times,
                "ratio": times["packed float32"] / fastest,
                "ratio_bfloat16": times["packed bfloat16"] / fastest,
                "gflops": 2 * rows * out * in_ / times["packed float32"] / 1e9,
                "packed_bytes_per_second": packed / times["packed float32"],
            }
            records.append(record)
            print(
                f"{spec!s:14} {rows:5} rows: {record['ratio']:.2f} of the faster dense ({record['ratio_bfloat16']:.2f} in "
                f"bfloat16), {record['gflops']:.0f} GFLOP/s, {record['packed_bytes_per_second'] / 1e9:.1f} GB/s",
                flush=True,
            )
    return records


def token_times(model: Any, clock: Callable[[], float]) -> dict[str, Callable[[], float]]:
    """Seconds of one decoded token (best of ``STEPS``) and of a prefill, each as a function."""
    ids = torch.randint(5, 4000, (1, PREFILL), generator=torch.Generator().manual_seed(0))

    @torch.inference_mode()
    def decode() -> float:
        cache = DynamicCache(config=model.config)
        token = (
            model(ids[:, :PROMPT], past_key_values=cache, logits_to_keep=1)
            .logits[:, -1:]
            .argmax(-1)
        )
        best = float("inf")
        for _ in range(STEPS):
            started = clock()
            token = model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
            best = min(best, clock() - started)
        return best

    @torch.inference_mode()
    def prefill() -> float:
        started = clock()
        model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)
        return clock() - started

    return {"decode": decode, "prefill": prefill}


def model_rows(options: argparse.Namespace) -> dict[str, Any]:
    """Best seconds per token and tokens per second of every candidate."""
    runs: dict[str, dict[str, Callable[[], float]]] = {}
    clock = time.process_time if options.cpu_time else time.perf_counter
    for path in options.packed.split(","):
        runs[f"{Path(path).name} float32"] = token_times(
            llmquant.load(path, dtype="float32", kernel=options.kernel), clock
        )
    runs["dense float32"] = token_times(llmquant.load(options.dense, dtype="float32"), clock)
    if not options.no_bfloat16:
        runs["dense bfloat16"] = token_times(llmquant.load(options.dense, dtype="bfloat16"), clock)
    servers = []
    others: dict[str, Callable[[], LlamaCpp | Onnx]] = {
        f"llama.cpp {Path(gguf).stem}": partial(
            LlamaCpp, options.llama_python, gguf, options.threads, SIZES, clock.__name__
        )
        for gguf in (options.gguf.split(",") if options.gguf else ())
    }
    others |= {
        f"onnx {Path(folder).name}": partial(Onnx, folder, options.threads, SIZES)
        for folder in (options.onnx.split(",") if options.onnx else ())
    }
    for name, start in others.items():
        server = start()
        servers.append(server)
        runs[name] = {w: partial(server.measure, w) for w in ("decode", "prefill")}
    best: dict[str, dict[str, float]] = {name: {} for name in runs}
    for _ in range(options.rounds):
        for what in ("decode", "prefill"):
            for name, run in runs.items():
                best[name][what] = min(best[name].get(what, float("inf")), run[what]())
    for server in servers:
        server.close()
    result = {
        name: {
            "decode_tokens_per_second": 1 / t["decode"],
            "prefill_tokens_per_second": PREFILL / t["prefill"],
        }
        for name, t in best.items()
    }
    for name, row in result.items():
        print(
            f"{name:44} decode {row['decode_tokens_per_second']:7.1f} prefill {row['prefill_tokens_per_second']:7.0f} tokens/s"
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kernel", default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="with --threads 1")
    which = parser.add_subparsers(dest="which", required=True)
    kernels = which.add_parser("kernels")
    whole = which.add_parser("models")

    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",")]

    kernels.add_argument("--shape", type=numbers, default=[2048, 2048], help="out,in")
    kernels.add_argument("--bits", type=numbers, default=[4, 8, 3, 2])
    kernels.add_argument("--group", type=int, default=64)
    kernels.add_argument("--asymmetric", action="store_true")
    kernels.add_argument("--rows", type=numbers, default=list(ROWS))
    kernels.add_argument(
        "--seconds", type=float, default=0.3, help="of the clock for each candidate"
    )
    kernels.add_argument(
        "--cold",
        type=int,
        default=96 << 20,
        help="bytes of weights that each candidate walks through",
    )
    whole.add_argument("packed", help="folder, or several with commas")
    whole.add_argument("dense")
    whole.add_argument("--gguf", help="file, or several with commas")
    whole.add_argument("--llama-python", default=sys.executable)
    whole.add_argument("--onnx", help="folder of `llmquant export`, or several with commas")
    whole.add_argument("--rounds", type=int, default=5)
    whole.add_argument("--no-bfloat16", action="store_true")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time adds up what all threads take: give --threads 1")
    if options.cpu_time and getattr(options, "onnx", None):
        parser.error("--cpu-time does not reach ONNX Runtime's own process: leave out --onnx")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "machine": machine(options.threads),
        "clock": "processor" if options.cpu_time else "wall",
        "read_bytes_per_second": read_bandwidth(),
    }
    speed = report["read_bytes_per_second"] / 1e9
    print(
        f"{report['machine']['processor']}, {native.current_instructions()}; reads {speed:.1f} GB/s"
    )
    report[options.which] = (
        kernel_rows(options) if options.which == "kernels" else model_rows(options)
    )
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
