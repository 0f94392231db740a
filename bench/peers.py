"""Other tools' quantizations of a model, from the very calibration windows that llmquant draws, to
be measured beside ours.

Each tool lives in an environment of its own, so the work is cut in two. The first step runs in
llmquant's environment and writes the windows as token ids; the second runs in the tool's and needs
nothing of llmquant:

    python bench/peers.py windows MODEL --calibration file:TEXT --nsamples 64 --seqlen 512 -o
    windows.json TOOL_ENVIRONMENT/bin/python bench/peers.py quantize llmcompressor-gptq MODEL -o OUT
    --windows windows.json

Weights have 4 bits, symmetric, in groups of 128 unless ``--bits``, ``--asymmetric`` and
``--group-size`` (-1: a row) say otherwise; ``lm_head`` is left alone; all run on the CPU.
``llmcompressor-gptq`` has act-order with static groups and computes in the checkpoint's dtype,
``llmcompressor-awq`` its default grid, ``autoround`` its default 200 iterations and
``autoround-40`` a fifth of them;
``llmcompressor-rtn`` looks at no text. llm-compressor's AWQ pins memory for transfers to an
accelerator, which stops without one: here that step is left out, which changes no number. It
searches in float32, because in float16 on a CPU it meets NaN and stops. ``gptqmodel`` has its
default act-order, group-aware; it too computes in float32 (its default here is bfloat16) and is
told to start the two worker threads that it insists on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ITERATIONS = 200  # AutoRound's default
FEWER = 40  # on a real model its time is then that of llmquant's tuned blocks
Windows = list[list[int]]


@dataclass(frozen=True, slots=True)
class Grid:
    """What every tool is asked for, and the seed of its own randomness."""

    bits: int
    group_size: int
    symmetric: bool
    seed: int

    def of_llmcompressor(self, **more: Any) -> dict[str, Any]:
        """A config group for all linears."""
        grouped = (
            {"strategy": "channel"}
            if self.group_size == -1
            else {"strategy": "group", "group_size": self.group_size}
        )
        weights = {"num_bits": self.bits, "type": "int", "symmetric": self.symmetric, **grouped}
        return {"all": {"targets": ["Linear"], "weights": weights | more}}


def write_windows(args: argparse.Namespace) -> None:
    """Draw the windows as ``llmquant quantize`` does with the same options."""
    from transformers import AutoTokenizer

    import llmquant

    drawn = llmquant.calibrate(
        llmquant.read_documents(args.calibration), AutoTokenizer.from_pretrained(args.model),
        nsamples=args.nsamples, seqlen=args.seqlen, seed=args.seed,
    )  # fmt: skip
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps({"sha256": drawn.sha256, "windows": [w.tolist() for w in drawn.windows]})
    )
    print(f"{len(drawn.windows)} windows, sha256 {drawn.sha256}")


def llmcompressor(
    model: Path,
    output: Path,
    seed: int,
    modifier: Any,
    windows: Windows | None,
    dtype: str = "auto",
) -> None:
    """Run one modifier (or a list), computing in ``dtype``, and write the folder in the model's
    own."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(seed)
    stored = AutoModelForCausalLM.from_pretrained(model, dtype="auto").dtype
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    tokenizer = AutoTokenizer.from_pretrained(model)
    data: dict[str, Any] = {}
    if windows is not None:
        rows = {"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]}
        data = {
            "dataset": Dataset.from_dict(rows), "num_calibration_samples": len(windows),
            "max_seq_length": max(map(len, windows)), "shuffle_calibration_samples": False,
        }  # fmt: skip
    oneshot(model=loaded, processor=tokenizer, recipe=modifier, **data)
    loaded.to(stored).save_pretrained(output, save_compressed=True)
    tokenizer.save_pretrained(output)


def llmcompressor_rtn(model: Path, output: Path, grid: Grid, windows: Windows | None) -> str:
    from llmcompressor.modifiers.quantization import QuantizationModifier

    llmcompressor(
        model,
        output,
        grid.seed,
        QuantizationModifier(config_groups=grid.of_llmcompressor(), ignore=["lm_head"]),
        None,
    )
    return "llmcompressor"


def llmcompressor_gptq(model: Path, output: Path, grid: Grid, windows: Windows | None) -> str:
    from llmcompressor.modifiers.gptq import GPTQModifier

    modifier = GPTQModifier(
        config_groups=grid.of_llmcompressor(actorder="static"),
        ignore=["lm_head"],
        actorder="static",
    )
    llmcompressor(model, output, grid.seed, modifier, needed(windows))
    return "llmcompressor"


def llmcompressor_awq(model: Path, output: Path, grid: Grid, windows: Windows | None) -> str:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    IntermediatesCache.pin_memory = lambda self, batch_index, input_names=None: None
    modifiers = [
        AWQModifier(),
        QuantizationModifier(config_groups=grid.of_llmcompressor(), ignore=["lm_head"]),
    ]
    llmcompressor(model, output, grid.seed, modifiers, needed(windows), dtype="float32")
    return "llmcompressor"


def autoround(
    model: Path, output: Path, grid: Grid, windows: Windows | None, iterations: int = ITERATIONS
) -> str:
    import torch
    from auto_round import AutoRound

    ids = [torch.tensor([w]) for w in needed(windows)]
    tuner = AutoRound(
        str(model),
        bits=grid.bits,
        group_size=grid.group_size,
        sym=grid.symmetric,
        iters=iterations,
        dataset=ids,
        nsamples=len(ids),
        seqlen=max(t.shape[1] for t in ids),
        batch_size=8,
        seed=grid.seed,
        device_map="cpu",
        disable_model_free=True,
    )
    scratch = output.with_name(f"{output.name}.partial")
    tuner.quantize_and_save(str(scratch), format="auto_round")
    (config,) = scratch.rglob("config.json")  # the tool may add a folder named after the scheme
    shutil.move(config.parent, output)
    shutil.rmtree(scratch, ignore_errors=True)
    return "auto-round"


def gptqmodel(model: Path, output: Path, grid: Grid, windows: Windows | None) -> str:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.manual_seed(grid.seed)
    config = QuantizeConfig(
        bits=grid.bits,
        group_size=grid.group_size,
        sym=grid.symmetric,
        act_group_aware=grid.group_size > 0,  # its default, which a group per row has no use for
        device="cpu",
    )
    loaded = GPTQModel.load(str(model), config, dtype=torch.float32)
    rows = [
        {"input_ids": torch.tensor([w]), "attention_mask": torch.ones(1, len(w), dtype=torch.long)}
        for w in needed(windows)
    ]
    loaded.quantize(rows, batch_size=8)
    loaded.save(str(output))
    return "gptqmodel"


def needed(windows: Windows | None) -> Windows:
    """The windows, or an end with a message."""
    if windows is None:
        raise SystemExit("this tool looks at text: give --windows FILE")
    return windows


TOOLS: dict[str, Callable[[Path, Path, Grid, Windows | None], str]] = {
    "llmcompressor-rtn": llmcompressor_rtn,
    "llmcompressor-gptq": llmcompressor_gptq,
    "llmcompressor-awq": llmcompressor_awq,
    "autoround": autoround,
    "autoround-40": partial(autoround, iterations=FEWER),
    "gptqmodel": gptqmodel,
}


def quantize(args: argparse.Namespace) -> None:
    """Run one tool."""
    if args.output.exists():
        raise SystemExit(f"{args.output} exists; remove it or choose another")
    windows: Windows | None = (
        json.loads(args.windows.read_text())["windows"] if args.windows else None
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    grid = Grid(args.bits, args.group_size, not args.asymmetric, args.seed)
    package = TOOLS[args.tool](args.model, args.output, grid, windows)
    print(f"{args.output}: {package} {version(package)}, {time.perf_counter() - began:.1f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    first = commands.add_parser(
        "windows", help="write calibration windows (llmquant's environment)"
    )
    first.add_argument("model", type=Path)
    first.add_argument("--calibration", required=True)
    first.add_argument("--nsamples", type=int, default=128)
    first.add_argument("--seqlen", type=int, default=2048)
    first.add_argument("--seed", type=int, default=0)
    first.add_argument("-o", "--output", type=Path, required=True)
    first.set_defaults(run=write_windows)
    second = commands.add_parser("quantize", help="run a tool (the tool's environment)")
    second.add_argument("tool", choices=sorted(TOOLS))
    second.add_argument("model", type=Path)
    second.add_argument("-o", "--output", type=Path, required=True)
    second.add_argument("--windows", type=Path)
    second.add_argument("--bits", type=int, default=4)
    second.add_argument("--group-size", type=int, default=128)
    second.add_argument("--asymmetric", action="store_true")
    second.add_argument("--seed", type=int, default=0)
    second.set_defaults(run=quantize)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":  # AutoRound starts processes that import this file
    main()
