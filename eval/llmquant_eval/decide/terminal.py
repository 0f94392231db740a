"""A Verdict in the terminal: the decision, then a paragraph per metric; any width will do."""

from __future__ import annotations

from llmquant_eval.decide.render import MEANS, advice, columns
from llmquant_eval.decide.schema import Decision, MetricVerdict, Verdict
from llmquant_eval.report.terminal import stdout_console

_COLOURS: dict[Decision, str] = {"SHIP": "green", "DON'T SHIP": "red", "INCONCLUSIVE": "yellow"}


def show(verdict: Verdict) -> None:
    """Print it to stdout."""
    from rich.text import Text

    console = stdout_console(markup=False)
    console.print(
        Text(verdict.decision, f"bold {_COLOURS[verdict.decision]}")
        + Text(f": {MEANS[verdict.decision]}", "default")
    )
    console.print(f"baseline {verdict.baseline}\ncandidate {verdict.candidate}")
    for metric in verdict.metrics:
        console.print()
        title = Text(metric.metric, "bold") + Text(
            f"  {metric.decision}", _COLOURS[metric.decision]
        )
        console.print(title)
        for line in _lines(metric, verdict):
            console.print(f"  {line}")
    for note in verdict.notes:
        console.print(f"\nnote: {note}", style="dim")


def _lines(metric: MetricVerdict, verdict: Verdict) -> list[str]:
    cells = columns(metric, verdict.alpha)
    level = next(name for name in cells if name.endswith("interval"))
    lines = [
        f"{cells['baseline']} → {cells['candidate']}, difference {cells['difference']} ({level} {cells[level]}), "
        f"margin {cells['margin']}",
        f"{cells['items']}{f', lost / gained {f}' if (f := cells['lost / gained']) else ''}; "
        f"p {cells['p (not worse)']} that the loss reaches the margin, p {cells['p (worse)']} that it does not exceed it",
        advice(metric, verdict.power),
    ]
    if metric.flips is not None and metric.flips.lost_examples:
        lines.append("lost: " + ", ".join(e.id for e in metric.flips.lost_examples))
    return lines
