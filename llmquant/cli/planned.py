"""What ``llmquant plan`` says, on a screen and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llmquant.cli.screen import fact_table, screen

if TYPE_CHECKING:
    from llmquant.planning.allocation.budget import Budget
    from llmquant.planning.forecast import DeviceFit, Forecast
    from llmquant.planning.preview import Plan
    from llmquant.planning.timing import Timing
    from llmquant.recipe import Recipe
    from llmquant.runtime.computing import Computing


def plan_as_dict(
    plan: Plan,
    recipe: Recipe,
    needs: Forecast,
    timing: Timing | None,
    computing: Computing,
    fit: DeviceFit | None,
) -> dict[str, Any]:
    """Everything, for machines."""
    from llmquant.planning.forecast import training_bytes

    return {
        "model_type": plan.model_type,
        "format": plan.format,
        "source_bytes": plan.source_bytes,
        "bytes_on_disk": plan.bytes_on_disk,
        "bits_per_weight": plan.bits_per_weight,
        "tensor_parallel": list(plan.tensor_parallel),
        "group_sizes_that_fit": list(plan.suggestions),
        "modules": [
            {"name": m.name, "scheme": str(m.scheme), "shape": list(m.shape), "bytes": m.nbytes}
            for m in plan.modules
        ],
        "skipped": dict(plan.skipped),
        "regrouped": [change.model_dump() for change in plan.regrouped],
        "engines": {engine: list(reasons) for engine, reasons in plan.engines.items()},
        "stored": plan.stored,
        "cautions": {engine: list(reasons) for engine, reasons in plan.cautions.items()},
        "kernels": {
            name: {"linears": count, "not": why} for name, (count, why) in plan.kernels.items()
        },
        "kernels_for": plan.kernels_for.as_dict(),
        "computing": computing.as_dict(),
        "peak_ram_bytes": needs.peak,
        "phases": dict(needs.phases),
        "hidden_states_bytes": needs.states,
        "replay_bytes": needs.replay,
        "device_bytes": needs.device_peak,
        "device_memory_bytes": fit and fit.memory,
        "device_fits": fit and fit.fits,
        "device_fits_with": fit and fit.change,
        "disk_bytes": needs.disk,
        "seconds": None if timing is None else timing.total,
        "training": None
        if recipe.qat is None
        else {
            "size": recipe.qat.size,
            "steps": recipe.qat.steps,
            "bytes": training_bytes(plan, recipe),
        },
        "notes": list(plan.notes),
    }


def needs_rows(
    needs: Forecast, timing: Timing | None, computing: Computing, fit: DeviceFit | None
) -> list[tuple[str, str]]:
    """Rows about how it would be quantized: on what, memory, disk and time."""
    worst = max(needs.phases, key=lambda phase: needs.phases[phase])
    states = (
        f"; {_size(needs.states)} of it are hidden states, which --max-memory can keep in files"
        if needs.states
        else ""
    )
    kept = (
        f"; {_size(needs.replay)} of it spare passes through a block, and are used only where there is room"
        if needs.replay
        else ""
    )
    rows = [("quantizing", computing.as_text())]
    rows.append(
        ("memory", f"about {_size(needs.peak)} at most, while {_DOING[worst]}{states}{kept}")
    )
    if fit is not None or not computing.device.startswith("cpu"):
        rows.append(_on_device(needs, computing, fit))
    rows.append(("disk", f"{_size(needs.disk)} while it runs, {_size(needs.output)} afterwards"))
    if timing is None:
        return [*rows, ("time", "not measured; --measure times two blocks here")]
    blocks = f"{timing.blocks} blocks, {timing.first:.1f} s for the first and {timing.later:.1f} s for the second"
    return [*rows, ("time", f"about {_spoken(timing.total)}: {blocks}")]


def training_rows(plan: Plan, recipe: Recipe) -> list[tuple[str, str]]:
    """What a recipe does after rounding, and that the rows about rounding leave it out."""
    from llmquant.planning.forecast import training_bytes

    if recipe.qat is None:
        return []
    kept = training_bytes(plan, recipe)
    more = f" takes {_size(kept)} of memory for {recipe.qat.size}, and" if kept else " takes"
    return [
        (
            "training",
            f"{recipe.qat.steps} steps follow, which memory, disk and time here leave out: training{more} "
            "room for a batch's activations and for the original's logits on disk (docs/qat.md)",
        )
    ]


def _on_device(needs: Forecast, computing: Computing, fit: DeviceFit | None) -> tuple[str, str]:
    """The row about a device's memory."""
    worst = max(needs.on_device, key=lambda phase: needs.on_device[phase])
    text = f"about {_size(needs.device_peak)} at most, while {_DOING[worst]}"
    if fit is None:
        return computing.device, text
    name = "GPU" if computing.device.startswith("cpu") else computing.device
    if fit.fits:
        return name, f"{text}: fits in {_size(fit.memory)}"
    way = f"it would with {fit.change}" if fit.change else "quantize on the CPU"
    return name, f"{text}: does not fit in {_size(fit.memory)}; {way}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"


_DOING = {
    "copying": "a tensor that stays as it is gets copied",
    "rounding": "the widest linear is rounded",
    "embedding": "the calibration text is embedded",
    "pass": "a block runs",
    "statistics": "inputs of the widest linear are observed",
    "tuning": "a block is tuned",
    "packing": "the embeddings are packed",
}


def _spoken(seconds: float) -> str:
    """A duration for people: the two largest units."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def show_plan(plan: Plan, modules: bool, needs: list[tuple[str, str]]) -> None:
    """The table of linears, one a row with ``modules``, and what is said below it."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("linear", "shape (out, in)", "scheme"):
        table.add_column(column, overflow="fold")
    for column in (*(() if modules else ("count",)), "MB", "bits/w"):
        table.add_column(column, justify="right")
    kinds: dict[tuple[str, str, str], list[int]] = {}
    for m in plan.modules:
        name = m.name if modules else m.name.rpartition(".")[2]
        kinds.setdefault((name, str(list(m.shape)), str(m.scheme)), []).append(m.nbytes)
    for (name, shape, scheme), sizes in kinds.items():
        weights = math.prod(json.loads(shape)) * len(sizes)
        table.add_row(
            name,
            shape,
            scheme,
            *(() if modules else (str(len(sizes)),)),
            f"{sum(sizes) / 1e6:,.2f}",
            f"{sum(sizes) * 8 / weights:.3f}",
        )
    console = screen()
    console.print(table)
    console.print()
    console.print(fact_table(_facts(plan, needs)))


def _facts(plan: Plan, needs: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """What is said of a plan below its linears, line by line."""
    from llmquant.formats.engines import answers

    yield "format", plan.format
    yield (
        "size",
        f"{plan.source_bytes / 1e6:,.2f} MB → {plan.bytes_on_disk / 1e6:,.2f} MB of weight files; "
        f"{plan.bits_per_weight:.3f} bits per quantized weight",
    )
    for change in plan.regrouped:
        yield "group size", str(change)
    yield from needs
    yield ("left alone", ", ".join(f"{n} ({why})" for n, why in plan.skipped.items()) or "none")
    yield (
        "tensor parallel",
        ", ".join(map(str, plan.tensor_parallel)) or "no size splits it evenly",
    )
    yield (
        "running",
        plan.kernels_for.as_text({name: count for name, (count, _) in plan.kernels.items()}),
    )
    for name, (_, why) in plan.kernels.items():
        if why:
            yield f"kernel {name}", why
    if plan.stored is not None:
        yield "stored", plan.stored
    yield from answers(plan.engines, plan.cautions)
    yield (
        "group sizes",
        f"{', '.join(map(str, plan.suggestions)) or 'none of 16 … 256'} fit every linear; -1 always",
    )
    for note in plan.notes:
        yield "note", note


def budget_as_dict(budget: Budget) -> dict[str, Any]:
    """What is known before schemes are chosen, for machines."""
    plan = budget.least
    return {
        "model_type": plan.model_type,
        "format": plan.format,
        "source_bytes": plan.source_bytes,
        "bytes_on_disk": budget.bytes_on_disk,
        "target_bpw": budget.target_bpw,
        "smallest": budget.smallest,
        "largest": budget.largest,
        "items": budget.items,
        "schemes": list(budget.schemes),
        "skipped": dict(plan.skipped),
        "regrouped": [change.model_dump() for change in plan.regrouped],
        "stored": plan.stored,
        "notes": list(plan.notes),
    }


def show_budget(budget: Budget) -> None:
    """The same for people, and what is not known yet."""
    plan = budget.least
    size = f"{plan.source_bytes / 1e6:,.2f} MB → at most {budget.bytes_on_disk / 1e6:,.2f} MB of weight files"
    bits = f"at most {budget.target_bpw:g} bits per selected weight"
    possible = f"possible: {math.ceil(budget.smallest * 1000) / 1000:.3f} to {budget.largest:.3f}"
    widths = ", ".join(dict.fromkeys(scheme.partition(" ")[0] for scheme in budget.schemes))
    rows = [
        ("format", plan.format),
        ("size", f"{size}; {bits} ({possible})"),
        (
            "schemes",
            f"the run measures on its text which of {widths} each of {budget.items} sets of linears gets",
        ),
        *(("group size", str(change)) for change in plan.regrouped),
        ("left alone", ", ".join(f"{n} ({why})" for n, why in plan.skipped.items()) or "none"),
        *([] if plan.stored is None else [("stored", plan.stored)]),
        (
            "not known",
            "memory, time and engines go by the schemes; `llmquant allocate` chooses them and writes a recipe, of which plan "
            "says the rest",
        ),
        *(("note", note) for note in plan.notes),
    ]
    screen().print(fact_table(rows))
