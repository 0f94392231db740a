"""``llmquant bench``: how fast models are and what memory they take, beside each other. Importing
this module loads typer and nothing heavier."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from llmquant.cli.options import DeviceOption, DtypeOption, JsonOption, KernelOption, ThreadsOption
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.cli_options import QuietOption, ResultOption

if TYPE_CHECKING:
    from llmquant_eval.models.resolve import ModelFolder
    from llmquant_eval.speed.schema import SpeedReport

_Models = Annotated[
    list[str],
    typer.Argument(
        help="Model folders or hub names, dense or packed; ratios are to the first.",
        metavar="MODEL",
    ),
]
_PromptTokens = Annotated[
    list[str] | None,
    typer.Option(
        help="Tokens of a prompt; several as A,B [default: 512, or what the context takes].",
        metavar="N",
    ),
]
_NewTokens = Annotated[int, typer.Option(help="Tokens to generate after a prompt.", min=1)]
_BatchSize = Annotated[
    list[str] | None,
    typer.Option(help="Prompts at once; several as A,B [default: 1].", metavar="N"),
]
_Rounds = Annotated[
    int, typer.Option(help="How often each model is measured, in turn with the others.", min=1)
]


def bench_command(
    model: _Models,
    prompt_tokens: _PromptTokens = None,
    new_tokens: _NewTokens = 64,
    batch_size: _BatchSize = None,
    rounds: _Rounds = 3,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
    output: ResultOption = None,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure speed and memory of models, in turn.

    Load time, time to the first token, prefill and decode speed, peak memory; every measurement in
    a fresh process. Interrupted, it shows the rounds that were done.
    """
    import llmquant
    from llmquant import write_file
    from llmquant_eval.report.files import check_file
    from llmquant_eval.speed.process import Conditions
    from llmquant_eval.speed.rounds import Bench, fitting_points, run_bench

    if output is not None:
        check_file(output, llmquant.FileKind.SPEED)
    prompts = _numbers("--prompt-tokens", prompt_tokens)
    batches = _numbers("--batch-size", batch_size) or [1]
    models, on = _folders(model), llmquant.parse_device(device)
    one_dtype = llmquant.compute_dtype(models[0].path, dtype, on).name
    conditions = Conditions(one_dtype, str(on), kernel, threads, new_tokens=new_tokens)
    bench = Bench(models, fitting_points(models, prompts, batches, new_tokens), conditions, rounds)
    kept: list[SpeedReport] = []

    def keep(report: SpeedReport) -> None:
        kept.append(report)
        if output is not None:
            write_file(output, report.to_json())

    try:
        report = run_bench(bench, _teller(quiet), keep)
    except KeyboardInterrupt:
        _print(kept[-1:], as_json)
        raise
    _print([report], as_json)
    failed = [m.label for m in report.models if m.failure]
    if failed:
        raise LlmquantError(f"{', '.join(failed)} could not be measured; see above")


def _print(reports: Sequence[SpeedReport], as_json: bool) -> None:
    from llmquant_eval.speed.terminal import show

    for report in reports:
        if as_json:
            sys.stdout.write(report.to_json())
        else:
            show(report)


def _teller(quiet: bool) -> Callable[[str], None]:
    """What tells people on stderr how far it is."""
    return (lambda line: None) if quiet else (lambda line: print(line, file=sys.stderr, flush=True))


def _folders(sources: Sequence[str]) -> list[ModelFolder]:
    from llmquant_eval.models.endpoint import is_url
    from llmquant_eval.models.resolve import ModelFolder, resolve_models

    for source in sources:
        if is_url(source):
            raise UsageError(
                f"{source} is a server; bench measures models that it loads itself: give the folder"
            )
    return [m for m in resolve_models(sources) if isinstance(m, ModelFolder)]


def _numbers(option: str, given: Sequence[str] | None) -> list[int]:
    """``A,B`` and repeated options, as numbers without repetitions."""
    numbers: dict[int, None] = {}
    for text in ",".join(given or ()).split(",") if given else ():
        if not text.strip().isdecimal() or int(text) < 1:
            raise UsageError(f"{option} {text!r} is no number of 1 or more; write 512 or 128,512")
        numbers[int(text)] = None
    return list(numbers)
