"""A bench in the terminal: what each model takes, then one table for each point."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquant_eval.report.table import ABSENT, size, speed
from llmquant_eval.report.terminal import plain_table, stdout_console
from llmquant_eval.report.words import counted
from llmquant_eval.speed.schema import ModelSpeed, PointSpeed, SpeedReport, Spread

if TYPE_CHECKING:
    from rich.table import Table


def show(report: SpeedReport) -> None:
    """Print it to stdout."""
    console = stdout_console(markup=False)
    console.print(_models(report))
    points = next((m.points for m in report.models if m.points), ())
    for index, at in enumerate(points):
        console.print()
        console.print(str(at.point), style="bold")
        console.print(_speeds(report, index))
    for line in _footnotes(report):
        console.print(line, style="dim")


def _models(report: SpeedReport) -> Table:
    table = plain_table()
    table.add_column("model", overflow="fold")
    table.add_column("scheme", overflow="fold")
    for header in ("size", "load s", "peak memory"):
        table.add_column(header, justify="right", overflow="fold")
    for model in report.models:
        load = ABSENT if model.load_seconds is None else _spread(model.load_seconds)
        table.add_row(model.label, model.scheme, size(model.bytes_on_disk), load, _peak(model))
    return table


def _speeds(report: SpeedReport, index: int) -> Table:
    table = plain_table()
    table.add_column("model", overflow="fold")
    for header in ("first\ntoken ms", "prefill\ntokens/s", "×", "decode\ntokens/s", "×"):
        table.add_column(header, justify="right", overflow="fold")
    for model in report.models:
        if model.points:
            table.add_row(model.label, *_cells(model.points[index]))
    return table


def _cells(at: PointSpeed) -> list[str]:
    milliseconds = Spread.of(1000 * v for v in at.first_token_seconds.values)
    return [
        _spread(milliseconds),
        _spread(at.prefill_tokens_per_second),
        _ratio(at.prefill_ratio),
        _spread(at.decode_tokens_per_second),
        _ratio(at.decode_ratio),
    ]


def _spread(spread: Spread) -> str:
    """The median, and below it from where to where the rounds reach."""
    text = speed(spread.median)
    if len(spread.values) > 1:
        text += f"\n{speed(spread.least)}–{speed(spread.most)}"
    return text


def _ratio(ratio: Spread | None) -> str:
    return ABSENT if ratio is None else _spread(ratio)


def _peak(model: ModelSpeed) -> str:
    peaks = [p.device_peak_bytes or p.peak_memory_bytes for p in model.points]
    return size(max(peaks, default=None))


def _footnotes(report: SpeedReport) -> list[str]:
    first, hardware = report.models[0], report.hardware
    where = hardware.accelerator or f"{hardware.processor}, {counted(hardware.threads, 'thread')}"
    dtypes = ", ".join(sorted({m.dtype for m in report.models if m.dtype}))
    done, rounds = report.rounds_done, report.rounds
    lines = [
        f"{report.new_tokens} new tokens; the median of {counted(done, 'round')} in turn, from the least to the most below it; "
        f"× is to {first.label} within a round",
        f"{where}; {dtypes}" if dtypes else where,
    ]
    if done < rounds:
        lines.append(f"{rounds - done} of {rounds} rounds were not measured")
    for model in report.models:
        kernels = ", ".join(f"{name} for {n}" for name, n in model.kernels.items())
        lines += [f"{model.label}: kernel {kernels} linears"] if kernels else []
        lines += [f"{model.label} failed: {model.failure}"] if model.failure else []
    return lines
