"""``llmquant auto``: a bound in, the smallest model within it out. Importing this module loads
typer and nothing heavier."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.options import (
    DeviceOption,
    DtypeOption,
    Engine,
    FormatOption,
    JsonOption,
    KernelOption,
    LengthOption,
    MemoryOption,
    ModelArgument,
    OutputOption,
    OverwriteOption,
    SamplesOption,
    ThreadsOption,
)
from llmquant.cli.sizes import parse_size
from llmquant.cli.stopping import stoppable
from llmquant_eval import cli_options as options

if TYPE_CHECKING:
    from llmquant_eval.auto.request import AutoRequest

_Ppl = Annotated[
    str | None,
    typer.Option(help="Perplexity may rise by this share: 2% or 0.02.", metavar="SHARE"),
]
_Kl = Annotated[
    str | None,
    typer.Option(help="Mean KL to the original, in nats per token, such as 0.02.", metavar="X"),
]
_Drop = Annotated[
    str | None,
    typer.Option(
        help="Accuracy of each of --tasks may drop by this share of its items: 1% or 0.01.",
        metavar="SHARE",
    ),
]
_Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Your text: a file, jsonl:PATH#FIELD or hf:… (repeatable). Half of it calibrates, the other half judges.",
        metavar="SOURCE",
    ),
]
_Calibration = Annotated[
    str | None,
    typer.Option(help="Calibrate on this text; all of --data then judges.", metavar="SOURCE"),
]
_MaxBytes = Annotated[
    str | None, typer.Option(help="Weight files of at most this size, like 4GB.", metavar="SIZE")
]
_Fit = Annotated[
    str | None,
    typer.Option(help="Runs in this much RAM with a whole context, like 8GiB.", metavar="SIZE"),
]
_Budget = Annotated[
    str | None,
    typer.Option(help="Stop climbing after this time: 2h, 90m.", metavar="TIME"),
]
_Fastest = Annotated[
    bool, typer.Option("--fastest", help="Choose the fastest at decoding here, not the smallest.")
]
_Rungs = Annotated[
    list[str] | None,
    typer.Option(
        "--rung",
        help="Try these recipes instead of the ladder, in this order; mixed:BITS allocates (repeatable).",
        metavar="RECIPE",
    ),
]
_Engine = Annotated[Engine, typer.Option(help="Only what this engine runs.")]
_Alpha = Annotated[
    float, typer.Option(help="Acceptable probability that the chosen model is beyond the bound.")
]
_Keep = Annotated[
    bool, typer.Option("--keep-candidates", help="Keep the folders of all measured candidates.")
]


def auto_command(
    model: ModelArgument,
    output: OutputOption,
    max_ppl_increase: _Ppl = None,
    max_kl: _Kl = None,
    max_task_drop: _Drop = None,
    data: _Data = None,
    calibration: _Calibration = None,
    nsamples: SamplesOption = None,
    seqlen: LengthOption = None,
    max_bytes: _MaxBytes = None,
    fit: _Fit = None,
    engine: _Engine = Engine.any,
    layout: FormatOption = None,
    time_budget: _Budget = None,
    fastest: _Fastest = False,
    rung: _Rungs = None,
    alpha: _Alpha = 0.05,
    tasks: options.TasksOption = None,
    include_path: options.IncludePathOption = None,
    limit: options.LimitOption = None,
    window: options.WindowOption = None,
    max_windows: options.MaxWindowsOption = None,
    bos: options.BosOption = "default",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
    max_memory: MemoryOption = None,
    overwrite: OverwriteOption = False,
    keep_candidates: _Keep = False,
    as_json: JsonOption = False,
    quiet: options.QuietOption = False,
) -> None:
    """Find the smallest quantized MODEL within a bound.

    Tries recipes from cheap to dear, measures each on held-out text, and writes the smallest that
    loses no more than the bound. Exit code 3 if none does: keep the original.
    """
    request = _request(dict(locals()))
    from llmquant_eval.auto.answer.screen import show, shown
    from llmquant_eval.auto.schema import EXIT_CODES
    from llmquant_eval.auto.search import search

    with stoppable(), shown(hidden=quiet or as_json) as screen:
        report = search(request, screen)
    if as_json:
        sys.stdout.write(report.to_json())
    else:
        show(report)
        sys.stderr.write(f"report: {request.work / 'report.html'}\n")
    raise typer.Exit(EXIT_CODES[report.decision])


def _request(given: Mapping[str, Any]) -> AutoRequest:
    """The command's options as a request, whose other fields have their names."""
    from llmquant_eval.auto.bounds import Bounds
    from llmquant_eval.auto.request import (
        DEFAULT_WINDOWS,
        AutoRequest,
        parse_bound,
        parse_duration,
    )

    bounds = Bounds(
        ppl_increase=parse_bound("--max-ppl-increase", given["max_ppl_increase"], "2% or 0.02"),
        kl=parse_bound("--max-kl", given["max_kl"], "nats per token, such as 0.02"),
        task_drop=parse_bound("--max-task-drop", given["max_task_drop"], "1% or 0.01"),
    )
    sizes: dict[str, Any] = {
        name: None
        if given[name] is None
        else parse_size(f"--{name.replace('_', '-')}", given[name])
        for name in ("max_bytes", "fit", "max_memory")
    }
    same = (
        "model", "calibration", "nsamples", "seqlen", "layout", "fastest", "alpha", "include_path",
        "limit", "window", "bos", "dtype", "device", "kernel", "threads", "overwrite",
        "keep_candidates",
    )  # fmt: skip
    budget = given["time_budget"]
    return AutoRequest(
        **{name: given[name] for name in same},
        **sizes,
        output=Path(given["output"]),
        data=tuple(given["data"] or ()),
        bounds=bounds,
        rungs=tuple(given["rung"] or ()),
        engine=given["engine"].value,
        time_budget=None if budget is None else parse_duration("--time-budget", budget),
        tasks=",".join(given["tasks"]) if given["tasks"] else None,
        max_windows=DEFAULT_WINDOWS if given["max_windows"] is None else given["max_windows"],
        command=shlex.join(["llmquant", *sys.argv[1:]]),
    )
