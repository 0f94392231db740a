"""``llmquant compare``: a verdict from two results, with an exit code for CI. Importing this module
loads typer and nothing heavier."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmquant.cli.options import JsonOption
from llmquant.errors import UsageError
from llmquant_eval.cli_options import HtmlOption, MarkdownOption, ResultOption, share_of

if TYPE_CHECKING:
    from llmquant_eval.decide.schema import Verdict


_Baseline = Annotated[
    str,
    typer.Argument(
        help="Results of the original: of `llmquant validate`, a report of `llmquant eval --tasks`, or what "
        "lm-eval logged (a file or a folder). FILE#LABEL chooses a model of a report.",
        metavar="BASELINE",
    ),
]
_Candidate = Annotated[
    str, typer.Argument(help="Results of the quantized model.", metavar="CANDIDATE")
]
_Margin = Annotated[
    list[str] | None,
    typer.Option(
        help="The acceptable loss: 1% is one percentage point of an accuracy, one percent of the baseline's mean "
        "of other scores. METRIC=2% for one metric.  [default: 1%]",
        metavar="SHARE",
    ),
]
_Alpha = Annotated[float, typer.Option(help="Acceptable probability of a wrong verdict.")]
_Power = Annotated[
    float, typer.Option(help="Power that sample sizes and detectable differences are for.")
]
_Metric = Annotated[
    list[str] | None, typer.Option(help="Decide by this metric only; several times for several.")
]
_Examples = Annotated[int, typer.Option(help="Flipped items to show, of each kind.", min=0)]


def compare_command(
    baseline: _Baseline,
    candidate: _Candidate,
    margin: _Margin = None,
    alpha: _Alpha = 0.05,
    power: _Power = 0.8,
    metric: _Metric = None,
    examples: _Examples = 5,
    output: ResultOption = None,
    markdown: MarkdownOption = None,
    html: HtmlOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether CANDIDATE may replace BASELINE.

    SHIP (exit code 0), DON'T SHIP (1) or INCONCLUSIVE (3): is the loss on these items smaller than
    the margin?
    """
    from llmquant import FileKind
    from llmquant_eval.decide.compare import Bound, compare
    from llmquant_eval.decide.read import read_results
    from llmquant_eval.decide.schema import EXIT_CODES
    from llmquant_eval.report.files import check_file

    kinds: dict[FileKind, Path | None] = {
        FileKind.VERDICT: output,
        FileKind.MARKDOWN: markdown,
        FileKind.PAGE: html,
    }
    for kind, path in kinds.items():
        if path is not None:
            check_file(path, kind, baseline, candidate)
    general, margins = _margins(margin or [])
    bound = Bound(
        general, margins, alpha=alpha, power=power, metrics=tuple(metric or ()), examples=examples
    )
    verdict = compare(read_results(baseline), read_results(candidate), bound)
    _write(verdict, output, markdown, html)
    if as_json:
        sys.stdout.write(verdict.to_json())
    else:
        from llmquant_eval.decide.terminal import show

        show(verdict)
    raise typer.Exit(EXIT_CODES[verdict.decision])


def _margins(given: list[str]) -> tuple[float, dict[str, float]]:
    """The general margin, and those of single metrics.

    Raises:
        UsageError: no share, or a second one for the same.
    """
    margins: dict[str, float] = {}
    for text in given:
        name, named, value = text.rpartition("=")
        if name in margins:
            raise UsageError(
                f"--margin {text} is the second one {f'of {name}' if name else 'for all metrics'}; give one"
            )
        margins[name] = _share(text if named and not name else value, text)
    return margins.pop("", 0.01), margins


def _share(text: str, whole: str) -> float:
    share = share_of(text)
    if share is None:
        raise UsageError(f"--margin {whole}: {text!r} is no share; write 1% or 0.01, or METRIC=1%")
    return share


def _write(verdict: Verdict, output: Path | None, markdown: Path | None, html: Path | None) -> None:
    from llmquant import write_file
    from llmquant_eval.decide import render

    for path, text in (
        (output, verdict.to_json),
        (markdown, lambda: render.markdown(verdict)),
        (html, lambda: render.html(verdict)),
    ):
        if path is not None:
            write_file(path, text())
            sys.stderr.write(f"wrote {path}\n")
