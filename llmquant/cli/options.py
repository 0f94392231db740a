"""Options that several commands have, each written once: the same words mean the same everywhere.

Commands of the packages above use these too. Importing this costs no torch.
"""

from __future__ import annotations

from typing import Annotated

import typer

DeviceOption = Annotated[
    str,
    typer.Option("--device", help="auto (cuda where there is one, else cpu), cpu, cuda, cuda:0 …"),
]
"""Where it is computed."""

DtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="auto (what is fast here; `llmquant doctor` tells), bfloat16/bf16, float16/fp16, float32/fp32.",
    ),
]
"""Of activations, when a model runs."""

CalibrationDtypeOption = Annotated[
    str,
    typer.Option(
        "--dtype",
        help="Of calibration passes: auto (float32), bfloat16/bf16, float16/fp16, float32/fp32.",
    ),
]
"""Of activations, when a model is quantized."""

KernelOption = Annotated[
    str, typer.Option("--kernel", help="Kernel of packed layers: auto, or one by name.")
]
"""What multiplies packed weights."""

ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, help="Threads to compute with [default: torch's own, one per core]."
    ),
]
"""For :func:`llmquant.set_threads`."""
