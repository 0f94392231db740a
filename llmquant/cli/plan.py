"""``llmquant plan``: what a run would make and what refuses it, before any weight is read."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.overrides import recipe_of, with_rotation
from llmquant.cli.screen import screen

if TYPE_CHECKING:
    from llmquant.plan import Plan


def plan_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    recipe: Annotated[str | None, typer.Option(help="Recipe file, or a name from `llmquant recipes`.")] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; -1: one scale per row.")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Without or with zero-points.")] = None,
    rotate: Annotated[
        bool | None, typer.Option("--rotate/--no-rotate", help="Rotate the model first, folded into the weights.")
    ] = None,
    layout: Annotated[str | None, typer.Option("--format", help="Byte layout of the result.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only linears that match, even ignored ones (repeatable).")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave these alone, beside the recipe's (repeatable).")] = None,
    modules: Annotated[bool, typer.Option("--modules", help="One row per linear.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show what quantizing MODEL would give, from its headers alone."""
    from llmquant.plan import make_plan

    changes = {"weights.bits": bits, "weights.group_size": group_size, "weights.symmetric": sym, "format": layout}
    plan = make_plan(model, with_rotation(recipe_of(recipe, changes, include, ignore), rotate))
    if as_json:
        sys.stdout.write(json.dumps(_as_dict(plan)) + "\n")
    else:
        _show(plan, modules)


def _as_dict(plan: Plan) -> dict[str, Any]:
    return {
        "model_type": plan.model_type,
        "format": plan.format,
        "source_bytes": plan.source_bytes,
        "bytes_on_disk": plan.bytes_on_disk,
        "bits_per_weight": plan.bits_per_weight,
        "tensor_parallel": list(plan.tensor_parallel),
        "group_sizes_that_fit": list(plan.suggestions),
        "modules": [
            {"name": m.name, "scheme": str(m.scheme), "shape": list(m.shape), "bytes": m.nbytes} for m in plan.modules
        ],
        "skipped": dict(plan.skipped),
        "engines": {engine: list(reasons) for engine, reasons in plan.engines.items()},
    }


def _show(plan: Plan, modules: bool) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("linear", "shape (out, in)", "scheme"):
        table.add_column(column, overflow="fold")
    for column in ("count", "MB", "bits per weight"):
        table.add_column(column, justify="right")
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for m in plan.modules:
        name = m.name if modules else m.name.rpartition(".")[2]
        kinds.setdefault((name, str(list(m.shape)), str(m.scheme)), []).append(m.nbytes)
    for (name, shape, scheme), sizes in kinds.items():
        weights = math.prod(json.loads(shape)) * len(sizes)
        table.add_row(name, shape, scheme, str(len(sizes)), f"{sum(sizes) / 1e6:,.2f}", f"{sum(sizes) * 8 / weights:.3f}")
    console = screen()
    console.print(table)
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    facts.add_row("format", plan.format)
    facts.add_row(
        "size", f"{plan.source_bytes / 1e6:,.2f} MB → {plan.bytes_on_disk / 1e6:,.2f} MB of weight files; "
        f"{plan.bits_per_weight:.3f} bits per quantized weight",
    )  # fmt: skip
    facts.add_row("left alone", ", ".join(f"{n} ({why})" for n, why in plan.skipped.items()) or "none")
    facts.add_row("tensor parallel", ", ".join(map(str, plan.tensor_parallel)) or "no size splits it evenly")
    for engine, reasons in plan.engines.items():
        facts.add_row(engine, "takes it" if not reasons else f"refuses it: {'; '.join(reasons)}")
    facts.add_row("group sizes", f"{', '.join(map(str, plan.suggestions)) or 'none of 16 … 256'} fit every linear; -1 always")
    console.print()
    console.print(facts)
