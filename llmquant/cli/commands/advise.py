"""``llmquant advise``: what to do with a model on a machine, before anything is done."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.options import DeviceOption, JsonOption, ModelArgument
from llmquant.cli.screen import fact_table, screen
from llmquant.cli.sizes import parse_size

if TYPE_CHECKING:
    from rich.table import Table

    from llmquant.planning.advice import Advice, Option, OtherKind

_Memory = Annotated[
    str | None,
    typer.Option(
        help="Memory of the machine it is for, as 8GiB [default: what is free on this one].",
        metavar="SIZE",
    ),
]
_Context = Annotated[
    int | None,
    typer.Option(help="Tokens of a conversation [default: 4096, or what the model takes].", min=1),
]
_BatchSize = Annotated[int, typer.Option(help="Conversations at once.", min=1)]
_MaxKl = Annotated[
    float, typer.Option(help="Acceptable loss: KL to the original, in nats per token.", min=0.0)
]
_Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        help="Time packed layers on this processor [default: if it is not busy].",
        show_default=False,
    ),
]


def advise_command(
    model: ModelArgument,
    device: DeviceOption = "auto",
    memory: _Memory = None,
    context: _Context = None,
    batch_size: _BatchSize = 1,
    max_kl: _MaxKl = 0.02,
    measure: _Measure = None,
    as_json: JsonOption = False,
) -> None:
    """Say what to do with MODEL on a machine.

    What fits, what it is expected to lose, what is fast there, and the commands to run next.
    """
    from llmquant.checkpoint.hub import resolve
    from llmquant.planning.advice import advise, other_kind, this_target

    kind = other_kind(Path(model)) or other_kind(resolve(model))
    if kind is not None:
        _show_other(kind, as_json)
        return
    nbytes = None if memory is None else parse_size("--memory", memory, least=1)
    advice = advise(
        model,
        this_target(device, nbytes),
        context=context,
        batch_size=batch_size,
        max_kl=max_kl,
        measure=measure,
    )
    if as_json:
        sys.stdout.write(json.dumps(_as_dict(advice)) + "\n")
    else:
        _show(advice, model, max_kl)


def _show_other(kind: OtherKind, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps({"this_tool": False, **asdict(kind)}) + "\n")
        return
    rows = [("model", f"{kind.name}; llmquant is not the tool for it"), ("because", kind.why)]
    rows += [("instead" if i == 0 else "", step) for i, step in enumerate(kind.instead)]
    screen().print(fact_table(rows))


def _as_dict(advice: Advice) -> dict[str, Any]:
    default, size_class = advice.default, advice.default.size_class
    return {
        "this_tool": True,
        "model_type": advice.model_type,
        "parameters": default.parameters,
        "size_class": size_class.name,
        "measured_on": size_class.model,
        "how": size_class.how,
        "target": asdict(advice.target),
        "context": advice.context,
        "batch_size": advice.batch_size,
        "dtype": advice.dtype,
        "cache_bytes": advice.cache_bytes,
        "refused": dict(advice.refused),
        "options": [_option(o) for o in advice.options],
        "first": None if advice.first is None else advice.first.name,
        "why": advice.why,
        "then": list(advice.then),
        "busy": advice.busy,
    }


def _option(option: Option) -> dict[str, Any]:
    return {
        "name": option.name,
        "scheme": option.scheme,
        "weight_bytes": option.weight_bytes,
        "total_bytes": option.total_bytes,
        "fits": option.fits,
        "expected": None if option.cost is None else asdict(option.cost),
        "speed": None if option.speed is None else asdict(option.speed),
        "engines": {engine: list(reasons) for engine, reasons in option.engines.items()},
    }


def _show(advice: Advice, model: str, max_kl: float) -> None:
    console = screen()
    console.print(fact_table(_facts(advice)))
    console.print()
    console.print(_options(advice))
    console.print()
    for line in _notes(advice):
        console.print(line, style="dim")
    first = advice.first
    if first is None:
        console.print(fact_table([("advice", advice.why)]))
        return
    rows = [("try first", f"{first.name}: {advice.why}")]
    rows += [("if it misses", ", then ".join(advice.then))] if advice.then else []
    console.print(fact_table(rows))
    console.print()
    for line in _commands(model, first, max_kl):
        console.print(line, soft_wrap=True)


def _facts(advice: Advice) -> Iterator[tuple[str, str]]:
    target, default = advice.target, advice.default
    yield (
        "model",
        f"{advice.model_type}, {default.parameters / 1e6:,.1f} million parameters ({default.size_class.name})",
    )
    yield (
        "target",
        f"{target.device}, {_size(target.memory_bytes)} {target.memory_from}; computes in {advice.dtype}",
    )
    several = f"{advice.batch_size} conversations" if advice.batch_size > 1 else "a conversation"
    yield (
        "context",
        f"{several} of {advice.context:,} tokens: {_size(advice.cache_bytes)} of keys and values",
    )


def _options(advice: Advice) -> Table:
    from rich import box
    from rich.table import Table

    from llmquant.planning.advice import ORIGINAL

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("option", overflow="fold")
    for name in ("weights", "in all", "fits", "KL", "perplexity", "decode", "prefill"):
        table.add_column(name, justify="right", no_wrap=True)
    for o in advice.options:
        loss = ("0", "×1") if o.name == ORIGINAL else ("–", "–")
        if o.cost is not None:
            loss = (f"{o.cost.kl:#.2g}", f"×{o.cost.perplexity_ratio:.3f}")
        speed = ("–", "–")
        if o.speed is not None:
            speed = (f"{1 / o.speed.one_row:.2g} ×", f"{1 / o.speed.many_rows:.2g} ×")
        fits = "yes" if o.fits else "no"
        style = "bold" if o is advice.first else None
        table.add_row(
            o.name, _size(o.weight_bytes), _size(o.total_bytes), fits, *loss, *speed, style=style
        )
    return table


def _notes(advice: Advice) -> Iterator[str]:
    size_class, target = advice.default.size_class, advice.target
    floor = f", and {_size(target.floor_bytes)} of the process" if target.floor_bytes else ""
    yield f"in all: weights, keys and values{floor}"
    if size_class.model is None:
        yield f"KL, perplexity: {size_class.how}"
    else:
        yield f"KL, perplexity: measured on {size_class.model} ({size_class.how}); yours will differ, `llmquant eval` measures it"
    if any(o.speed for o in advice.options):
        yield "decode, prefill: speed of one linear beside the faster dense one, measured here just now"
        if advice.busy:
            yield "this machine is busy, so these speeds may be far off; run it again when it is quiet"
    elif advice.busy and advice.target.here:
        yield "speed: not measured, because this machine is busy; run it again when it is quiet"
    else:
        yield "speed: not measured; `llmquant bench` on the machine itself measures it"
    for name, why in advice.refused.items():
        yield f"{name}: not for this model: {why}"
    yield ""


def _commands(model: str, first: Option, max_kl: float) -> Iterator[str]:
    """What to run next, in order."""
    name, _, more = first.name.partition(" ")
    short = Path(model).stem if Path(model).suffix.lower() == ".gguf" else Path(model).name
    out, small = shlex.quote(f"{short}-{name}"), shlex.quote(f"{short}-small")
    model = shlex.quote(model)
    options = f"--recipe {name}{f' {more}' if more else ''}"
    yield "# text as the model will see it; what judges is used for nothing else"
    yield f"llmquant quantize {model} -o {out} {options} --calibration file:train.txt"
    yield f"llmquant eval {out} --reference {model} --text file:heldout.txt"
    yield f"llmquant bench {model} {out}"
    yield f"llmquant serve {out}"
    yield "# or let the smallest that is close enough be found"
    yield f"llmquant auto {model} --max-kl {max_kl:g} --data file:mine.txt -o {small}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
