"""``llmquant plan``: what a run would make and need, and what refuses it, before any weight is
read."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.costs import explain_default
from llmquant.cli.options import (
    BitsOption,
    CalibrationDtypeOption,
    CalibrationOption,
    DeviceOption,
    EmbeddingsOption,
    ExplainOption,
    FormatOption,
    GroupSizeOption,
    IgnoreOption,
    IncludeOption,
    JsonOption,
    LengthOption,
    MethodOption,
    ModelArgument,
    RecipeOption,
    RotateOption,
    SamplesOption,
    StoreDtypeOption,
    SymOption,
    ThreadsOption,
)
from llmquant.cli.overrides import default_of, recipe_of
from llmquant.cli.screen import fact_table, screen
from llmquant.cli.sizes import parse_size

if TYPE_CHECKING:
    from llmquant.planning.forecast import DeviceFit, Forecast
    from llmquant.planning.preview import Plan
    from llmquant.planning.timing import Timing
    from llmquant.recipe import Recipe
    from llmquant.runtime.computing import Computing


_Measure = Annotated[
    bool,
    typer.Option(
        "--measure",
        help="Time two blocks on this machine (reads their weights; may need --calibration).",
    ),
]
_GpuMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Say whether quantizing fits on a GPU with so much memory, as 24GiB [default: the GPU's of --device].",
        show_default=False,
    ),
]
_Modules = Annotated[bool, typer.Option("--modules", help="One row per linear.")]


def plan_command(
    model: ModelArgument,
    recipe: RecipeOption = None,
    method: MethodOption = None,
    bits: BitsOption = None,
    group_size: GroupSizeOption = None,
    sym: SymOption = None,
    embeddings: EmbeddingsOption = None,
    rotate: RotateOption = None,
    layout: FormatOption = None,
    include: IncludeOption = None,
    ignore: IgnoreOption = None,
    nsamples: SamplesOption = None,
    seqlen: LengthOption = None,
    measure: _Measure = False,
    calibration: CalibrationOption = None,
    device: DeviceOption = "auto",
    gpu_memory: _GpuMemory = None,
    dtype: CalibrationDtypeOption = "auto",
    store_dtype: StoreDtypeOption = "auto",
    threads: ThreadsOption = None,
    modules: _Modules = False,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show what quantizing MODEL gives and needs, before a run.

    Size, memory, disk, time and what refuses it. Reads the headers of the weight files only.
    """
    given = dict(locals())
    from llmquant.planning.forecast import device_fit, forecast
    from llmquant.planning.preview import make_plan
    from llmquant.runtime.computing import Computing
    from llmquant.runtime.devices import CALIBRATION, device_memory, parse_device, parse_dtype
    from llmquant.runtime.threads import set_threads

    set_threads(threads)

    default = default_of(given)
    if explain:
        explain_default(default, as_json=as_json)
        return
    chosen = recipe_of(given, default)
    on, passes = parse_device(device), parse_dtype(dtype, auto=CALIBRATION)
    memory = device_memory(on) if gpu_memory is None else parse_size("--gpu-memory", gpu_memory)
    plan = make_plan(model, chosen, store_dtype, tokenizer=True)
    needs = forecast(plan, chosen, passes.itemsize)
    fit = None if memory is None else device_fit(plan, chosen, passes.itemsize, memory)
    computing = Computing.of(on, passes)
    timing = _timed(model, chosen, computing) if measure else None
    if as_json:
        facts = {"chosen_recipe": default.name if default else None}
        facts |= _as_dict(plan, needs, timing, computing, fit)
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        reason = [] if default is None else [("recipe", default.sentence)]
        _show(plan, modules, [*reason, *_needs(needs, timing, computing, fit)])


def _timed(model: str, recipe: Recipe, computing: Computing) -> Timing:
    from llmquant.planning.timing import time_blocks
    from llmquant.quantization.options import QuantizeOptions

    options = QuantizeOptions(device=computing.device, dtype=computing.dtype)
    return time_blocks(model, recipe, options)


def _as_dict(
    plan: Plan, needs: Forecast, timing: Timing | None, computing: Computing, fit: DeviceFit | None
) -> dict[str, Any]:
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
        "notes": list(plan.notes),
    }


def _needs(
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


def _show(plan: Plan, modules: bool, needs: list[tuple[str, str]]) -> None:
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
