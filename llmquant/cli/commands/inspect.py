"""``llmquant inspect``: what a folder holds, and with ``--verify`` whether it is still what was
written."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.screen import fact_table, screen
from llmquant.errors import LlmquantError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from llmquant.checkpoint.inspect import Inspection


def inspect_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Re-hash every file and re-read every packed weight.")
    ] = False,
    modules: Annotated[
        bool, typer.Option("--modules", help="One row per quantized linear.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show what is quantized in MODEL and how."""
    from llmquant.checkpoint.inspect import inspect

    found = inspect(model)
    if verify:
        from llmquant.checkpoint.manifest import verify as check

        check(found.path)
    notes, refusal = _loads(found.path)
    if as_json:
        sys.stdout.write(json.dumps(_as_dict(found, verify, notes)) + "\n")
    else:
        _show(found, verify, modules, notes)
    # What stands in the headers was shown; that nothing here can load it is an error all the same.
    if refusal is not None:
        raise refusal


def _loads(path: Path) -> tuple[Sequence[str], LlmquantError | None]:
    """What loading the folder would say of it, and why it would refuse it; ONNX Runtime loads an
    export."""
    from llmquant.checkpoint.weights.exported import is_onnx
    from llmquant.models.reading.check import check_loading

    if is_onnx(path):
        return (), None
    try:
        return check_loading(path), None
    except LlmquantError as e:
        return (), e


def _as_dict(found: Inspection, verified: bool, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "model_type": found.model_type,
        "format": found.format,
        "scheme": found.scheme,
        "bytes_on_disk": found.bytes_on_disk,
        "parameters": found.parameters,
        "linears": found.linears,
        "quantized": found.quantized,
        "embeddings": found.embeddings,
        "coverage": found.coverage,
        "bits_per_weight": found.bits_per_weight,
        "weights_sha256": found.weights_sha256,
        "recipe_sha256": found.recipe_sha256,
        "verified": verified or None,
        "engines": {engine: list(reasons) for engine, reasons in found.engines.items()},
        "cautions": {engine: list(reasons) for engine, reasons in found.cautions.items()},
        "fallbacks": list(found.fallbacks),
        "regrouped": [change.model_dump() for change in found.regrouped],
        "notes": list(notes),
        "modules": [
            {"name": m.name, "scheme": m.scheme, "shape": list(m.shape), "bytes": m.nbytes}
            for m in found.modules
        ],
    }


def _show(found: Inspection, verified: bool, modules: bool, notes: Sequence[str]) -> None:
    from rich.table import Table

    console = screen()
    console.print(fact_table(_facts(found, verified, notes)))
    if not found.modules:
        return
    table = Table(box=None, pad_edge=False)
    for column in ("linear", "shape (out, in)", "scheme"):
        table.add_column(column, overflow="fold")
    for column in (*(() if modules else ("count",)), "bits/w"):
        table.add_column(column, justify="right")
    rows = Counter(
        (
            m.name if modules else m.name.rpartition(".")[2],
            str(list(m.shape)),
            m.scheme,
            f"{m.bits_per_weight:.3f}",
        )
        for m in found.modules
    )
    for (name, shape, scheme, size), count in rows.items():
        table.add_row(name, shape, scheme, *(() if modules else (str(count),)), size)
    console.print()
    console.print(table)


def _facts(found: Inspection, verified: bool, notes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """What is said of the whole folder, line by line."""
    from llmquant.formats.engines import answers

    yield "model", f"{found.path} ({found.model_type})"
    yield "format", found.format or "not quantized"
    yield "scheme", found.scheme
    yield "linears", f"{found.quantized} of {found.linears} quantized"
    if found.embeddings is not None:
        yield "embeddings", found.embeddings
    yield "coverage", f"{found.coverage:.1%} of {found.parameters:,} parameters"
    if found.bits_per_weight is not None:
        yield "size", f"{found.bits_per_weight:.3f} bits per quantized weight"
    yield "on disk", f"{found.bytes_on_disk / 1e6:,.2f} MB of weight files"
    yield "sha256", found.weights_sha256
    yield from answers(found.engines, found.cautions)
    for change in found.regrouped:
        yield "group size", str(change)
    for note in found.fallbacks:
        yield "fallback", note
    for note in notes:
        yield "note", note
    if verified:
        yield "verified", "every file and every packed weight is what was written"
