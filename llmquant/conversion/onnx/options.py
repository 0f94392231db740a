"""What an ONNX export can be asked for, and what that means for a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from llmquant.errors import UsageError

PROVIDERS = ("cpu", "cuda", "dml", "webgpu")
PACKED, FP32, FP16, INT8 = "packed", "fp32", "fp16", "int8"
WEIGHTS = (PACKED, FP32, FP16, INT8)
HEADS = ("fp16", "int8", "int4")
KEPT = "fp16"
LEVELS = (0, 4)


@dataclass(frozen=True, slots=True)
class OnnxOptions:
    """How to export.

    Attributes:
        provider: ONNX Runtime's execution provider that will run it.
        accuracy_level: 0 leaves activations as they are, 4 rounds them to int8, which is faster on
            a CPU.
        head: of a float output head: ``fp16`` leaves it as it is, ``int8`` and ``int4`` let the
            tools round it.
        weights: ``packed`` keeps codes, ``fp32`` and ``fp16`` export floats, ``int8`` rounds
            weights to int8 and activations as the graph runs; None is what the folder holds.
        python: of the environment with ONNX Runtime; None looks for it.
        check: run a few tokens through the result.
        overwrite: replace an existing model folder.
    """

    provider: str = "cpu"
    accuracy_level: int = 0
    head: str = KEPT
    weights: str | None = None
    python: str | os.PathLike[str] | None = None
    check: bool = True
    overwrite: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (
            ("execution provider", self.provider, PROVIDERS),
            ("head", self.head, HEADS),
            ("kind of weights", self.weights or PACKED, WEIGHTS),
            ("accuracy level", self.accuracy_level, LEVELS),
        ):
            if value not in known:
                names = ", ".join(map(str, known))
                raise UsageError(f"{what} {value!r} does not exist; choose one of {names}")


def choose_weights(options: OnnxOptions, packed: bool, activations: bool) -> str:
    """The kind of weights of an export.

    Args:
        packed: the folder is quantized.
        activations: engines round the inputs of its linears.

    Raises:
        UsageError: the folder cannot be exported so.
    """
    held = INT8 if activations else PACKED
    default = held if packed else FP32 if options.provider == "cpu" else FP16
    kind = options.weights or default
    if kind == PACKED and held == INT8:
        raise UsageError(
            "engines round the inputs of this folder's linears to int8; export it as int8 (the default for it)"
        )
    if kind == PACKED and not packed:
        raise UsageError(
            "the folder is not quantized; export fp32, fp16 or int8, or quantize it first"
        )
    if kind == INT8 and options.provider != "cpu":
        raise UsageError("int8 weights with dynamic activations are for --ep cpu")
    if kind == INT8 and options.head == "int4":
        raise UsageError("the head of an int8 export is int8 or fp16")
    if kind in (FP32, FP16) and options.head != KEPT:
        raise UsageError(f"--head {options.head} needs packed or int8 weights")
    if kind != PACKED and options.accuracy_level:
        raise UsageError("an accuracy level is of packed weights; leave it out")
    if kind == FP32 and options.provider in ("dml", "webgpu"):
        raise UsageError(f"the builder writes no fp32 graphs for {options.provider}; export fp16")
    return kind


def graph_dtype(kind: str, provider: str) -> torch.dtype:
    """Of what a graph computes between its linears."""
    if kind in (FP32, INT8) or (kind == PACKED and provider == "cpu"):
        return torch.float32
    return torch.float16
