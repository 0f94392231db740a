"""``llmquant quantize``: a model in, a proved folder out. Options override the recipe; the result is kept as recipe.yaml."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.allocate import Engine, show, widths_of
from llmquant.cli.method import parse_method
from llmquant.cli.overrides import recipe_of, with_rotation
from llmquant.cli.screen import screen
from llmquant.cli.sizes import parse_size
from llmquant.cli.stopping import stoppable
from llmquant.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llmquant.calibration import Calibration
    from llmquant.pipeline import Events, QuantizeResult
    from llmquant.scaling import PairReport
    from llmquant.tuning import TuneReport
    from llmquant.walkplan import Progress as Where


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
    recipe: Annotated[str | None, typer.Option(help="Recipe file, or a name from `llmquant recipes`.")] = None,
    method: Annotated[
        str | None, typer.Option(help="rtn or gptq; awq+ before it scales channels, +tune behind it optimizes whole blocks.")
    ] = None,
    bits: Annotated[int | None, typer.Option(help="2, 3, 4 or 8.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Weights that share a scale; -1: one scale per row.")] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Without or with zero-points.")] = None,
    rotate: Annotated[
        bool | None, typer.Option("--rotate/--no-rotate", help="Rotate the model first, folded into the weights.")
    ] = None,
    target_bpw: Annotated[
        float | None, typer.Option(help="Choose each linear's scheme for this size first, as `llmquant allocate` does.")
    ] = None,
    engine: Annotated[Engine | None, typer.Option(help="With --target-bpw: only schemes that it takes.")] = None,
    act_order: Annotated[ActOrder | None, typer.Option(help="GPTQ's column order.")] = None,
    layout: Annotated[str | None, typer.Option("--format", help="Byte layout of the result; see docs/formats.md.")] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text: file:PATH, jsonl:PATH#FIELD, hf:NAME[:CONFIG]:SPLIT[:FIELD].")
    ] = None,
    nsamples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens per window.")] = None,
    packing: Annotated[Packing | None, typer.Option(help="Windows across rows, or one row each.")] = None,
    all_experts: Annotated[
        bool | None, typer.Option("--all-experts/--routed-experts", help="Calibrate a mixture's experts on every token.")
    ] = None,
    eval_text: Annotated[str | None, typer.Option(help="Report how far calibration overlaps this text.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the calibration windows.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Only linears that match, even ignored ones (repeatable).")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="Leave these alone, beside the recipe's (repeatable).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 …")] = "cpu",
    dtype: Annotated[str, typer.Option(help="Of calibration passes: auto (float32), bfloat16, float16.")] = "auto",
    base_model: Annotated[str | None, typer.Option(help="Name for the model card's base_model.")] = None,
    max_shard_size: Annotated[int, typer.Option(help="Bytes per weight file.")] = 5_000_000_000,
    max_memory: Annotated[
        str | None, typer.Option(help="RAM to stay under, like 8GB, by keeping hidden states in files; default: what is there.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Continue what a killed run left, and keep what continuing takes.")
    ] = True,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew where a killed run could be continued.")] = False,
    log: Annotated[
        Path | None, typer.Option(help="JSON line per linear and block; default: OUTPUT.quantize.log.jsonl.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model folder.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON and nothing else.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and warnings.")] = False,
) -> None:
    """Quantize MODEL's linear layers and write a folder that engines load."""
    if max_shard_size < 1_000_000:
        raise UsageError(f"--max-shard-size {max_shard_size} is in bytes and must be at least 1000000")
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
        raise UsageError(f"--act-order is of GPTQ, and the method is {chosen.method}; leave one of them out")
    from llmquant.allocation import AllocateOptions, allocate
    from llmquant.destination import check_destination
    from llmquant.parallel import World, joined
    from llmquant.pipeline import Events, QuantizeOptions, quantize

    world = World.of()
    quiet = quiet or not world.first

    if target_bpw is not None:
        if world.size > 1:
            raise UsageError("--target-bpw chooses in one process; run `llmquant allocate` first and give its recipe")
        if bits is not None or group_size is not None:
            raise UsageError("--target-bpw chooses bits and group sizes itself; leave out --bits and --group-size")
        check_destination(output.absolute(), overwrite)
        serving = engine or Engine.any
        wanted = AllocateOptions(
            target_bpw, widths_of(None, serving), symmetric=sym, engine=serving.value, device=device, dtype=dtype,
            evaluation=eval_text,
        )  # fmt: skip
        with progress(hidden=quiet or as_json) as events:
            allocation = allocate(model, chosen, wanted, events)
        if not quiet and not as_json:
            show(allocation)
        chosen = allocation.recipe
    elif engine is not None:
        raise UsageError("--engine limits what --target-bpw may choose; give both or neither")
    options = QuantizeOptions(
        device=device, dtype=dtype, overwrite=overwrite, max_shard_size=max_shard_size, base_model=base_model,
        evaluation=eval_text, resume=resume, restart=restart, max_memory=limit,
        world=world, log=log or output.absolute().with_name(f"{output.absolute().name}.quantize.log.jsonl"),
    )  # fmt: skip
    started = time.perf_counter()
    with joined(world), stoppable(), progress(hidden=quiet or as_json) as events:
        result = quantize(model, output, chosen, options, events if world.first else Events())
    seconds = time.perf_counter() - started
    if not world.first:
        return
    if as_json:
        sys.stdout.write(json.dumps(_as_dict(result, seconds)) + "\n")
    elif not quiet:
        _show(result, seconds)
    for warning in result.warnings:
        sys.stderr.write(f"warning: {warning}\n")


def _as_dict(result: QuantizeResult, seconds: float) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "recipe": result.recipe.model_dump(mode="json"),
        "bits_per_weight": result.bits_per_weight,
        "source_bytes": result.source_bytes,
        "bytes_written": result.bytes_written,
        "seconds": seconds,
        "calibration": result.calibration.summary.as_dict() if result.calibration else None,
        "modules": [
            {
                "name": m.name, "scheme": str(m.spec), "weight_error": m.weight_error, "output_error": m.output_error,
                "damping": m.damping, "dead": m.dead, "tokens": m.tokens, "dropped": m.dropped, "seconds": m.seconds,
                "fallback": m.fallback,
            }
            for m in result.modules
        ],
        "tuned": {
            name: {"before": t.before, "after": t.after, "step": t.step, "steps": t.steps, "seconds": t.seconds}
            for name, t in result.tuned.items()
        },
        "scaled": {name: [asdict(pair) for pair in pairs] for name, pairs in result.scaled.items()},
        "skipped": dict(result.skipped),
        "resumed_blocks": result.resumed,
        "warnings": list(result.warnings),
    }  # fmt: skip


@contextmanager
def progress(hidden: bool) -> Iterator[Events]:
    """A bar over blocks with the time left, the memory in use and at most, and the current module, on stderr."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from llmquant.pipeline import Events
    from llmquant.usage import peak_resident_bytes, resident_bytes

    console = screen(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[memory]}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=console, disable=hidden or not console.is_terminal, transient=True) as progress:
        task = progress.add_task("reading", total=None, memory="")
        first: list[int] = []

        def on_calibration(calibration: Calibration) -> None:
            if not hidden:
                console.print(f"calibration  {calibration.source}", soft_wrap=True)
                for line in calibration.summary.lines():
                    console.print(f"  {line}", soft_wrap=True)
            progress.update(task, description="calibrating")

        def on_warning(warning: str) -> None:
            console.print(f"warning: {warning}", soft_wrap=True)

        def on_note(note: str) -> None:
            if not hidden:
                console.print(note, soft_wrap=True)

        def on_progress(p: Where) -> None:
            if not first:  # what an earlier process did says nothing of this one's speed
                first.append(p.block)
                progress.reset(task, total=p.blocks, completed=p.block)
            memory = f"{resident_bytes() / 1e9:.1f} GB (peak {peak_resident_bytes() / 1e9:.1f})"
            progress.update(task, description=p.module, completed=p.block, total=p.blocks, memory=memory)

        events = Events(
            on_warning=on_warning,
            on_note=on_note,
            on_calibration=on_calibration,
            on_progress=on_progress,
            on_phase=lambda phase: progress.update(task, description=phase, completed=progress.tasks[0].total or 0),
        )
        yield events


def _show_tuned(tuned: Mapping[str, TuneReport], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("tuned")
    for column in ("block error before", "after", "ratio", "kept step"):
        table.add_column(column, justify="right")
    for name, t in tuned.items():
        ratio = f"{t.after / t.before:.3f}" if t.before else "–"
        table.add_row(name, f"{t.before:.3e}", f"{t.after:.3e}", ratio, f"{t.step} of {t.steps}")
    console.print(table)


def _show_scaled(scaled: Mapping[str, tuple[PairReport, ...]], console: Console) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("scaled for")
    for column in ("pairs", "error before", "after", "left alone"):
        table.add_column(column, justify="right")
    kinds: dict[tuple[str, ...], list[PairReport]] = {}
    for block, pairs in scaled.items():
        for pair in pairs:
            kinds.setdefault(tuple(r.removeprefix(f"{block}.") for r in pair.readers), []).append(pair)
    for readers, reports in kinds.items():
        measured = [(r.before, r.after) for r in reports if r.before is not None and r.after is not None]
        means = [f"{sum(values) / len(measured):.2e}" for values in zip(*measured, strict=True)] or ["–", "–"]
        left = [r.reason for r in reports if r.reason is not None]
        why = f"{len(left)} ({', '.join(sorted(set(left)))})" if left else "0"
        table.add_row(", ".join(readers), str(len(reports)), *means, why)
    console.print(table)


def _show(result: QuantizeResult, seconds: float) -> None:
    from rich.table import Table

    table = Table(title=f"{result.path}", title_justify="left", box=None, pad_edge=False)
    for column in ("linears", "scheme"):
        table.add_column(column)
    for column in ("count", "weight error", "output error, mean", "worst"):
        table.add_column(column, justify="right")
    kinds: dict[tuple[str, str], list[Any]] = {}
    for m in result.modules:
        kinds.setdefault((m.name.rpartition(".")[2], str(m.spec)), []).append(m)
    for (leaf, spec), reports in kinds.items():
        outputs = [r.output_error for r in reports if r.output_error is not None]
        table.add_row(
            leaf,
            spec,
            str(len(reports)),
            f"{sum(r.weight_error for r in reports) / len(reports):.2e}",
            f"{sum(outputs) / len(outputs):.2e}" if outputs else "–",
            f"{max(outputs):.2e}" if outputs else "–",
        )
    console = screen()
    console.print(table)
    if result.scaled:
        _show_scaled(result.scaled, console)
    if result.tuned:
        _show_tuned(result.tuned, console)
    skipped = ", ".join(f"{n} ({why})" for n, why in result.skipped.items()) or "none"
    console.print(f"left alone   {skipped}")
    console.print(
        f"size         {result.source_bytes / 1e6:,.2f} MB → {result.bytes_written / 1e6:,.2f} MB; "
        f"{result.bits_per_weight:.3f} bits per quantized weight"
    )
    console.print(f"proved       every tensor re-read from disk and equal to what was computed; {seconds:.1f} s")
