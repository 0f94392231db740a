"""``llmquant qat``: train the numbers of a quantized folder towards its original. What is not
quantized yet is quantized first."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquant.cli.commands.qat.options import (
    BatchOption,
    CacheOption,
    CheckpointingOption,
    ChecksOption,
    CodesRateOption,
    DataOption,
    HeldoutDataOption,
    HeldoutOption,
    HiddenLossOption,
    LengthOption,
    LogOption,
    LoraRateOption,
    MicroOption,
    NextLossOption,
    NormsOption,
    PatienceOption,
    PlotOption,
    RankOption,
    RateOption,
    ReferenceOption,
    SamplesOption,
    SeedOption,
    SizeOption,
    StartArgument,
    StepsOption,
    TemperatureOption,
    TopKOption,
)
from llmquant.cli.commands.qat.show import show_trained
from llmquant.cli.options import (
    DeviceOption,
    DtypeOption,
    EvalTextOption,
    FormatOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    RecipeOption,
    RestartOption,
    ThreadsOption,
    check_log,
)
from llmquant.cli.overrides import default_of
from llmquant.cli.progress import training_progress
from llmquant.cli.sizes import parse_size
from llmquant.cli.stopping import stoppable
from llmquant.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from llmquant.recipe import Recipe
    from llmquant.recipe_sections import QAT
    from llmquant.training.options import QatEvents, QatOptions, QatResult


KEYS = {
    "size": "size", "steps": "steps", "batch_size": "batch_size", "micro_batch": "micro_batch",
    "seqlen": "seqlen", "nsamples": "nsamples", "lr": "lr", "codes_lr": "codes_lr",
    "lora_lr": "lora_lr", "rank": "rank", "norms": "norms", "top_k": "top_k",
    "temperature": "temperature", "hidden_loss": "hidden_loss", "checks": "checks",
    "next_token_loss": "next_token_loss", "patience": "patience", "data": "source",
    "heldout": "heldout", "heldout_data": "heldout_source",
}  # fmt: skip
"""A parameter → the key of the recipe's section."""


def qat_command(
    model: StartArgument,
    output: OutputOption,
    reference: ReferenceOption = None,
    data: DataOption = None,
    recipe: RecipeOption = None,
    size: SizeOption = None,
    steps: StepsOption = None,
    batch_size: BatchOption = None,
    micro_batch: MicroOption = None,
    seqlen: LengthOption = None,
    nsamples: SamplesOption = None,
    lr: RateOption = None,
    codes_lr: CodesRateOption = None,
    lora_lr: LoraRateOption = None,
    rank: RankOption = None,
    norms: NormsOption = None,
    top_k: TopKOption = None,
    temperature: TemperatureOption = None,
    hidden_loss: HiddenLossOption = None,
    next_token_loss: NextLossOption = None,
    heldout: HeldoutOption = None,
    heldout_data: HeldoutDataOption = None,
    checks: ChecksOption = None,
    patience: PatienceOption = None,
    seed: SeedOption = None,
    layout: FormatOption = None,
    eval_text: EvalTextOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    threads: ThreadsOption = None,
    checkpointing: CheckpointingOption = None,
    max_cache: CacheOption = "4GB",
    restart: RestartOption = False,
    log: LogOption = None,
    plot: PlotOption = True,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Train a quantized MODEL towards its original.

    What comes out is a new folder. The same command resumes an interrupted run.
    On the held-out text the result is never worse than the start.
    """
    given = dict(locals())
    from transformers.utils import logging as transformers_logging

    from llmquant.checkpoint.detect import quantization_of
    from llmquant.checkpoint.hub import resolve
    from llmquant.checkpoint.reader import CheckpointReader
    from llmquant.runtime.distributed import World
    from llmquant.runtime.threads import set_threads

    transformers_logging.disable_progress_bar()
    set_threads(threads)
    first = World.of().first
    options, hidden = _options(given), quiet or as_json or not first
    packed = quantization_of(CheckpointReader(resolve(model))) is not None
    with stoppable(), training_progress(hidden=hidden) as events:
        if packed:
            facts, warnings = _trained(given, options, events)
        else:
            facts, warnings = _quantized_first(given, options, events)
    if not first:
        return
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    elif not quiet:
        show_trained(facts)
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")


def _section(given: Mapping[str, Any], start: QAT | None) -> QAT:
    """The recipe's section, or the default, with the options laid over it."""
    from pydantic import ValidationError

    from llmquant.recipe_sections import QAT

    asked = {
        key: value.value if isinstance(value, StrEnum) else value
        for option, key in KEYS.items()
        if (value := given[option]) is not None
    }
    try:
        return QAT.model_validate({**(start or QAT()).model_dump(), **asked})
    except ValidationError as e:
        names = {key: option.replace("_", "-") for option, key in KEYS.items()}
        problems = [
            f"--{names.get(str(p['loc'][0]), p['loc'][0])}: {p['msg']}"
            if p["loc"]
            else p["msg"].removeprefix("Value error, ")
            for p in e.errors()
        ]
        raise RecipeError("; ".join(problems)) from e


def _options(given: Mapping[str, Any]) -> QatOptions:
    from llmquant.training.options import QatOptions

    output: Path = given["output"].absolute()
    check_log(given["log"])
    return QatOptions(
        device=given["device"],
        dtype=given["dtype"],
        checkpointing=given["checkpointing"],
        evaluation=given["eval_text"],
        max_cache=parse_size("--max-cache", given["max_cache"]),
        overwrite=given["overwrite"],
        restart=given["restart"],
        log=given["log"] or output.with_name(f"{output.name}.qat.log.jsonl"),
        plot=output.with_name(f"{output.name}.qat.png") if given["plot"] else None,
    )


def _trained(
    given: Mapping[str, Any], options: QatOptions, events: QatEvents
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Train a folder that is quantized."""
    from llmquant.recipe import load_recipe
    from llmquant.training.run import qat

    if given["reference"] is None:
        raise UsageError(
            f"{given['model']} is quantized; give the original that it is trained towards with --reference"
        )
    named: Recipe | None = None if given["recipe"] is None else load_recipe(given["recipe"])
    if named is not None and named.qat is None:
        raise UsageError(
            f"recipe {given['recipe']} has no qat section, and {given['model']} is quantized already"
        )
    section = _section(given, None if named is None else named.qat)
    seed = given["seed"] if given["seed"] is not None else (named.seed if named else 0)
    result = qat(
        given["model"], given["output"], section, reference=given["reference"], seed=seed,
        layout=given["layout"], options=options, events=events,
    )  # fmt: skip
    return _facts(result), result.warnings


def _facts(result: QatResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "qat": result.record.model_dump(mode="json"),
        "heldout": [list(pair) for pair in result.heldout],
        "bits_per_weight": result.bits_per_weight,
        "bytes_written": result.bytes_written,
        "modules": result.modules,
        "resumed_steps": result.resumed,
        "seconds": result.seconds,
        "computing": result.computing.as_dict(),
        "computed": result.computing.as_text(),
        "warnings": list(result.warnings),
    }


def _quantized_first(
    given: Mapping[str, Any], options: QatOptions, events: QatEvents
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Quantize a model as a recipe says, then train it."""
    from llmquant.quantization.options import Events, QuantizeOptions
    from llmquant.recipe import load_recipe
    from llmquant.training.stage import quantize

    if given["reference"] not in (None, given["model"]):
        raise UsageError(
            f"{given['model']} is not quantized, so it is its own reference; leave --reference out"
        )
    if given["recipe"] is not None:
        recipe = load_recipe(given["recipe"])
    else:
        default = default_of({"model": given["model"], "layout": given["layout"]})
        assert default is not None  # no option says how to quantize
        events.on_note(default.sentence)
        recipe = default.recipe
    section = _section(given, recipe.qat)
    changes: dict[str, Any] = {"qat": section.model_dump()}
    if recipe.calibration.source is None and recipe.needs_text:
        changes["calibration.source"] = section.source
    if given["seed"] is not None:
        changes["seed"] = given["seed"]
    if given["layout"] is not None:
        changes["format"] = given["layout"]
    told = Events(
        on_note=events.on_note,
        on_warning=lambda w: events.on_note(f"warning: {w}"),
        on_progress=lambda p: events.on_phase(p.module, p.block, p.blocks),
    )
    where = QuantizeOptions(device=given["device"], store_dtype="auto")
    where = replace(where, overwrite=options.overwrite, restart=options.restart)
    done = quantize(
        given["model"], given["output"], recipe.updated(changes), where, told, (options, events)
    )
    assert done.trained is not None  # the recipe has a section
    facts = {
        "path": str(done.path),
        "qat": done.trained.model_dump(mode="json"),
        "bits_per_weight": done.bits_per_weight,
        "bytes_written": done.bytes_written,
        "modules": len(done.modules),
        "computing": done.computing.as_dict(),
        "computed": done.computing.as_text(),
        "warnings": list(done.warnings),
    }
    return facts, done.warnings
