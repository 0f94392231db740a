"""``llmquant doctor``: the machine, what ``auto`` means on it, which kernels and engines it has,
and what is missing.

Exit code 0 when llmquant can work here, 1 when something it needs is broken. What is optional and
absent breaks nothing.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.options import ThreadsOption
from llmquant.cli.screen import fact_table, screen

if TYPE_CHECKING:
    from llmquant.cli.checkup.machine import Checkup


def doctor_command(
    threads: ThreadsOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Show what this machine has, and what is missing.

    Processor, kernels, engines, memory, versions.
    """
    from llmquant.cli.checkup.machine import look

    if threads is not None:
        from llmquant.runtime.threads import set_threads

        set_threads(threads)
    checkup = look()
    if as_json:
        sys.stdout.write(json.dumps(checkup.as_dict()) + "\n")
    else:
        _show(checkup)
    if not checkup.ok:
        raise typer.Exit(1)


def _show(checkup: Checkup) -> None:
    console = screen()
    console.print(fact_table(_rows(checkup)))
    console.print()
    for hint in checkup.hints:
        console.print(f"hint: {hint}", soft_wrap=True)
    for problem in checkup.problems:
        console.print(f"problem: {problem}", soft_wrap=True)
    console.print(
        "llmquant can work here" if checkup.ok else "llmquant cannot work here until that is mended"
    )


def _rows(checkup: Checkup) -> list[tuple[str, str]]:
    rows = [*_processor(checkup), *_automatic(checkup)]
    rows += [_kernel(scheme, facts) for scheme, facts in checkup.kernels.items()]
    if checkup.compiled.get("compiled"):
        runs, sets = checkup.compiled["runs"], ", ".join(checkup.compiled["available"])
        rows.append(("compiled code", f"runs on {runs}; built for {sets}"))
    rows += _resources(checkup)
    for g in checkup.gpus:
        facts = f"{g['name']}, {_gb(g['memory'])}, compute capability {g['capability']}"
        rows.append((g["device"], facts))
    if checkup.auto and not checkup.gpus:
        rows.append(("gpu", "none that torch can use"))
    versions = (
        f"{name} {version or 'not installed'}" for name, version in checkup.versions.items()
    )
    rows.append(("versions", ", ".join(versions)))
    rows += [_engine(name, facts) for name, facts in checkup.engines.items()]
    rows += [(f"for {name}", _extra(facts)) for name, facts in checkup.extras.items()]
    return rows


def _processor(checkup: Checkup) -> list[tuple[str, str]]:
    here = checkup.processor
    nothing = "none of those that matter" if here.known else "not known"
    sets = ", ".join(here.instruction_sets) or nothing
    if here.held_back:
        sets += f"; held back: {', '.join(here.held_back)} by {' '.join(here.held_by)}"
    return [("processor", f"{here.name} ({here.architecture})"), ("instructions", sets)]


def _automatic(checkup: Checkup) -> list[tuple[str, str]]:
    """What ``auto`` means here."""
    auto = checkup.auto
    if not auto:
        return []
    rows = [("auto device", auto["device"])]
    if auto["device"] != "cpu":
        rows.append((f"auto dtype, {auto['device']}", auto["dtype"]))
    rows.append(("auto dtype, cpu", f"{auto['cpu_dtype']}: {auto['cpu_reason']}"))
    rows.append(("to calibrate", f"{auto['calibration_dtype']}: {auto['calibration_reason']}"))
    return rows


def _resources(checkup: Checkup) -> list[tuple[str, str]]:
    rows, threads, memory, disk = [], checkup.threads, checkup.memory, checkup.disk
    if threads:
        cores = f", of {threads['cores']} cores" if threads["cores"] else ""
        can = f"{threads['available']} can run at once{cores}"
        rows.append(("threads", f"{threads['torch']}; {can}"))
    rows.append(("memory", f"{_gb(memory['available'])} free of {_gb(memory['total'])}"))
    swap = f"{_gb(memory['swap_free'])} free of {_gb(memory['swap'])}"
    rows.append(("swap", swap if memory["swap"] else "none"))
    if disk["path"]:
        rows.append(("disk", f"{_gb(disk['free'])} free at {disk['path']}"))
    else:
        rows.append(("disk", f"not known: {disk['error']}"))
    return rows


def _kernel(scheme: str, facts: dict[str, Any]) -> tuple[str, str]:
    why = "; ".join(f"not {name}: {reason}" for name, reason in facts["not"].items())
    return f"kernel {scheme}", f"{facts['kernel']} in {facts['dtype']}{f' ({why})' if why else ''}"


def _engine(name: str, facts: dict[str, Any]) -> tuple[str, str]:
    if not facts["ready"]:
        return name, f"{facts['reason']}. To get it: {facts['install']}"
    refusals = "".join(f"; {scheme}: {why}" for scheme, why in facts.get("refuses", {}).items())
    where = f"{facts['version']} at {facts['python']}; " if facts.get("version") else ""
    return (
        name,
        f"{where}takes {', '.join(facts.get('takes', [])) or 'nothing'} of compressed-tensors on a CPU{refusals}",
    )


def _extra(facts: dict[str, Any]) -> str:
    if not facts["missing"]:
        return "complete"
    return f"missing: {', '.join(facts['missing'])}. To get it: {facts['install']}"


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"
