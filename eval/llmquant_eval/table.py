"""One table for people: a row per model, what it lost beside what it costs.

Cells are rendered from the Report alone, so the table of a stored run is the table of the run. A standard error is
given to two digits and its value to the same place (``37.34 ±0.48``); more digits would be noise. In the terminal the
error stands under its value and the scheme under the model's name, so that all columns fit a hundred characters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmquant_eval.report import Metric, ModelResult, Report

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

ABSENT = "–"
_SHORTEST_NAME = 12  # characters to which the model column may shrink before the table is turned
HEADERS = (
    "perplexity", "ratio", "KL nats", "top-1 %", "bytes", "bits/w",
    "load", "prefill tok/s", "decode tok/s", "peak memory",
)  # fmt: skip


def with_error(value: float, error: float | None, scale: float = 1.0) -> tuple[str, str]:
    """``(value, ±error)``: the error at two significant digits, the value at the same decimal place.

    The second is empty where there is no error; a value without one is given four digits. Below a thousandth both take
    the value's power of ten.
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
    return (ABSENT, "") if metric is None else with_error(metric.value, metric.standard_error, scale)


def size(nbytes: float) -> str:
    """Bytes in decimal units, three digits."""
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
        metric_cell(m, "perplexity"), metric_cell(m, "perplexity_ratio"), metric_cell(m, "kl_mean"),
        metric_cell(m, "top1_agreement", 100.0), (size(result.bytes_on_disk), ""), (bits, ""),
    ]  # fmt: skip
    if cost is None:
        return cells + [(ABSENT, "")] * 4
    peak = cost.peak_memory_bytes if cost.device_peak_bytes is None else cost.device_peak_bytes
    last = [f"{cost.load_seconds:.2f} s", speed(cost.prefill_tokens_per_second), speed(cost.decode_tokens_per_second)]
    return cells + [(text, "") for text in [*last, size(peak)]]


def footnotes(report: Report) -> list[str]:
    """What the table's numbers mean: protocols, text, dtype, floor, excluded tokens."""
    text = report.text
    share = "all" if text.windows == text.windows_available else f"the first {text.windows} of {text.windows_available}"
    lines = [
        f"{', '.join(report.protocols)} on {text.source}: {share} windows of {text.window} tokens, "
        f"{report.settings.dtype} on {report.settings.device}; ± standard error by window, ratios paired."
    ]
    if report.noise_floor is not None:
        floor = report.noise_floor
        kl = " ".join(with_error(floor.kl_mean.value, floor.kl_mean.standard_error)).strip()
        lines.append(
            f"Noise floor, {report.reference} against itself in {floor.other_dtype}: KL {kl}, "
            f"top-1 {100 * floor.top1_agreement.value:.1f} % ({floor.kl_mean.windows} windows)."
        )
    lines += _cost_notes(report)
    lines += [
        f"{m.label}: {m.excluded_tokens} tokens with a divergence that is not finite are left out of its KL and top-1."
        for m in report.models
        if m.excluded_tokens
    ]
    return lines


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
        f"threads: {first.threads} ({report.hardware.processor}); peak memory {where}."
    ]


def render(report: Report, width: int) -> Group:
    """The run as one rich table with its footnotes.

    A row per model where ``width`` columns have room for it; in a narrower terminal a column per model, because a
    number cut in two is worse than a table turned.
    """
    from rich.console import Console, Group
    from rich.measure import Measurement
    from rich.text import Text

    table = _by_row(report.models)
    console = Console(width=10_000)
    if Measurement.get(console, console.options, table).minimum > width:
        table = _by_column(report.models)
    return Group(table, *(Text(line, style="dim") for line in footnotes(report)))


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def _by_row(models: Sequence[ModelResult]) -> Table:
    from rich.text import Text

    table = _table()
    table.add_column("model", overflow="fold", min_width=_SHORTEST_NAME)
    for header in HEADERS:
        table.add_column(header.replace(" ", "\n"), justify="right", no_wrap=True)
    for result in models:
        name = Text.assemble(result.label, "\n", (result.scheme, "dim"))
        table.add_row(name, *("\n".join(filter(None, pair)) for pair in row(result)))
    return table


def _by_column(models: Sequence[ModelResult]) -> Table:
    from rich.text import Text

    table = _table()
    table.add_column("model", no_wrap=True)
    for result in models:
        table.add_column(Text(f"{result.label}\n{result.scheme}"), justify="right", overflow="fold")
    for header, *pairs in zip(HEADERS, *map(row, models), strict=True):
        table.add_row(header, *(" ".join(filter(None, pair)) for pair in pairs))
    return table
