"""``llmquant quantize``: a model in, a proved folder out. Options override the recipe; the result
is kept as recipe.yaml."""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from llmquant.cli.commands.allocate import Engine, allocated, widths_of
from llmquant.cli.method import parse_method
from llmquant.cli.options import CalibrationDtypeOption, DeviceOption, ThreadsOption
from llmquant.cli.overrides import recipe_of, with_rotation
from llmquant.cli.progress import progress
from llmquant.cli.result import result_as_dict, show_result
from llmquant.cli.sizes import parse_size
from llmquant.cli.stopping import stoppable
from llmquant.errors import UsageError


class Packing(StrEnum):
    concat = "concat"
    sample = "sample"


class ActOrder(StrEnum):
    static = "static"
    off = "off"
    group = "group"


def quantize_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub name.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to make.")],
    recipe: Annotated[
        str | None, typer.Option(help="Recipe file, or a name from `llmquant recipes`.")
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="rtn or gptq; awq+ before it scales channels, +tune behind it optimizes whole blocks."
        ),
    ] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8.")] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Weights that share a scale; -1: one scale per row.")
    ] = None,
    sym: Annotated[
        bool | None, typer.Option("--sym/--asym", help="Without or with zero-points.")
    ] = None,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate", help="Rotate the model first, folded into the weights."
        ),
    ] = None,
    target_bpw: Annotated[
        float | None,
        typer.Option(
            help="Choose each linear's scheme for this size first, as `llmquant allocate` does."
        ),
    ] = None,
    engine: Annotated[
        Engine | None, typer.Option(help="With --target-bpw: only schemes that it takes.")
    ] = None,
    act_order: Annotated[ActOrder | None, typer.Option(help="GPTQ's column order.")] = None,
    layout: Annotated[
        str | None, typer.Option("--format", help="Byte layout of the result; see docs/formats.md.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="Text: file:PATH, jsonl:PATH#FIELD, hf:NAME[:CONFIG]:SPLIT[:FIELD]."),
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    packing: Annotated[
        Packing | None, typer.Option(help="Windows across rows, or one row each.")
    ] = None,
    all_experts: Annotated[
        bool | None,
        typer.Option(
            "--all-experts/--routed-experts", help="Calibrate a mixture's experts on every token."
        ),
    ] = None,
    eval_text: Annotated[
        str | None, typer.Option(help="Report how far calibration overlaps this text.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the calibration windows.")] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(help="Only linears that match, even ignored ones (repeatable)."),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave these alone, beside the recipe's (repeatable).")
    ] = None,
    device: DeviceOption = "auto",
    dtype: CalibrationDtypeOption = "auto",
    threads: ThreadsOption = None,
    base_model: Annotated[
        str | None, typer.Option(help="Name for the model card's base_model.")
    ] = None,
    max_shard_size: Annotated[int, typer.Option(help="Bytes per weight file.")] = 5_000_000_000,
    max_memory: Annotated[
        str | None,
        typer.Option(
            help="RAM to stay under, like 8GB, by keeping hidden states in files; default: what is there."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume/--no-resume",
            help="Continue what a killed run left, and keep what continuing takes.",
        ),
    ] = True,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew where a killed run could be continued.")
    ] = False,
    log: Annotated[
        Path | None,
        typer.Option(help="JSON line per linear and block; default: OUTPUT.quantize.log.jsonl."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing model folder.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as JSON and nothing else.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print only errors and warnings.")
    ] = False,
) -> None:
    """Quantize MODEL's linear layers and write a folder that engines load."""
    if max_shard_size < 1_000_000:
        raise UsageError(
            f"--max-shard-size {max_shard_size} is in bytes and must be at least 1000000"
        )
    limit = None if max_memory is None else parse_size("--max-memory", max_memory)
    changes: dict[str, Any] = {
        "weights.bits": bits,
        "weights.group_size": group_size,
        "weights.symmetric": sym,
        "gptq.act_order": act_order,
        "format": layout,
        "calibration.source": calibration,
        "calibration.nsamples": nsamples,
        "calibration.seqlen": seqlen,
        "calibration.packing": packing,
        "calibration.all_experts": all_experts,
        "seed": seed,
    }
    chosen = with_rotation(recipe_of(recipe, changes, include, ignore), rotate)
    if method is not None:
        chosen = parse_method(method).applied_to(chosen)
    if act_order is not None and chosen.method != "gptq":
        raise UsageError(
            f"--act-order is of GPTQ, and the method is {chosen.method}; leave one of them out"
        )
    from llmquant.checkpoint.atomic import check_destination
    from llmquant.planning.candidates import AllocateOptions
    from llmquant.quantization.run import Events, QuantizeOptions, quantize
    from llmquant.runtime.distributed import World, joined
    from llmquant.runtime.threads import set_threads

    set_threads(threads)
    world = World.of()
    quiet = quiet or not world.first

    if target_bpw is not None:
        if world.size > 1:
            raise UsageError(
                "--target-bpw chooses in one process; run `llmquant allocate` first and give its recipe"
            )
        if bits is not None or group_size is not None:
            raise UsageError(
                "--target-bpw chooses bits and group sizes itself; leave out --bits and --group-size"
            )
        check_destination(output.absolute(), overwrite)
        serving = engine or Engine.any
        wanted = AllocateOptions(
            target_bpw,
            widths_of(None, serving),
            symmetric=sym,
            engine=serving.value,
            device=device,
            dtype=dtype,
            evaluation=eval_text,
        )
        chosen = allocated(model, chosen, wanted, hidden=quiet or as_json).recipe
    elif engine is not None:
        raise UsageError("--engine limits what --target-bpw may choose; give both or neither")
    options = QuantizeOptions(
        device=device,
        dtype=dtype,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        base_model=base_model,
        evaluation=eval_text,
        resume=resume,
        restart=restart,
        max_memory=limit,
        world=world,
        log=log or output.absolute().with_name(f"{output.absolute().name}.quantize.log.jsonl"),
    )
    started = time.perf_counter()
    with joined(world), stoppable(), progress(hidden=quiet or as_json) as events:
        result = quantize(model, output, chosen, options, events if world.first else Events())
    seconds = time.perf_counter() - started
    if not world.first:
        return
    if as_json:
        sys.stdout.write(json.dumps(result_as_dict(result, seconds)) + "\n")
    elif not quiet:
        show_result(result, seconds)
    for warning in result.warnings:
        sys.stderr.write(f"warning: {warning}\n")
