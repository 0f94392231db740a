"""A finished run, for a reader and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmquant.cli.screen import fact_table, screen

if TYPE_CHECKING:
    from rich.console import Console

    from llmquant.quantization.options import QuantizeResult
    from llmquant.records import PairReport, TuneReport


def result_as_dict(result: QuantizeResult, seconds: float) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "path": str(result.path),
        "recipe": result.recipe.model_dump(mode="json"),
        "bits_per_weight": result.bits_per_weight,
        "source_bytes": result.source_bytes,
        "bytes_written": result.bytes_written,
        "seconds": seconds,
        "calibration": result.calibration.summary.as_dict() if result.calibration else None,
        "modules": [
            {
                "name": m.name,
                "scheme": m.spec,
                "weight_error": m.weight_error,
                "output_error": m.output_error,
                "damping": m.damping,
                "dead": m.dead,
                "tokens": m.tokens,
                "dropped": m.dropped,
                "seconds": m.seconds,
                "fallback": m.fallback,
            }
            for m in result.modules
        ],
        "tuned": {name: t.model_dump() for name, t in result.tuned.items()},
        "scaled": {
            name: [pair.model_dump() for pair in pairs] for name, pairs in result.scaled.items()
        },
        "skipped": dict(result.skipped),
        **({"qat": result.trained.model_dump(mode="json")} if result.trained else {}),
        "regrouped": [change.model_dump() for change in result.regrouped],
        "computing": result.computing.as_dict(),
        "resumed_blocks": result.resumed,
        "warnings": list(result.warnings),
    }


def _show_tuned(tuned: Mapping[str, TuneReport], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("tuned")
    for column in ("block error before", "after", "ratio", "kept step"):
        table.add_column(column, justify="right")
    for name, t in tuned.items():
        ratio = f"{t.after / t.before:.3f}" if t.before else "–"
        table.add_row(name, f"{t.before:.3e}", f"{t.after:.3e}", ratio, f"{t.step} of {t.steps}")
    console.print(table)


def _show_scaled(scaled: Mapping[str, tuple[PairReport, ...]], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("scaled for")
    for column in ("pairs", "error before", "after", "left alone"):
        table.add_column(column, justify="right")
    kinds: dict[tuple[str, ...], list[PairReport]] = {}
    for block, pairs in scaled.items():
        for pair in pairs:
            kinds.setdefault(tuple(r.removeprefix(f"{block}.") for r in pair.readers), []).append(
                pair
            )
    for readers, reports in kinds.items():
        measured = [
            (r.before, r.after) for r in reports if r.before is not None and r.after is not None
        ]
        means = [
            f"{sum(values) / len(measured):.2e}" for values in zip(*measured, strict=True)
        ] or ["–", "–"]
        left = [r.reason for r in reports if r.reason is not None]
        why = f"{len(left)} ({', '.join(sorted(set(left)))})" if left else "0"
        table.add_row(", ".join(readers), str(len(reports)), *means, why)
    console.print(table)


def _trained(result: QuantizeResult) -> list[tuple[str, str]]:
    t = result.trained
    if t is None:
        return []
    said = f"{t.options['size']}: held-out KL {t.before:.5f} → {t.after:.5f}, step {t.step} of {t.steps}"
    if t.options["size"] != "scales":
        said += f"; {t.codes_changed:,} of {t.codes:,} codes changed"
    return [("trained", said)]


def show_result(result: QuantizeResult, seconds: float) -> None:
    """Tables of what was done, and the sizes."""
    from rich.table import Table

    table = Table(title=f"{result.path}", title_justify="left", box=None, pad_edge=False)
    for column in ("linears", "scheme"):
        table.add_column(column)
    for column in ("count", "weight error", "output error, mean", "worst"):
        table.add_column(column, justify="right")
    kinds: dict[tuple[str, str], list[Any]] = {}
    for m in result.modules:
        kinds.setdefault((m.name.rpartition(".")[2], m.spec), []).append(m)
    for (leaf, spec), reports in kinds.items():
        outputs = [r.output_error for r in reports if r.output_error is not None]
        table.add_row(
            leaf,
            spec,
            str(len(reports)),
            f"{sum(r.weight_error for r in reports) / len(reports):.2e}",
            f"{sum(outputs) / len(outputs):.2e}" if outputs else "–",
            f"{max(outputs):.2e}" if outputs else "–",
        )
    console = screen()
    console.print(table)
    if result.scaled:
        _show_scaled(result.scaled, console)
    if result.tuned:
        _show_tuned(result.tuned, console)
    skipped = ", ".join(f"{n} ({why})" for n, why in result.skipped.items()) or "none"
    size = (
        f"{result.source_bytes / 1e6:,.2f} MB → {result.bytes_written / 1e6:,.2f} MB; "
        f"{result.bits_per_weight:.3f} bits per quantized weight"
    )
    rows = [
        ("left alone", skipped),
        *(("group size", str(change)) for change in result.regrouped),
        *_trained(result),
        ("size", size),
        ("computed", result.computing.as_text()),
        ("proved", "every tensor re-read from disk and equal to what was computed"),
        ("time", f"{seconds:.1f} s"),
    ]
    console.print()
    console.print(fact_table(rows))
