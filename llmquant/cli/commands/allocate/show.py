"""An allocation, as a table, as JSON and as a recipe file."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from llmquant.cli.screen import fact_table, screen

if TYPE_CHECKING:
    from rich.table import Table

    from llmquant.planning.allocation.allocate import Allocation


def as_dict(result: Allocation) -> dict[str, Any]:
    return {
        "target_bpw": result.target_bpw,
        "bits_per_weight": result.bits_per_weight,
        "smallest": result.smallest,
        "largest": result.largest,
        "predicted": result.predicted,
        "unit": result.unit,
        "gap": result.gap,
        "recipe": result.recipe.model_dump(mode="json"),
        "items": [
            {
                "names": list(i.names),
                "scheme": i.label,
                "bytes": i.nbytes,
                "bits_per_weight": 8 * i.nbytes / i.weights,
                "damage": i.damage,
                "layer_error": i.layer,
                "next": i.next_scheme,
                "gain_per_mb": i.gain,
            }
            for i in result.items
        ],
    }


def show(result: Allocation) -> None:
    """The table, and what it adds up to."""
    console = screen()
    console.print(_table(result))
    proof = (
        "proved optimal for these predictions"
        if result.gap < 1e-5
        else f"within {100 * result.gap:.2g} % of the optimum"
    )
    size = (
        f"{result.bits_per_weight:.4f} bits per selected weight of {result.target_bpw:g} allowed "
        f"(possible: {result.smallest:.3f} to {result.largest:.3f})"
    )
    predicted = f"{result.predicted:.3e} {result.unit} altogether; {proof}"
    console.print()
    console.print(fact_table([("size", size), ("predicted", predicted)]))


def _table(result: Allocation) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("linears", "scheme"):
        table.add_column(column, overflow="fold")
    for column in ("bytes", "bits", "damage", "next larger", "saves per MB"):
        table.add_column(column, justify="right")
    for item in result.items:
        table.add_row(
            short(item.names),
            item.label,
            f"{item.nbytes:,}",
            f"{8 * item.nbytes / item.weights:.3f}",
            f"{item.damage:.2e}",
            item.next_scheme or "–",
            "–" if item.gain is None else f"{item.gain:.2e}",
        )
    return table


def short(names: tuple[str, ...]) -> str:
    """``layers.0.self_attn.q_proj + k_proj + v_proj``."""
    first, *others = names
    return " + ".join([first.removeprefix("model."), *(n.rpartition(".")[2] for n in others)])


def recipe_text(result: Allocation) -> str:
    """The recipe as YAML, an override a line, with the table above it as a comment."""
    import yaml
    from rich.console import Console

    page = io.StringIO()
    Console(file=page, width=110, markup=False, emoji=False, highlight=False).print(_table(result))
    comment = [
        f"{result.bits_per_weight:.4f} bits per selected weight of {result.target_bpw:g} allowed; predicted damage "
        f"{result.predicted:.3e} {result.unit}.",
        "",
        *(line.rstrip() for line in page.getvalue().splitlines()),
    ]
    lines = [f"# {line}".rstrip() for line in comment]
    for key, value in result.recipe.model_dump(mode="json").items():
        if key in ("overrides", "ignore") and value:
            entries = (
                yaml.safe_dump(_given(v), default_flow_style=True, sort_keys=False, width=1000)
                for v in value
            )
            lines += [
                f"{key}:",
                *(f"- {entry.removesuffix('...' + chr(10)).strip()}" for entry in entries),
            ]
        else:
            lines.append(
                yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).rstrip("\n")
            )
    return "\n".join(lines) + "\n"


def _given(value: Any) -> Any:
    return {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
