"""``llmquant allocate``: a size in, a recipe out: the width and group size of each linear, and what
that is predicted to cost.

``llmquant quantize --target-bpw`` does the same and goes on to quantize; the functions both need
are here.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.commands.allocate.show import as_dict, recipe_text, show
from llmquant.cli.options import (
    CalibrationDtypeOption,
    CalibrationOption,
    DeviceOption,
    Engine,
    FormatOption,
    IgnoreOption,
    IncludeOption,
    JsonOption,
    LengthOption,
    ModelArgument,
    QuietOption,
    RestartOption,
    ResumeOption,
    SamplesOption,
    SeedOption,
    Sensitivity,
    SensitivityOption,
    StoreDtypeOption,
    ThreadsOption,
    from_home,
)
from llmquant.cli.overrides import numbers, recipe_of, widths_of
from llmquant.cli.progress import progress
from llmquant.cli.screen import screen
from llmquant.cli.stopping import stoppable
from llmquant.errors import UsageError
from llmquant.written import FileKind, refuse_foreign, write_file

if TYPE_CHECKING:
    from llmquant.planning.allocation.allocate import Allocation
    from llmquant.planning.allocation.options import AllocateOptions
    from llmquant.recipe import Recipe


_Target = Annotated[
    float,
    typer.Option(
        help="At most this many bits per selected weight, scales and zero-points included."
    ),
]
_Output = Annotated[
    Path,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Recipe file to write.", callback=from_home
    ),
]
_Recipe = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="RECIPE",
        help="Recipe to start from; its overrides pin their linears.",
        callback=from_home,
    ),
]
_Widths = Annotated[
    str | None,
    typer.Option(metavar="LIST", help="Allowed widths, of 2,3,4,8,16; 16 means not quantized."),
]
_GroupSizes = Annotated[
    str, typer.Option(metavar="LIST", help="Allowed group sizes; -1: one scale per row.")
]
_Sym = Annotated[
    bool | None, typer.Option("--sym/--asym", help="Only without or only with zero-points.")
]
_Engine = Annotated[Engine, typer.Option(help="Only schemes that this engine supports.")]
_ProbeTokens = Annotated[int, typer.Option(help="Calibration tokens on which damage is measured.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing recipe.")]


def allocate_command(
    model: ModelArgument,
    target_bpw: _Target,
    output: _Output,
    recipe: _Recipe = None,
    widths: _Widths = None,
    group_sizes: _GroupSizes = "32,64,128,-1",
    sym: _Sym = None,
    engine: _Engine = Engine.any,
    sensitivity: SensitivityOption = Sensitivity.kl,
    probe_tokens: _ProbeTokens = 2048,
    layout: FormatOption = None,
    calibration: CalibrationOption = None,
    nsamples: SamplesOption = None,
    seqlen: LengthOption = None,
    seed: SeedOption = None,
    include: IncludeOption = None,
    ignore: IgnoreOption = None,
    device: DeviceOption = "auto",
    dtype: CalibrationDtypeOption = "auto",
    store_dtype: StoreDtypeOption = "auto",
    threads: ThreadsOption = None,
    resume: ResumeOption = True,
    restart: RestartOption = False,
    overwrite: _Overwrite = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a recipe with a scheme for each linear, for a size.

    Measures how much each of MODEL's linears suffers, and spends the size where it helps most.
    """
    from llmquant.planning.allocation.saved import saved_beside

    given = dict(locals())
    check_output(output, overwrite)
    chosen = recipe_of(given)
    _check_read(output, model, chosen)
    refuse_foreign(output, FileKind.RECIPE)
    started = time.perf_counter()
    with saved_beside(output.absolute(), resume=resume, restart=restart) as state:
        options = replace(_options(given), state=state, restart=restart)
        result = allocated(model, chosen, options, hidden=quiet or as_json)
        check_output(output, overwrite)
        write_file(output, recipe_text(result))
    seconds = time.perf_counter() - started
    if as_json:
        facts = {"path": str(output), **as_dict(result), "seconds": seconds}
        sys.stdout.write(json.dumps(facts) + "\n")
    elif not quiet:
        stored = "" if store_dtype == "auto" else f" --store-dtype {store_dtype}"
        run = f"llmquant quantize {shlex.quote(model)} --recipe {shlex.quote(str(output))}{stored} -o …"
        screen().print(f"recipe       {output}; {seconds:.1f} s. Run it: {run}")


def _options(given: Mapping[str, Any]) -> AllocateOptions:
    """What may be chosen, from the command's parameters by name."""
    from llmquant.planning.allocation.options import AllocateOptions
    from llmquant.runtime.threads import set_threads

    set_threads(given["threads"])
    same = ("target_bpw", "probe_tokens", "device", "dtype", "store_dtype")
    return AllocateOptions(
        **{name: given[name] for name in same},
        widths=widths_of(given["widths"], given["engine"]),
        group_sizes=numbers("--group-sizes", given["group_sizes"]),
        symmetric=given["sym"],
        engine=given["engine"].value,
        sensitivity=given["sensitivity"].value,
    )


def allocated(model: str, recipe: Recipe, options: AllocateOptions, *, hidden: bool) -> Allocation:
    """Choose, with progress and the outcome on the screen unless ``hidden``."""
    from llmquant.planning.allocation.allocate import allocate

    with stoppable(), progress(hidden) as events:
        result = allocate(model, recipe, options, events)
    if not hidden:
        show(result)
    return result


def check_output(path: Path, overwrite: bool) -> None:
    """Raises UsageError for a place where the recipe cannot be written."""
    if path.is_dir():
        raise UsageError(
            f"--output {path} is a folder; give the name of a file, such as {path / 'recipe.yaml'}"
        )
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists; --overwrite replaces it")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output {path}: there is no folder {path.absolute().parent}")
    if not os.access(path.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"no permission to write in {path.absolute().parent}; choose another -o, or change its permissions"
        )


def _check_read(path: Path, model: str, recipe: Recipe) -> None:
    """Raises UsageError for a file of the model, or a text, in whose place the recipe would be
    written."""
    if path.is_file():
        from llmquant.checkpoint.companions.originals import refuse_source
        from llmquant.data.sources import refuse_texts

        refuse_source(path, model)
        refuse_texts(path, recipe.calibration.source)
