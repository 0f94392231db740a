"""How much memory quantizing a model needs that is larger than what one wants to give it.

    python bench/memory.py [--cases rtn-8b,gptq-1b,...] [--work-dir DIR]

Writes random-weight checkpoints of the true shapes of Llama-3.2-1B and Llama-3-8B (bfloat16, 5 GB
shards, tensor by tensor; 16 GB of disk for the 8B), quantizes each with the command line in a
process of its own, and records that process's highest resident set as the kernel counts it, and the
highest of its part that is not backed by files: pages of the mapped checkpoint count as resident
though the kernel drops them when it likes. Checkpoint and result are deleted after each case, also
when interrupted.

Case ``qat-1b-short`` trains the scales of such a model, rounded to nearest: two steps of two
windows, since more take no more memory. Only training is counted.

Marks: ``rtn-8b`` at most 3.5 GB, ``gptq-1b`` (32 windows of 512 tokens) at most 4 GB, and twice the
blocks at most 5 % more. The tokenizer is the example model's: its ids are below the models'
vocabulary, and which ids they are changes no size.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig

from llmquant.checkpoint.writer import CheckpointWriter

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "memory.json"
EXAMPLE = ROOT / "examples" / "tiny-llama"
_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_parameters": _ROPE | {"factor": 32.0},
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
}
_GPTQ = ["--recipe", "gptq-w4g128", "--calibration", f"file:{EXAMPLE / 'calibration.txt'}"]
_QAT = (
    "--data", f"file:{EXAMPLE / 'calibration.txt'}", "--steps", "2", "--batch-size", "2", "--seqlen",
    "512", "--heldout", "1", "--checks", "1", "--no-plot",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """A model's shape, its blocks, and the options of the run; ``command`` other than ``quantize``
    is of the model after rounding to nearest."""

    shape: str
    blocks: int
    options: tuple[str, ...]
    command: str = "quantize"


CASES = {
    "rtn-1b": Case("1b", 16, ("--recipe", "rtn-w4g128")),
    "rtn-1b-32": Case("1b", 32, ("--recipe", "rtn-w4g128")),
    "rtn-8b": Case("8b", 32, ("--recipe", "rtn-w4g128")),
    "gptq-1b": Case("1b", 16, (*_GPTQ, "--nsamples", "32", "--seqlen", "512")),
    "gptq-1b-2": Case("1b", 2, (*_GPTQ, "--nsamples", "32", "--seqlen", "512")),
    "gptq-1b-4": Case("1b", 4, (*_GPTQ, "--nsamples", "32", "--seqlen", "512")),
    "gptq-1b-short": Case("1b", 16, (*_GPTQ, "--nsamples", "8", "--seqlen", "128")),
    "gptq-1b-32-short": Case("1b", 32, (*_GPTQ, "--nsamples", "8", "--seqlen", "128")),
    "qat-1b-short": Case("1b", 16, _QAT, "qat"),
}


def write_model(folder: Path, shape: str, blocks: int) -> None:
    """Random weights, one tensor in memory at a time."""
    config = LlamaConfig(
        **{**SHAPES[shape], "num_hidden_layers": blocks},
        vocab_size=128256,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        dtype="bfloat16",
        bos_token_id=0,
        eos_token_id=1,
        architectures=["LlamaForCausalLM"],
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with CheckpointWriter(folder) as writer:
        for name, parameter in model.named_parameters():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            if parameter.ndim == 1:
                writer.add(name, torch.ones(parameter.shape, dtype=torch.bfloat16))
            else:
                writer.add(
                    name,
                    torch.empty(parameter.shape).normal_(0, 0.02, generator=generator).bfloat16(),
                )
        writer.finish_weights()
        writer.write_json("config.json", config.to_dict())
        for name in ("tokenizer.json", "tokenizer_config.json"):
            writer.write_text(name, (EXAMPLE / name).read_text(encoding="utf-8"))
        writer.publish()


# The kernel's own count of the process, which starts at exec: ru_maxrss also knows the peak of who
# started it.
_CHILD = """
import atexit, pathlib, sys
status = pathlib.Path("/proc/self/status")
note = pathlib.Path(sys.argv.pop())
atexit.register(lambda: note.write_text(status.read_text()))
from llmquant.cli import main
main()
"""


def watched(process: psutil.Process) -> Iterator[int]:
    """Resident bytes that no file backs, again and again until the process ends."""
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        memory = process.memory_info()
        yield memory.rss - memory.shared
        time.sleep(0.2)


def quantized(
    model: Path, output: Path, options: tuple[str, ...], verb: str = "quantize"
) -> dict[str, Any]:
    """Run the command line; its peaks in bytes and its seconds."""
    note = output.with_name("status")
    command = [
        sys.executable,
        "-c",
        _CHILD,
        verb,
        str(model),
        "-o",
        str(output),
        "--quiet",
        *options,
        str(note),
    ]
    with contextlib.ExitStack() as ending:
        child = subprocess.Popen(command)
        ending.callback(child.kill)  # of a process that ended, nothing
        anonymous = max(watched(psutil.Process(child.pid)), default=0)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode != 0:
        raise SystemExit(f"{' '.join(command[3:])} ended with {child.returncode}")
    (peak,) = (
        int(line.split()[1]) * 1024
        for line in note.read_text().splitlines()
        if line.startswith("VmHWM:")
    )
    return {
        "peak_rss_bytes": peak, "peak_anonymous_bytes": anonymous,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }  # fmt: skip


def measure(name: str, work: Path) -> dict[str, Any]:
    """One case, from nothing to nothing."""
    case = CASES[name]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        model, output = Path(scratch) / "model", Path(scratch) / "quantized"
        write_model(model, case.shape, case.blocks)
        if case.command == "quantize":
            cost = quantized(model, output, case.options)
        else:
            start = Path(scratch) / "start"
            quantized(model, start, ("--recipe", "rtn-w4g128"))
            options = ("--reference", str(model), *case.options)
            cost = quantized(start, output, options, case.command)
        source, written = (
            sum(p.stat().st_size for p in d.glob("*.safetensors")) for d in (model, output)
        )
    return {
        "case": name,
        "shape": case.shape,
        "blocks": case.blocks,
        "options": [o.replace(f"{ROOT}/", "") for o in case.options],
        "source_bytes": source,
        "written_bytes": written,
        **cost,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--cases", default="rtn-1b,rtn-1b-32,rtn-8b,gptq-1b,gptq-1b-short,gptq-1b-32-short"
    )
    parser.add_argument("--work-dir", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    unknown = [c for c in args.cases.split(",") if c not in CASES]
    if unknown:
        raise SystemExit(f"unknown: {', '.join(unknown)}; cases: {', '.join(CASES)}")
    for name in args.cases.split(","):
        free = shutil.disk_usage(args.work_dir).free
        if CASES[name].shape == "8b" and free < 45e9:
            raise SystemExit(
                f"{args.work_dir} has {free / 1e9:.0f} GB free; {name} needs 45 (checkpoint, its making, result)"
            )
        cost = measure(name, args.work_dir)
        report = json.loads(args.out.read_text()) if args.out.exists() else {"cases": []}
        report["environment"] = {
            "llmquant": version("llmquant"),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        }
        report["cases"] = [c for c in report["cases"] if c["case"] != name] + [cost]
        args.out.write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(cost), flush=True)


if __name__ == "__main__":
    main()
