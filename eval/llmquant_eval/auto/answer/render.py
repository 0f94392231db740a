"""The report for people: Markdown, and one page made of it that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llmquant_eval.auto.schema import AutoReport, Check, Part, Rung, Spent
from llmquant_eval.report.page import markdown_body, plain, render_page
from llmquant_eval.report.results import ModelResult
from llmquant_eval.report.table import ABSENT, metric_cell, size, speed
from llmquant_eval.report.words import counted

_TEMPLATE = Path(__file__).parent / "templates" / "auto.html"
ORIGINAL = "original"
COLUMNS = ("rung", "outcome", "bytes", "bits/w", "ratio", "KL nats", "decode tok/s", "time")


def cells(rung: Rung) -> list[str]:
    """One line of a table, under :data:`COLUMNS`."""
    measured = rung.measured
    model = None if measured is None else measured.model
    nbytes = rung.forecast_bytes if model is None else model.bytes_on_disk
    bits = rung.forecast_bits if model is None else model.bits_per_weight
    about = "" if model is not None or nbytes is None else "~"
    outcome = f"{rung.outcome}{' (cached)' if rung.cached else ''}"
    numbers = _numbers(model)
    time = ABSENT if measured is None else duration(measured.spent.wall)
    return [
        rung.name,
        outcome,
        f"{about}{size(nbytes)}",
        ABSENT if bits is None else f"{about}{bits:.4g}",
        *numbers,
        time,
    ]


def original_cells(model: ModelResult, spent: Spent) -> list[str]:
    """The line of the original, under :data:`COLUMNS`."""
    perplexity = " ".join(filter(None, metric_cell(model.metrics, "perplexity")))
    decode = ABSENT if model.cost is None else speed(model.cost.decode_tokens_per_second)
    shape = [size(model.bytes_on_disk), ABSENT, "1", "0", decode]
    return [ORIGINAL, f"perplexity {perplexity}", *shape, duration(spent.wall)]


def without_empty(rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """The columns that have something in some row, and the rows under them: speed is measured only
    where it decides."""
    kept = [i for i in range(len(COLUMNS)) if any(row[i] not in ("", ABSENT) for row in rows)]
    return [COLUMNS[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _numbers(model: ModelResult | None) -> list[str]:
    if model is None:
        return [ABSENT] * 3
    cost = model.cost
    return [
        " ".join(filter(None, metric_cell(model.metrics, "perplexity_ratio"))),
        " ".join(filter(None, metric_cell(model.metrics, "kl_mean"))),
        ABSENT if cost is None else speed(cost.decode_tokens_per_second),
    ]


def check_text(check: Check) -> str:
    """``KL 0.0124 (at most 0.0131, allowed 0.0200)``."""
    upper = "of unknown error" if check.upper is None else f"at most {_amount(check, check.upper)}"
    return f"{check.name} {_amount(check, check.value)} ({upper}, allowed {_amount(check, check.bound)})"


def checks_text(checks: Sequence[Check]) -> str:
    return "; ".join(map(check_text, checks))


def _amount(check: Check, value: float) -> str:
    return f"{value:#.3g}" if check.name == "KL" else f"{100 * value:#.3g} %"


def sentence(text: str) -> str:
    """With a capital letter and a full stop."""
    return f"{text[:1].upper()}{text[1:].removesuffix('.')}."


def duration(seconds: float) -> str:
    """For people: the two largest units."""
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def markdown(report: AutoReport) -> str:
    """The whole report."""
    title = report.chosen or "Keep the original"
    lines = [f"# {plain(title)}", "", plain(sentence(report.why)), ""]
    lines += [f"- {plain(line)}" for line in _facts(report)]
    lines += ["", "## What was tried", "", *_tried(report), "", *_reasons(report)]
    lines += ["", "## What the next rung would give", "", plain(report.next)]
    if report.stopped is not None:
        lines += ["", plain(report.stopped)]
    lines += ["", "## What it cost", "", *_cost(report)]
    lines += ["", "## How it was measured", "", *(f"- {plain(t)}" for t in _method(report))]
    lines += ["", "## Repeat it", "", *_commands(report)]
    return "\n".join(lines) + "\n"


def html(report: AutoReport) -> str:
    """The same as one page."""
    title = f"{report.chosen or 'Keep the original'}: {report.model}"
    decision = report.decision.replace(" ", "-")
    parts = {"decision": decision, "body": markdown_body(markdown(report))}
    return render_page(_TEMPLATE, title, parts)


def _facts(report: AutoReport) -> Iterator[str]:
    yield f"model: {report.model}"
    if report.chosen is not None:
        yield f"folder: {report.output}"
    yield f"asked for: {' and '.join(report.bounds)}"
    if report.limits:
        yield f"limits: {'; '.join(report.limits)}"
    for note in report.notes:
        yield f"note: {note}"


def _tried(report: AutoReport) -> list[str]:
    """A row for the original and for every rung."""
    rows = [original_cells(report.baseline, report.baseline_spent)]
    rows += [cells(rung) for rung in report.rungs]
    return _rows(*without_empty(rows), [f"**{plain(report.chosen)}**" if report.chosen else "", ""])


def _rows(
    columns: Sequence[str], rows: Sequence[Sequence[str]], marked: Sequence[str] = ()
) -> list[str]:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        texts = [plain(cell) for cell in row]
        if f"**{texts[0]}**" in marked:
            texts[0] = f"**{texts[0]}**"
        lines.append(f"| {' | '.join(texts)} |")
    return lines


def _reasons(report: AutoReport) -> list[str]:
    return [
        f"- **{plain(r.name)}** ({plain(r.stage)}), {r.outcome}: {plain(r.why.removesuffix('.'))}."
        for r in report.rungs
    ]


def _cost(report: AutoReport) -> list[str]:
    made = [(r.name, r.measured) for r in report.rungs if r.measured is not None]
    rows = [[ORIGINAL, *_spent(Spent()), *_spent(report.baseline_spent)]]
    rows += [[name, *_spent(m.quantizing), *_spent(m.measuring)] for name, m in made]
    quantizing = sum((m.quantizing for _, m in made), Spent())
    measuring = sum((m.measuring for _, m in made), report.baseline_spent)
    rows.append(["all", *_spent(quantizing), *_spent(measuring)])
    return _rows(("rung", "quantizing", "CPU s", "measuring", "CPU s"), rows)


def _spent(spent: Spent) -> tuple[str, str]:
    return (duration(spent.wall), f"{spent.cpu:,.1f}") if spent.wall else (ABSENT, ABSENT)


def _method(report: AutoReport) -> Iterator[str]:
    split = report.split
    yield f"Division: {split.how}."
    if split.shared:
        yield f"{split.shared:,} documents were left out of the held-out part, because the calibration text has them too."
    yield (
        f"Calibration: {report.calibration_windows:,} windows of {report.calibration_window:,} tokens of "
        f"{_documents(split.calibration)} (rows sha256 {split.calibration.rows_sha256[:16]}…)."
    )
    windows = "windows of answers, of at most" if split.chats else "windows of"
    judged, there = report.heldout_windows, report.heldout_windows_available
    yield (
        f"Held out: {f'all {judged:,}' if judged == there else f'the first {judged:,} of {there:,}'} {windows} "
        f"{report.heldout_window:,} tokens of {_documents(split.heldout)} (rows sha256 {split.heldout.rows_sha256[:16]}…); nothing else was done with them."
    )
    overlaps = [m.overlap for r in report.rungs if (m := r.measured) and m.overlap is not None]
    if overlaps:
        yield f"At most {100 * max(overlaps):.2g} % of the calibration windows' runs of 13 tokens stand in the held-out part."
    shared = (
        f"The level is {report.alpha:g}"
        if report.looks == 1
        else f"The level of {report.alpha:g} is shared by the {report.looks} rungs that could be tried: {report.alpha_each:.3g} for each"
    )
    yield (
        f"A bound is met if the upper confidence limit of the loss is not above it. {shared}. So the probability that the chosen model's "
        f"true loss is above the bound is at most {report.alpha:g}, on text like this."
    )
    yield (
        f"{report.hardware.processor}, {counted(report.hardware.threads, 'thread')}; "
        + ", ".join(f"{name} {version}" for name, version in report.versions.items())
    )


def _documents(part: Part) -> str:
    return "1 document" if part.documents == 1 else f"{part.documents:,} documents"


def _commands(report: AutoReport) -> list[str]:
    lines = ["The search:", "", "```sh", report.command, "```"]
    if report.evaluate is not None:
        lines += ["", "The chosen model's numbers:", "", "```sh", report.evaluate, "```"]
    return lines
