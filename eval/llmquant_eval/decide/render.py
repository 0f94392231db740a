"""A Verdict for people: Markdown, and a page made of it that needs nothing else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from llmquant_eval.decide.schema import Decision, Example, MetricVerdict, Verdict
from llmquant_eval.report.page import markdown_body, plain, render_page

_TEMPLATE = Path(__file__).parent / "templates" / "verdict.html"
MEANS: dict[Decision, str] = {
    "SHIP": "a loss of the margin or more is ruled out, for every metric",
    "DON'T SHIP": "a loss beyond the margin is proved",
    "INCONCLUSIVE": "these items do not tell whether the loss is smaller than the margin",
}
_LONGEST = 300  # characters of a prompt or an answer that are shown


def markdown(verdict: Verdict) -> str:
    """The whole verdict."""
    lines = [f"# {verdict.decision}", "", f"{_sentence(MEANS[verdict.decision])}", ""]
    lines += [f"- baseline: `{verdict.baseline}`", f"- candidate: `{verdict.candidate}`"]
    lines += [f"- wrong verdicts: at most {percent(verdict.alpha)}; power {percent(verdict.power)}"]
    lines += [f"- note: {plain(note)}" for note in verdict.notes]
    lines += ["", *_table(verdict.metrics, verdict.alpha), ""]
    for metric in verdict.metrics:
        lines += [f"- **{plain(metric.metric)}**: {advice(metric, verdict.power)}"]
    for metric in verdict.metrics:
        if metric.flips is not None and (metric.flips.lost or metric.flips.gained):
            lines += ["", f"## What changed: {plain(metric.metric)}"]
            lines += _examples("lost", metric.flips.lost, metric.flips.lost_examples)
            lines += _examples("gained", metric.flips.gained, metric.flips.gained_examples)
    return "\n".join(lines) + "\n"


def html(verdict: Verdict) -> str:
    """The same as one page."""
    body = markdown_body(markdown(verdict))
    decision = verdict.decision.lower().replace("'", "").replace(" ", "-")
    return render_page(
        _TEMPLATE,
        f"{verdict.decision}: {verdict.candidate}",
        {"decision": decision, "body": body},
    )


def advice(metric: MetricVerdict, power: float) -> str:
    """What the sample could see, and how many items would settle it."""
    if metric.detectable is None:  # nothing to compare with, so no spread is known
        return "One item, or one group of items, decides nothing, so give more of them."
    words = [
        f"{metric.items:,} items tell with power {percent(power)} if the true loss is {_amount(metric, metric.detectable)} "
        "or more away from the margin"
    ]
    if metric.decision == "INCONCLUSIVE":
        words.append(
            "the difference seen equals the margin, so no number of items settles it"
            if metric.needed is None
            else f"if the true difference is the one seen, {metric.needed:,} items settle it"
        )
    return _sentence("; ".join(words))


def counted(metric: MetricVerdict) -> str:
    """``300 items in 30 groups``."""
    items = f"{metric.items:,} item{'s' * (metric.items != 1)}"
    if not metric.groups:
        return items
    return f"{items} in {metric.groups:,} group{'s' * (metric.groups != 1)}"


def percent(share: float) -> str:
    """``5 %``."""
    return f"{100 * share:.4g} %"


def columns(metric: MetricVerdict, alpha: float) -> dict[str, str]:
    """One line of the table: column → text."""
    flips = metric.flips
    interval = "none" if metric.interval is None else _between(metric, *metric.interval)
    return {
        "metric": metric.metric,
        "decision": metric.decision,
        "items": counted(metric),
        "baseline": _value(metric, metric.baseline),
        "candidate": _value(metric, metric.candidate),
        "lost / gained": f"{flips.lost:,} / {flips.gained:,}" if flips else "",
        "difference": _amount(metric, metric.difference, sign=True),
        f"{percent(1 - 2 * alpha)} interval": interval,
        "margin": metric.margin_text,
        "p (not worse)": f"{metric.adjusted_not_worse:.3g}",
        "p (worse)": f"{metric.adjusted_worse:.3g}",
    }


def _table(metrics: Sequence[MetricVerdict], alpha: float) -> list[str]:
    rows = [columns(m, alpha) for m in metrics]
    names = list(rows[0])
    return [
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *("| " + " | ".join(plain(row[n]) for n in names) + " |" for row in rows),
    ]


def _examples(what: str, count: int, examples: Sequence[Example]) -> list[str]:
    if not count:
        return []
    of = f", {len(examples)} of them" if len(examples) < count else ""
    lines = ["", f"{what.capitalize()}: {count:,}{of}.", ""]
    for example in examples:
        lines.append(f"- {_code(example.id)}")
        for name in ("prompt", "baseline", "candidate"):
            text = getattr(example, name)
            if text is not None:
                lines.append(f"    - {name}: {_code(text)}")
    return lines


def _between(metric: MetricVerdict, low: float, high: float) -> str:
    """An interval, its unit once."""
    first = _amount(metric, low, sign=True).removesuffix(" points")
    return f"{first} … {_amount(metric, high, sign=True)}"


def _value(metric: MetricVerdict, value: float) -> str:
    return percent(value) if metric.points else f"{value:.5g}"


def _amount(metric: MetricVerdict, value: float, *, sign: bool = False) -> str:
    """A difference: in points of 100, or in the metric's own unit."""
    plus = "+" if sign else ""
    if metric.points:
        return f"{100 * value:{plus}.3g} points"
    return f"{value:{plus}.4g}"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


def _code(text: str) -> str:
    """Text as code on one line, cut."""
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else f"{line[:_LONGEST]}…"
    ticks = max((len(run) for run in re.findall(r"`+", line)), default=0) + 1
    return f"{'`' * ticks} {line} {'`' * ticks}" if line else "(empty)"
