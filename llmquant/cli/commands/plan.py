"""``llmquant plan``: what a run would make and need, and what refuses it, before any weight is
read."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.costs import explain_default
from llmquant.cli.options import (
    ActOrderOption,
    AllExpertsOption,
    BitsOption,
    BudgetOption,
    CalibrationDtypeOption,
    CalibrationOption,
    DeviceOption,
    EmbeddingsOption,
    EngineOption,
    ExplainOption,
    FormatOption,
    GroupSizeOption,
    IgnoreOption,
    IncludeOption,
    JsonOption,
    LengthOption,
    MethodOption,
    ModelArgument,
    PackingOption,
    RecipeOption,
    RotateOption,
    SamplesOption,
    SeedOption,
    StoreDtypeOption,
    SymOption,
    ThreadsOption,
)
from llmquant.cli.overrides import check_together, default_of, options_for, recipe_of
from llmquant.cli.planned import (
    budget_as_dict,
    needs_rows,
    plan_as_dict,
    show_budget,
    show_plan,
    training_rows,
)
from llmquant.cli.sizes import parse_size
from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant.planning.defaults import DefaultRecipe
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
    target_bpw: BudgetOption = None,
    engine: EngineOption = None,
    act_order: ActOrderOption = None,
    layout: FormatOption = None,
    include: IncludeOption = None,
    ignore: IgnoreOption = None,
    calibration: CalibrationOption = None,
    nsamples: SamplesOption = None,
    seqlen: LengthOption = None,
    packing: PackingOption = None,
    all_experts: AllExpertsOption = None,
    seed: SeedOption = None,
    measure: _Measure = False,
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
    from llmquant.runtime.threads import set_threads
    from llmquant.training.beforehand import check_plan

    set_threads(threads)

    default = default_of(given)
    if explain:
        explain_default(default, as_json=as_json)
        return
    chosen = recipe_of(given, default)
    check_together(given, chosen.method)
    check_plan(model, chosen)
    if target_bpw is not None:
        _say_budget(given, chosen)
    else:
        _say_plan(given, chosen, default)


def _say_plan(given: Mapping[str, Any], chosen: Recipe, default: DefaultRecipe | None) -> None:
    """What a recipe makes of the model and needs."""
    from llmquant.planning.forecast import device_fit, forecast
    from llmquant.planning.preview import make_plan
    from llmquant.quantization.prepare import passes_dtype
    from llmquant.runtime.computing import Computing
    from llmquant.runtime.devices import device_memory, parse_device

    model, gpu_memory = given["model"], given["gpu_memory"]
    on, passes = parse_device(given["device"]), passes_dtype(chosen, given["dtype"])
    if gpu_memory is None:
        memory = device_memory(on)
    else:
        memory = parse_size("--gpu-memory", gpu_memory, least=1)
    plan = make_plan(model, chosen, given["store_dtype"], tokenizer=True)
    needs = forecast(plan, chosen, passes.itemsize)
    fit = None if memory is None else device_fit(plan, chosen, passes.itemsize, memory)
    computing = Computing.of(on, passes)
    timing = _timed(model, chosen, computing) if given["measure"] else None
    if given["as_json"]:
        facts = {"chosen_recipe": default.name if default else None}
        facts |= plan_as_dict(plan, chosen, needs, timing, computing, fit)
        sys.stdout.write(json.dumps(facts) + "\n")
    else:
        reason = [] if default is None else [("recipe", default.choice)]
        rows = [*needs_rows(needs, timing, computing, fit), *training_rows(plan, chosen)]
        show_plan(plan, given["modules"], [*reason, *rows])


def _say_budget(given: Mapping[str, Any], chosen: Recipe) -> None:
    """What is known of a run that chooses each linear's scheme for a size first."""
    from llmquant.planning.allocation.budget import plan_budget
    from llmquant.quantization.options import QuantizeOptions

    for name in ("measure", "modules", "gpu_memory"):
        if given[name]:
            raise UsageError(
                f"--{name.replace('_', '-')} needs each linear's scheme, which --target-bpw chooses on a text as it runs; "
                "leave it out, or plan the recipe that `llmquant allocate` writes"
            )
    run = QuantizeOptions(**{name: given[name] for name in ("device", "dtype", "store_dtype")})
    wanted = options_for(given["target_bpw"], given["engine"], given["sym"], run)
    budget = plan_budget(given["model"], chosen, wanted)
    if given["as_json"]:
        sys.stdout.write(json.dumps(budget_as_dict(budget)) + "\n")
    else:
        show_budget(budget)


def _timed(model: str, recipe: Recipe, computing: Computing) -> Timing:
    from llmquant.planning.timing import time_blocks
    from llmquant.quantization.options import QuantizeOptions

    options = QuantizeOptions(device=computing.device, dtype=computing.dtype)
    return time_blocks(model, recipe, options)
