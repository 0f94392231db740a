"""``llmquant quantize``: a model in, a proved folder out. Options override the recipe; the result
is kept as recipe.yaml."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquant.cli.commands.allocate.command import allocated
from llmquant.cli.costs import explain_default
from llmquant.cli.options import (
    ActOrderOption,
    AllExpertsOption,
    BaseModelOption,
    BitsOption,
    BudgetOption,
    CalibrationDtypeOption,
    CalibrationOption,
    DeviceOption,
    EmbeddingsOption,
    EngineOption,
    EvalTextOption,
    ExplainOption,
    FormatOption,
    GroupSizeOption,
    IgnoreOption,
    IncludeOption,
    JsonOption,
    LengthOption,
    LogOption,
    MemoryOption,
    MethodOption,
    ModelArgument,
    OutputOption,
    OverwriteOption,
    PackingOption,
    QuietOption,
    RecipeOption,
    RestartOption,
    ResumeOption,
    RotateOption,
    SamplesOption,
    SeedOption,
    ShardSizeOption,
    StoreDtypeOption,
    SymOption,
    ThreadsOption,
    check_log,
)
from llmquant.cli.overrides import check_together, default_of, options_for, recipe_of
from llmquant.cli.progress import progress
from llmquant.cli.result import result_as_dict, show_result
from llmquant.cli.sizes import check_shard_size, parse_size
from llmquant.cli.stopping import stoppable
from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant.planning.allocation.options import AllocateOptions
    from llmquant.planning.defaults import DefaultRecipe
    from llmquant.quantization.options import QuantizeOptions
    from llmquant.recipe import Recipe


def quantize_command(
    model: ModelArgument,
    output: OutputOption,
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
    calibration: CalibrationOption = None,
    nsamples: SamplesOption = None,
    seqlen: LengthOption = None,
    packing: PackingOption = None,
    all_experts: AllExpertsOption = None,
    eval_text: EvalTextOption = None,
    seed: SeedOption = None,
    include: IncludeOption = None,
    ignore: IgnoreOption = None,
    device: DeviceOption = "auto",
    dtype: CalibrationDtypeOption = "auto",
    store_dtype: StoreDtypeOption = "auto",
    threads: ThreadsOption = None,
    base_model: BaseModelOption = None,
    max_shard_size: ShardSizeOption = 5_000_000_000,
    max_memory: MemoryOption = None,
    resume: ResumeOption = True,
    restart: RestartOption = False,
    log: LogOption = None,
    overwrite: OverwriteOption = False,
    explain: ExplainOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Quantize MODEL and write a folder that engines load."""
    given, started = dict(locals()), time.perf_counter()
    check_shard_size(max_shard_size)
    default = default_of(given)
    if explain:
        explain_default(default, as_json=as_json)
        return
    chosen = recipe_of(given, default)
    check_together(given, chosen.method)
    options = _options(given, default)
    hidden = quiet or as_json or not options.world.first
    if target_bpw is None:
        _run(model, output, chosen, options, started, as_json=as_json, hidden=hidden)
        return
    from llmquant.planning.allocation.saved import saved_beside

    with saved_beside(output.absolute(), resume=resume, restart=restart) as state:
        wanted = options_for(target_bpw, engine, sym, options)
        wanted = replace(wanted, state=state, restart=restart)
        chosen = _allocated(model, output, chosen, options, wanted, hidden)
        _run(model, output, chosen, options, started, as_json=as_json, hidden=hidden)


def _options(given: Mapping[str, Any], default: DefaultRecipe | None) -> QuantizeOptions:
    """Where and how the run happens, from the command's parameters by name."""
    from llmquant.quantization.options import QuantizeOptions
    from llmquant.runtime.distributed import World
    from llmquant.runtime.threads import set_threads

    set_threads(given["threads"])
    limit, output, log = given["max_memory"], given["output"].absolute(), given["log"]
    check_log(log)
    same = (
        "device",
        "dtype",
        "store_dtype",
        "overwrite",
        "max_shard_size",
        "base_model",
        "resume",
        "restart",
    )
    return QuantizeOptions(
        **{name: given[name] for name in same},
        note=None if default is None else default.sentence,
        evaluation=given["eval_text"],
        max_memory=None if limit is None else parse_size("--max-memory", limit),
        world=World.of(),
        log=log or output.with_name(f"{output.name}.quantize.log.jsonl"),
    )


def _allocated(
    model: str,
    output: Path,
    recipe: Recipe,
    options: QuantizeOptions,
    wanted: AllocateOptions,
    hidden: bool,
) -> Recipe:
    """The recipe with each linear's scheme chosen as ``wanted`` says."""
    from llmquant.checkpoint.atomic import check_destination
    from llmquant.checkpoint.companions.originals import refuse_source
    from llmquant.data.sources import refuse_texts

    if options.world.size > 1:
        raise UsageError(
            "--target-bpw does not work with several processes; run `llmquant allocate` first and give its recipe"
        )
    check_destination(output.absolute(), options.overwrite)
    refuse_source(output.absolute(), model)
    refuse_texts(output.absolute(), recipe.calibration.source, options.evaluation)
    return allocated(model, recipe, wanted, hidden=hidden).recipe


def _run(
    model: str,
    output: Path,
    recipe: Recipe,
    options: QuantizeOptions,
    started: float,
    *,
    as_json: bool,
    hidden: bool,
) -> None:
    """Quantize, and say what came of it in the first of the processes. ``started``: when the
    command did, which may have chosen schemes since."""
    from transformers.utils import logging as transformers_logging

    from llmquant.quantization.options import Events
    from llmquant.runtime.distributed import joined
    from llmquant.training.stage import quantize

    transformers_logging.disable_progress_bar()  # of the models that a recipe's training loads
    with joined(options.world), stoppable(), progress(hidden=hidden) as events:
        result = quantize(
            model, output, recipe, options, events if options.world.first else Events()
        )
    seconds = time.perf_counter() - started
    if not options.world.first:
        return
    if as_json:
        sys.stdout.write(json.dumps(result_as_dict(result, seconds)) + "\n")
    elif not hidden:
        show_result(result, seconds)
    for warning in result.warnings:
        sys.stderr.write(f"warning: {warning}\n")
