"""What recipes are expected to cost, for ``llmquant recipes`` and ``--explain``."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from llmquant.cli.screen import fact_table, screen
from llmquant.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.table import Table

    from llmquant.planning.costs import Cost, SizeClass
    from llmquant.planning.defaults import DefaultRecipe


_BY_HEAD = {None: "", True: ", the head tied to the embeddings", False: ", a head of its own"}


def cost_line(name: str, classes: Sequence[SizeClass]) -> str:
    """What was measured of a recipe, by class."""
    measured = [f"{c.name}: {_cost(c.costs[name])}" for c in classes if name in c.costs]
    return "; ".join(measured) or "not measured"


def _cost(cost: Cost) -> str:
    return (
        f"KL {cost.kl:#.2g}, perplexity x{cost.perplexity_ratio:.3f}, {cost.cpu_seconds:.0f} CPU s"
    )


def class_lines(classes: Sequence[SizeClass]) -> list[tuple[str, str]]:
    """What the classes are called, what they are and where their numbers come from."""
    lines = []
    for c in classes:
        smaller = [o.below for o in classes if o.below and (not c.below or o.below < c.below)]
        above = max(smaller, default=0)
        limit = f"from {_count(above)} parameters" if above else ""
        if c.below is not None:
            limit = (
                f"{limit} to {_count(c.below)}" if above else f"below {_count(c.below)} parameters"
            )
        measured = f"{c.model}, {c.how} ({c.source})" if c.model else c.how
        lines.append((c.name, f"{limit}{_BY_HEAD[c.tied]}: {measured}"))
    return lines


def _count(parameters: int) -> str:
    return (
        f"{parameters // 10**9} billion"
        if parameters >= 10**9
        else f"{parameters // 10**6} million"
    )


def costs_as_dict(name: str, classes: Sequence[SizeClass]) -> dict[str, Any]:
    """Class → figures, or null."""
    return {c.name: asdict(c.costs[name]) if name in c.costs else None for c in classes}


def explain_default(default: DefaultRecipe | None, *, as_json: bool) -> None:
    """Print the default of a model, why it is that, and the alternatives.

    Raises:
        UsageError: None: the command line says how to quantize, so nothing was chosen.
    """
    if default is None:
        raise UsageError(
            "--explain shows which recipe is chosen where the command says nothing of how to quantize; leave out "
            "--recipe, --method, --bits, --group-size, --sym, --act-order and --target-bpw"
        )
    from llmquant.planning.defaults import CANDIDATES

    measured = default.size_class.costs
    costs = {n: measured.get(n) for n in (*CANDIDATES, *measured)}
    if as_json:
        sys.stdout.write(json.dumps(_default_as_dict(default, costs)) + "\n")
        return
    console = screen()
    console.print(fact_table(_default_facts(default)))
    console.print()
    console.print(_cost_table(default, costs))


def _default_as_dict(default: DefaultRecipe, costs: Mapping[str, Cost | None]) -> dict[str, Any]:
    size_class = default.size_class
    return {
        "recipe": default.name,
        "reason": default.reason,
        "parameters": default.parameters,
        "class": size_class.name,
        "measured_on": size_class.model,
        "how": size_class.how,
        "source": size_class.source,
        "alternatives": {n: None if c is None else asdict(c) for n, c in costs.items()},
        "refused": dict(default.refused),
        "unfit": dict(default.unfit),
        "limits": dict(default.limits),
        "unheld": dict(default.unheld),
    }


def _default_facts(default: DefaultRecipe) -> Iterator[tuple[str, str]]:
    from llmquant.planning.defaults import CANDIDATES, CLOSE

    size_class = default.size_class
    yield "recipe", default.name
    yield "because", default.reason
    yield (
        "rule",
        f"of {', '.join(CANDIDATES)} (smallest files first, then the quickest) the first with a KL of at most {CLOSE:g}, else the closest; "
        "none that vLLM's kernels refuse in this format, and no rotation of a tied head",
    )
    if size_class.model is not None:
        yield "measured", f"{size_class.model}, {size_class.how} ({size_class.source})"
    yield (
        "another",
        "--recipe NAME; `llmquant recipes` lists them, `llmquant eval` measures your model",
    )


def _cost_table(default: DefaultRecipe, costs: Mapping[str, Cost | None]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("recipe", "bits per weight", "KL", "perplexity ratio", "CPU s", ""):
        table.add_column(column, justify="left" if column in ("", "recipe") else "right")
    for name, cost in costs.items():
        figures = ["–"] * 4
        if cost is not None:
            figures = [
                f"{cost.bits_per_weight:.3f}",
                f"{cost.kl:#.2g}",
                f"{cost.perplexity_ratio:.3f}",
                f"{cost.cpu_seconds:.0f}",
            ]
        table.add_row(name, *figures, _note(name, default))
    return table


def _note(name: str, default: DefaultRecipe) -> str:
    notes = ["chosen"] if name == default.name else []
    if name in default.unheld:
        notes.append(f"not in format {default.format}: {default.unheld[name]}")
    if name in default.refused:
        notes.append(f"not in vLLM on a CPU: {default.refused[name]}")
    if name in default.unfit:
        notes.append(f"not for this model: {default.unfit[name]}")
    if name in default.limits:
        notes.append(f"not in transformers alone: {default.limits[name]}")
    return "; ".join(notes)
