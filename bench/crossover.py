"""Where ``cpu_int4`` should leave torch's int4 operator for dequantize + GEMM: both timed over
rows, shapes, threads.

Every time is the best of many, and the candidates are run in turn within one process, so what is
compared saw the same machine. The dense bf16 linear stands beside them; ratios to it are what the
numbers are for, absolute times drift.

    python bench/crossover.py [--threads 1,2] [--seconds 0.2] [--out bench/results/crossover.json]

The crossover of a shape is the smallest measured row count from which dequantize + GEMM stays
faster. ``CROSSOVER_ROWS`` in llmquant/kernels/int4/cpu.py is the median over shapes and thread
counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from llmquant.kernels.int4.cpu import CpuInt4
from llmquant.planning.advice.in_turn import in_turn, random_weight
from llmquant.spec import QuantSpec

SHAPES = ((2048, 2048), (2048, 8192), (8192, 2048), (4096, 4096))  # (in, out)
ROWS = (1, 2, 4, 8, 16, 32, 40, 48, 56, 64, 72, 80, 96, 128, 256, 512, 2048)


def sweep(
    in_features: int, out_features: int, spec: QuantSpec, seconds: float
) -> list[dict[str, float]]:
    """Milliseconds of the three ways at every row count."""
    weight = random_weight((out_features, in_features), spec)
    kernel = CpuInt4()
    prepared = kernel.prepare(weight, torch.bfloat16)
    dense = weight.dequantize(torch.bfloat16)
    table = []
    for rows in ROWS:
        x = torch.randn(rows, in_features, dtype=torch.bfloat16)
        ways: dict[str, Callable[[], object]] = {
            "operator": lambda x=x: kernel._few(x, prepared),
            "gemm": lambda x=x: kernel._many(x, prepared),
            "dense": lambda x=x: torch.nn.functional.linear(x, dense),
        }
        times = in_turn(ways, seconds)
        table.append({"rows": rows} | {k: round(v * 1e3, 4) for k, v in times.items()})
    return table


def crossover(table: list[dict[str, float]]) -> int | None:
    """Smallest row count from which ``gemm`` beats ``operator`` at every larger one."""
    wins = [entry["gemm"] < entry["operator"] for entry in table]
    first = next((i for i in range(len(wins)) if all(wins[i:])), None)
    return None if first is None else int(table[first]["rows"])


def processor() -> str:
    """The CPU's own name and whether it has AMX, on which a dense bf16 GEMM depends."""
    info = Path("/proc/cpuinfo")
    if not info.is_file():
        return platform.processor() or platform.machine()
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    amx = "with" if "amx_bf16" in fields.get("flags", "").split() else "without"
    return f"{fields.get('model name', platform.machine())}, {amx} AMX"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--threads", default=",".join(str(n) for n in sorted({1, torch.get_num_threads()}))
    )
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "crossover.json"
    )
    args = parser.parse_args()
    runs = []
    for threads in (int(n) for n in args.threads.split(",")):
        torch.set_num_threads(threads)
        for symmetric in (True, False):
            spec = QuantSpec(4, 128, symmetric)
            for in_features, out_features in SHAPES if symmetric else SHAPES[1:2]:
                table = sweep(in_features, out_features, spec, args.seconds)
                runs.append(
                    {"threads": threads, "spec": str(spec), "in": in_features, "out": out_features,
                     "crossover_rows": crossover(table), "milliseconds": table}
                )  # fmt: skip
                print(
                    threads, spec, in_features, out_features, runs[-1]["crossover_rows"], flush=True
                )
    rows = [int(r["crossover_rows"]) for r in runs if isinstance(r["crossover_rows"], int)]
    machine = {
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    report = {"machine": machine, "median_crossover_rows": statistics.median(rows), "runs": runs}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
