"""Quality of llmquant beside its peers: the same model, calibration windows, grid and evaluation
for every tool.

Each cell is one (tool, grid, seed): the tool quantizes in a process of its own, whose processor
time and highest resident set are taken (interpreter and imports included, for all alike);
``llmquant eval`` then measures the folder, whoever wrote it, in float32 with dequantized weights,
so that only the quantization differs. A cell is written when it is done: run again, and only what
is missing is measured. Ours and the peers' calibration windows of one seed are the same token ids.

    python bench/quality.py run --environment llmcompressor=ENV/bin/python
    python bench/quality.py table > docs/quality.md

``--tools``, ``--grids`` and ``--seeds`` narrow it down; ``--model``, ``--calibration`` and
``--text`` take another model, which gets a section of its folder's name. The table
gives the mean over seeds and, where there are several, the range. Cost is counted in processor
seconds (user and system, all threads), which depend less than wall time on what else the machine
does; OMP_NUM_THREADS=1 for the committed ones, or the processor's column says how many threads.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quality_further import add_options, kept, measured
from quality_table import render

import llmquant

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "quality.json"
EXAMPLE = "examples/tiny-llama"
METRICS = ("perplexity_ratio", "kl_mean", "kl_p99", "top1_agreement")
_THREADS = os.environ.get("OMP_NUM_THREADS", "all")
_MORE_THREADS = () if _THREADS == "1" else (f"{_THREADS} threads",)


@dataclass(frozen=True, slots=True)
class Grid:
    """One storage scheme; ``group_size`` -1: one scale per row."""

    bits: int
    group_size: int
    symmetric: bool = True

    def __str__(self) -> str:
        group = "row" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits} {group} {'sym' if self.symmetric else 'asym'}"


GRIDS = {
    str(g): g
    for g in (
        Grid(4, 128),
        Grid(4, 128, symmetric=False),
        Grid(4, 64),
        Grid(4, 64, symmetric=False),
        Grid(4, 32),
        Grid(4, 32, symmetric=False),
        Grid(4, -1),
        Grid(3, 32),
        Grid(3, 64),
        Grid(3, 128),
        Grid(2, 32),
        Grid(8, 128),
        Grid(8, -1),
    )
}
MIXED = "llmquant gptq; mixed within the same size"
# Name in the table → the recipe and the options that llmquant quantize gets beside the grid.
OURS: dict[str, list[str]] = {
    "llmquant rtn": ["--method", "rtn"],
    "llmquant gptq": ["--method", "gptq"],
    "llmquant gptq; rotated": ["--method", "gptq", "--rotate"],
    "llmquant awq+gptq; rotated": ["--recipe", "awq-gptq-w4g32-asym", "--rotate"],
    "llmquant best; rotated": ["--recipe", "rotate-best-w4g128"],
    "llmquant awq": ["--recipe", "awq-w4g128"],
    "llmquant awq+gptq": ["--recipe", "awq-gptq-w4g32-asym"],
    "llmquant best": ["--recipe", "best-w4g128"],
    "llmquant best with awq": ["--recipe", "best-w4g128", "--method", "awq+gptq+tune"],
    "llmquant best; 2 bits": ["--recipe", "best-w2g32"],
    "llmquant qat": ["--recipe", "qat-w4g128"],
    "llmquant qat; 3 bits": ["--recipe", "qat-w3g128"],
    "llmquant qat; 2 bits": ["--recipe", "qat-w2g32"],
    MIXED: ["--method", "gptq"],
}
# Name in the table → (environment, tool of bench/peers.py).
PEERS = {
    "llm-compressor rtn": ("llmcompressor", "llmcompressor-rtn"),
    "llm-compressor gptq": ("llmcompressor", "llmcompressor-gptq"),
    "llm-compressor awq": ("llmcompressor", "llmcompressor-awq"),
    "autoround 200": ("autoround", "autoround"),
    "autoround 40": ("autoround", "autoround-40"),
    "gptqmodel gptq": ("gptqmodel", "gptqmodel"),
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What all cells of a run share."""

    model: str
    calibration: str
    nsamples: int
    seqlen: int
    text: str
    windows: int
    environments: dict[str, str]
    scratch: Path
    keep: Path | None


def ours(tool: str, grid: Grid, seed: int, setting: Setting, output: Path) -> list[str]:
    """The command line of one of our methods."""
    scheme = ["--bits", str(grid.bits), "--group-size", str(grid.group_size)]
    scheme.append("--sym" if grid.symmetric else "--asym")
    if tool == MIXED:
        scheme = ["--target-bpw", str(grid.bits + 16 / grid.group_size)]
    text = ["--calibration", setting.calibration, "--nsamples", str(setting.nsamples)]
    text += ["--seqlen", str(setting.seqlen)]
    text = [] if tool == "llmquant rtn" else text
    main = "from llmquant.cli import main; main()"
    run = [
        sys.executable, "-c", main, "quantize", setting.model, "-o", str(output), "--quiet",
        "--seed", str(seed), "--store-dtype", "source",  # as the peers, and as was measured
    ]  # fmt: skip
    return [*run, *OURS[tool], *scheme, *text]


def peer(tool: str, grid: Grid, seed: int, setting: Setting, output: Path) -> list[str]:
    """The command line of a peer, whose calibration windows are drawn first."""
    environment, name = PEERS[tool]
    windows = setting.scratch / f"windows-{seed}.json"
    peers = str(ROOT / "bench" / "peers.py")
    if not windows.exists():
        draw = [
            sys.executable, peers, "windows", setting.model, "--calibration",
            setting.calibration, "--seed", str(seed), "--nsamples", str(setting.nsamples),
            "--seqlen", str(setting.seqlen), "-o", str(windows),
        ]  # fmt: skip
        subprocess.run(draw, check=True, stdout=subprocess.DEVNULL)
    scheme = ["--bits", str(grid.bits), "--group-size", str(grid.group_size), "--seed", str(seed)]
    scheme += [] if grid.symmetric else ["--asymmetric"]
    python = setting.environments[environment]
    return [
        python, peers, "quantize", name, setting.model, "-o", str(output), "--windows",
        str(windows), *scheme,
    ]  # fmt: skip


def quantized(command: Sequence[str], log: Path) -> dict[str, float]:
    """Run a tool; its CPU seconds and the highest resident set of its process, in bytes."""
    with log.open("wb") as out:
        child = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(
            f"{' '.join(command)} ended with {child.returncode}:\n{log.read_text(errors='replace')[-2000:]}"
        )
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def evaluated(folder: Path, setting: Setting) -> dict[str, float]:
    """Metrics of a quantized folder against the original."""
    options = [
        "--reference", setting.model, "--text", setting.text, "--window", str(setting.seqlen),
        "--max-windows", str(setting.windows), "--no-noise-floor",
    ]  # fmt: skip
    model = measured(folder, options, "candidate")
    return {name: model["metrics"][name]["value"] for name in METRICS} | {
        "bits_per_weight": model["bits_per_weight"]
    }


def run(args: argparse.Namespace) -> None:
    """Measure the cells that are missing."""
    report: dict[str, Any] = (
        json.loads(args.out.read_text()) if args.out.exists() else {"settings": {}, "cells": []}
    )
    with tempfile.TemporaryDirectory() as scratch:
        environments = dict(e.split("=", 1) for e in args.environment)
        setting = Setting(
            args.model, args.calibration, args.nsamples, args.seqlen, args.text, args.windows,
            environments, Path(scratch), args.keep,
        )  # fmt: skip
        known = {(c["tool"], c["grid"], c["seed"], c["model"]): c for c in report["cells"]}
        for tool, grid, seed in wanted(args, environments):
            before = known.get((tool, grid, seed, Path(args.model).name))
            if before is not None and "cpu_seconds" in before:
                continue
            if before is not None:
                report["cells"].remove(before)
            report["cells"].append(cell(tool, grid, seed, setting))
            report["settings"][Path(args.model).name] = shared(args)
            partial = args.out.with_suffix(".partial")
            partial.write_text(json.dumps(report, indent=1) + "\n")
            partial.replace(args.out)


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """What the cells of a model have in common, for the record."""
    return {
        "calibration": args.calibration,
        "nsamples": args.nsamples,
        "seqlen": args.seqlen,
        "text": args.text,
        "windows": args.windows,
        "threads": _THREADS,
        "python": platform.python_version(),
    }


def wanted(args: argparse.Namespace, environments: dict[str, str]) -> list[tuple[str, str, int]]:
    """The cells asked for: peers only where their environment is given; methods without calibration
    have one seed."""
    every = [*OURS, *(t for t, (e, _) in PEERS.items() if e in environments)]
    tools = args.tools.split(",") if args.tools else every
    grids = args.grids.split(",") if args.grids else list(GRIDS)
    seeds = [int(s) for s in args.seeds.split(",")]
    unknown = [t for t in tools if t not in {**OURS, **PEERS}] + [
        g for g in grids if g not in GRIDS
    ]
    if unknown:
        raise SystemExit(
            f"unknown: {', '.join(unknown)}; tools: {', '.join([*OURS, *PEERS])}; grids: {', '.join(GRIDS)}"
        )
    cells = (
        (t, g, s)
        for s in seeds
        for g in grids
        for t in tools
        if s == seeds[0] or not t.endswith(" rtn")
    )
    return [(t, g, s) for t, g, s in cells if t != MIXED or GRIDS[g].group_size > 0]


def cell(tool: str, grid: str, seed: int, setting: Setting) -> dict[str, Any]:
    """One measured cell."""
    output = setting.scratch / "model"
    command = (ours if tool in OURS else peer)(tool, GRIDS[grid], seed, setting, output)
    cost = quantized(command, setting.scratch / "log")
    here = llmquant.this_processor()  # seconds of two processors do not compare
    result = {
        "tool": tool, "grid": grid, "seed": seed, "model": Path(setting.model).name,
        "processor": ", ".join([here.name, *here.instruction_sets[:1], *_MORE_THREADS]), **cost, **evaluated(output, setting),
    }  # fmt: skip
    if setting.keep is None:
        shutil.rmtree(output)
    else:
        shutil.rmtree(setting.keep / kept(result), ignore_errors=True)
        shutil.move(output, setting.keep / kept(result))
    print(json.dumps(result), file=sys.stderr, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser("run", help="measure what is missing")
    first.add_argument("--model", default=EXAMPLE)
    first.add_argument("--calibration", default=f"file:{EXAMPLE}/calibration.txt")
    first.add_argument("--text", default=f"file:{EXAMPLE}/heldout.txt")
    first.add_argument("--nsamples", type=int, default=64)
    first.add_argument("--seqlen", type=int, default=512)
    first.add_argument("--windows", type=int, default=120)
    first.add_argument("--environment", action="append", default=[], metavar="NAME=PYTHON")
    first.add_argument("--tools")
    first.add_argument("--grids")
    first.add_argument("--seeds", default="0,1,2")
    first.add_argument("--keep", type=Path, help="keep the quantized folders below this one")
    first.set_defaults(run=run)
    second = commands.add_parser("table", help="render the results")
    second.set_defaults(
        run=lambda args: print(render(json.loads(args.out.read_text()), list(GRIDS)))
    )
    third = commands.add_parser("further", help="measure kept folders on more texts and tasks")
    add_options(third)
    for command in (first, second, third):
        command.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
