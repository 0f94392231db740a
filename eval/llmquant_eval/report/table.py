"""One table for people: a row per model, what it lost beside what it costs.

Cells are rendered from the Report alone, so the table of a stored run is the table of the run. A
standard error is given to two digits and its value to the same place (``37.34 ±0.48``); more digits
would be noise. In the terminal the error stands under its value and the scheme under the model's
name, so that all columns fit a hundred characters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmquant_eval.report.results import Metric, ModelResult
from llmquant_eval.report.schema import Report
from llmquant_eval.report.words import counted

ABSENT = "–"
_DETAILS = (
    "kl_median",
    "kl_p",
    "kl_max",
    "rms_delta_p",
)  # metrics that the card shows, not the tables
HEADERS = (
    "perplexity", "ratio", "KL nats", "top-1 %", "bytes", "bits/w",
    "load", "prefill tok/s", "decode tok/s", "peak memory",
)  # fmt: skip


def with_error(value: float, error: float | None, scale: float = 1.0) -> tuple[str, str]:
    """``(value, ±error)``: the error at two significant digits, the value at the same decimal
    place.

    The second is empty where there is no error; a value without one is given four digits. Below a
    thousandth both take the value's power of ten.
    """
    value *= scale
    if error is None or error == 0.0:
        return f"{value:.4g}", ""
    error *= scale
    power = math.floor(math.log10(abs(value))) if value else 0
    unit, suffix = (10.0**power, f"e{power:03d}") if power < -3 else (1.0, "")
    value, error = value / unit, error / unit
    decimals = max(0, 1 - math.floor(math.log10(error)))
    return f"{value:.{decimals}f}{suffix}", f"±{error:.{decimals}f}{suffix}"


def metric_cell(metrics: dict[str, Metric], name: str, scale: float = 1.0) -> tuple[str, str]:
    """One metric and its standard error, or a dash."""
    metric = metrics.get(name)
    return (
        (ABSENT, "") if metric is None else with_error(metric.value, metric.standard_error, scale)
    )


def first_cell(metrics: dict[str, Metric], *names: str) -> tuple[str, str]:
    """The cell of whichever of ``names`` stands first: that of the run's first protocol."""
    return metric_cell(metrics, next((name for name in metrics if name in names), names[0]))


def size(nbytes: float | None) -> str:
    """Bytes in decimal units, three digits; a dash for None."""
    if nbytes is None:
        return ABSENT
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def speed(tokens_per_second: float) -> str:
    """Tokens per second, three digits or whole."""
    return f"{tokens_per_second:.0f}" if tokens_per_second >= 100 else f"{tokens_per_second:.3g}"


def row(result: ModelResult) -> list[tuple[str, str]]:
    """(value, ±error) under each of :data:`HEADERS`."""
    m, cost = result.metrics, result.cost
    bits = ABSENT if result.bits_per_weight is None else f"{result.bits_per_weight:.4g}"
    cells = [
        first_cell(m, "perplexity", "word_perplexity"),
        first_cell(m, "perplexity_ratio", "word_perplexity_ratio"),
        metric_cell(m, "kl_mean"),
        metric_cell(m, "top1_agreement", 100.0),
        (size(result.bytes_on_disk), ""),
        (bits, ""),
    ]
    if cost is None:
        return cells + [(ABSENT, "")] * 4
    peak = cost.peak_memory_bytes if cost.device_peak_bytes is None else cost.device_peak_bytes
    last = [
        f"{cost.load_seconds:.2f} s",
        speed(cost.prefill_tokens_per_second),
        speed(cost.decode_tokens_per_second),
    ]
    return cells + [(text, "") for text in [*last, size(peak)]]


@dataclass(frozen=True, slots=True)
class SideTable:
    """A small table of its own, by models: what has no column in the main one."""

    title: str
    headers: tuple[str, ...]
    rows: list[tuple[str, ...]]


def side_tables(report: Report) -> list[SideTable]:
    """Word and byte figures, further protocols, and tasks with their flips against the
    reference."""
    tables = []
    for number, part in enumerate(report.passes):
        names = dict.fromkeys(
            name
            for m in report.models
            for name, metric in m.metrics.items()
            if metric.protocol in (part.perplexity, part.divergence)
            and not name.startswith(_DETAILS)
        )
        if not names or (number == 0 and "perplexity" in names):
            continue  # a server answered none of it; or the main table has all of it
        rows = [
            (m.label, *(" ".join(metric_cell(m.metrics, name)).strip() for name in names))
            for m in report.models
        ]
        headers = tuple(name.partition("@")[0].replace("_", " ") for name in names)
        tables.append(SideTable(part.perplexity, headers, rows))
    for task in dict.fromkeys(t.task for m in report.models for t in m.tasks):
        tables.append(_task_table(report, task))
    return tables


def _task_table(report: Report, task: str) -> SideTable:
    results = {m.label: t for m in report.models for t in m.tasks if t.task == task}
    metrics = dict.fromkeys(name for t in results.values() for name in t.metrics)
    paired = dict.fromkeys(name for t in results.values() for name in t.paired)
    rows = []
    for label, result in results.items():
        cells = [
            " ".join(with_error(m.value, m.standard_error)).strip()
            for m in map(result.metrics.get, metrics)
            if m
        ]
        flips = [result.paired.get(name) for name in paired]
        cells += [f"-{p.lost} +{p.gained}, p={p.p_value:.2g}" if p else ABSENT for p in flips]
        rows.append((label, *cells))
    first = next(iter(results.values()))
    share = (
        f"{first.items}"
        if first.items == first.items_available
        else f"{first.items} of {first.items_available}"
    )
    title = f"task/{task}, {share} items, {first.few_shot}-shot, lm-eval {first.lm_eval}"
    return SideTable(title, (*metrics, *(f"{name} flips" for name in paired)), rows)


def _share(windows: int, available: int) -> str:
    return "all" if windows == available else f"the first {windows} of {available}"


def footnotes(report: Report) -> list[str]:
    """What the table's numbers mean: protocols, text, dtype, floor, cached reference, excluded
    tokens."""
    lines = []
    if report.text is not None:
        text, measured = report.text, [p for p in report.protocols if not p.startswith("task/")]
        lines.append(
            f"{', '.join(measured)} on {text.source}: {_share(text.windows, text.windows_available)} windows of "
            f"{_length(report, text.window)} tokens, {_where(report)}; ± standard error {_methods(report)}, ratios paired."
        )
        if lost := text.lost():
            lines.append(f"Not all of the text: {lost}.")
    elif report.protocols:
        lines.append(f"{', '.join(report.protocols)}: {_where(report)}; ± standard error.")
    lines += [
        f"{p.perplexity}: {_share(p.windows, p.windows_available)} windows, {p.scored} tokens scored."
        for p in report.passes[1:]
    ]
    lines += [f"NOT MEASURED: {gap.text()}. {gap.reason}" for gap in report.missing]
    if report.settings.dtype_reason is not None:
        lines.append(f"{report.settings.dtype} was chosen because {report.settings.dtype_reason}.")
    if report.noise_floor is not None:
        floor = report.noise_floor
        kl = " ".join(with_error(floor.kl_mean.value, floor.kl_mean.standard_error)).strip()
        lines.append(
            f"Noise floor, {report.reference} against itself in {floor.other_dtype}: KL {kl}, "
            f"top-1 {100 * floor.top1_agreement.value:.1f} % ({floor.kl_mean.windows} windows)."
        )
    lines += _kernel_notes(report)
    lines += _cost_notes(report)
    lines += [
        f"{m.label}: {e.protocol} against a cached reference ({e.form}); that form changed its KL by {e.mean:.1e} in the "
        f"mean and {e.largest:.1e} at most, over {e.positions} positions kept exactly."
        for m in report.models
        for e in m.cache_errors
    ]
    lines += [
        f"{m.label}: {m.excluded_tokens} tokens with a divergence that is not finite are left out of its KL and top-1."
        for m in report.models
        if m.excluded_tokens
    ]
    return lines


def _length(report: Report, window: int) -> str:
    """Tokens of a window: only ``ppl/gptq`` has no shorter ones."""
    whole = all(p.startswith("ppl/gptq-") for p in report.protocols if p.startswith("ppl/"))
    return f"{window}" if whole else f"at most {window}"


def _where(report: Report) -> str:
    return f"{report.settings.dtype} on {report.settings.device}, {counted(report.hardware.threads, 'thread')}"


def _methods(report: Report) -> str:
    used = {
        f"by {m.error_method.removeprefix('by ')}"
        for model in report.models
        for m in model.metrics.values()
        if m.error_method is not None
    }
    return " or ".join(sorted(used, reverse=True)) or "by window"


def _kernel_notes(report: Report) -> list[str]:
    """Which kernels multiplied packed weights: the speed, and for one that rounds activations the
    loss, depend on it."""
    models: dict[str, list[str]] = {}
    for m in report.models:
        if m.kernels:
            models.setdefault(", ".join(m.kernels), []).append(m.label)
    return [f"Kernel of packed layers, {', '.join(labels)}: {k}." for k, labels in models.items()]


def _cost_notes(report: Report) -> list[str]:
    costs = [m.cost for m in report.models if m.cost is not None]
    if not costs:
        return []
    first = costs[0]
    where = "on the accelerator" if first.device_peak_bytes is not None else (
        f"of the whole process, {size(first.memory_floor_bytes)} of it before the model"
    )  # fmt: skip
    return [
        f"Speed at batch 1, prompt of {first.prompt_tokens} and {first.new_tokens} new tokens, "
        f"{counted(first.threads, 'thread')} ({report.hardware.processor}); peak memory {where}."
    ]
