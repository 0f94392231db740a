"""The results for people: a row per metric, and the command that comes next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmquant_eval.decide.means import Differences
from llmquant_eval.decide.results import Item, ItemResults
from llmquant_eval.report.statistics import ratio_of_sums
from llmquant_eval.report.terminal import plain_table, stdout_console
from llmquant_eval.validate.metrics.registry import NAMES

_LENGTH = "answer_tokens"
_LENGTH_MARGIN = "10%"  # lengths differ between good answers: one percent of them decides nothing

_FAULTS, _NAMED = ("loop", "language_switch", "refusal"), 5  # whose items are named, and how many


@dataclass(frozen=True, slots=True)
class Mean:
    """Of one metric over the items that have it; the error is over groups, None for a single
    one."""

    value: float
    error: float | None
    items: int


def mean_of(items: Sequence[Item], metric: str) -> Mean | None:
    """None where no item has the metric."""
    scored = [(item.group or ("", i), item.scores[metric]) for i, item in enumerate(items)
              if metric in item.scores]  # fmt: skip
    if not scored:
        return None
    places = {name: i for i, name in enumerate(dict.fromkeys(name for name, _ in scored))}
    at = np.array([places[name] for name, _ in scored])
    values = np.array([value for _, value in scored], dtype=np.float64)
    sums = np.bincount(at, weights=values).astype(np.float64)
    counts = np.bincount(at).astype(np.float64)
    estimate = Differences(sums, counts, 1.0)
    error = estimate.error
    return Mean(estimate.mean, error if math.isfinite(error) else None, len(values))


def show(
    results: ItemResults,
    output: Path,
    reference: tuple[str, ItemResults] | None,
    *,
    original: bool,
) -> None:
    """Print the table to stdout.

    Args:
        reference: the file of another model's results and what is in it.
        original: these are an unquantized model's.
    """
    from rich.text import Text

    console = stdout_console(markup=False)
    console.print(f"{results.model} on {results.data}: {len(results.items):,} items")
    table = plain_table()
    others = None if reference is None else reference[1].items
    headers = ["mean", "standard error", "n", *(["reference"] if others is not None else [])]
    table.add_column("metric")
    for header in headers:
        table.add_column(header, justify="right")
    for metric in metrics_of(results):
        lower = " (lower is better)" if metric in results.lower_is_better else ""
        cells = _cells(mean_of(results.items, metric))
        theirs = [_cells(mean_of(others, metric))[0]] if others is not None else []
        table.add_row(Text(metric) + Text(lower, "dim"), *cells, *theirs)
    console.print(table)
    for line in _to_look_at(results):
        console.print(line)
    for note in results.notes:
        console.print(f"note: {note}", style="dim")
    console.print(f"wrote {output}. Next:")
    given = None if reference is None else reference[0]
    for command in next_commands(results, output, given, original=original):
        console.print(f"  {command}", soft_wrap=True)


def _to_look_at(results: ItemResults) -> Iterator[str]:
    """Items that misbehave, by what they do: the answers are in the file."""
    for metric in _FAULTS:
        names = [item.id for item in results.items if item.scores.get(metric) == 1]
        if names:
            more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
            yield f"{metric}: {', '.join(names[:_NAMED])}{more}"


def metrics_of(results: ItemResults) -> list[str]:
    """Ours in their usual order, then the user's."""
    names = dict.fromkeys(name for item in results.items for name in item.scores)
    return [*(n for n in NAMES if n in names), *(n for n in names if n not in NAMES)]


def next_commands(
    results: ItemResults, output: Path, reference: str | None, *, original: bool
) -> Iterator[str]:
    """What decides whether a model may ship: measure the other one of the two, and compare."""
    data, here = shlex.quote(results.data), shlex.quote(str(output))
    baseline, candidate = reference and shlex.quote(reference), here
    if baseline is None and original:
        baseline, candidate = here, "quantized.json"
        yield (
            f"llmquant validate QUANTIZED --data {data} -o {candidate} --reference {baseline}"
            "  # and this run's options"
        )
    elif baseline is None:
        baseline = "original.json"
        yield f"llmquant validate ORIGINAL --data {data} -o {baseline}  # and this run's options"
    margins = f" --margin {_LENGTH}={_LENGTH_MARGIN}" if _LENGTH in metrics_of(results) else ""
    yield f"llmquant compare {baseline} {candidate} --margin 1%{margins}"


def length_note(results: ItemResults, reference: ItemResults) -> str | None:
    """How much longer the answers are than the reference's; None where lengths are not known."""
    theirs = {item.id: item.scores.get(_LENGTH) for item in reference.items}
    pairs = [
        (item.scores[_LENGTH], other)
        for item in results.items
        if _LENGTH in item.scores and (other := theirs.get(item.id)) is not None
    ]
    if not pairs or not any(other for _, other in pairs):
        return None
    ours, others = (np.array(side, dtype=np.float64) for side in zip(*pairs, strict=True))
    ratio = ratio_of_sums(ours, others)
    error = "" if ratio.standard_error is None else f" ± {ratio.standard_error:.3f}"
    return f"answers have {ratio.value:.3f}{error} times the tokens of {reference.model}'s"


def _cells(mean: Mean | None) -> list[str]:
    if mean is None:
        return ["–", "–", "0"]
    error = "–" if mean.error is None else f"{mean.error:.2g}"
    return [f"{mean.value:.4g}", error, f"{mean.items:,}"]
