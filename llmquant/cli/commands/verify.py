"""``llmquant verify``: is a folder still what was written, and with ``--rerun`` is it what its
recipe gives?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llmquant.cli.options import JsonOption, ThreadsOption
from llmquant.cli.screen import screen
from llmquant.errors import UsageError

_Folder = Annotated[Path, typer.Argument(help="Folder written by llmquant.")]
_Rerun = Annotated[
    bool, typer.Option("--rerun", help="Quantize again and compare every file and linear.")
]
_Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="With --rerun: the original model, if not found by its recorded name.",
    ),
]
_Calibration = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="With --rerun: the calibration text, if it is not where the recipe says.",
    ),
]
_Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="DEVICE",
        help="With --rerun: auto, cpu, cuda, cuda:0 … [default: the recorded one].",
    ),
]
_ShardSize = Annotated[
    int, typer.Option(help="With --rerun: bytes per weight file, as in the first run.")
]
_Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors.")]


def verify_command(
    folder: _Folder,
    rerun: _Rerun = False,
    model: _Model = None,
    calibration: _Calibration = None,
    device: _Device = None,
    threads: ThreadsOption = None,
    max_shard_size: _ShardSize = 5_000_000_000,
    as_json: JsonOption = False,
    quiet: _Quiet = False,
) -> None:
    """Check that FOLDER is still what was written.

    Hashes every file and reads every packed weight again; --rerun repeats the run itself.
    """
    if not rerun and (model, calibration, device) != (None, None, None):
        raise UsageError(
            "--model, --calibration and --device belong to --rerun; add it or leave them out"
        )
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "is not there"
        raise UsageError(f"{folder} {what}; give a folder that llmquant wrote")
    from llmquant.checkpoint.manifest import verify
    from llmquant.runtime.threads import set_threads

    set_threads(threads)
    manifest = verify(folder)
    files, linears = len(manifest.files), len(manifest.modules)
    facts: dict[str, Any] = {"path": str(folder), "files": files, "modules": linears}
    facts["verified"] = True
    lines = [f"verified   {files} files and {linears} quantized linears are what was written"]
    if rerun:
        differing = _rerun(folder, model, calibration, device, max_shard_size)
        facts |= {"reran": True, "circumstances": differing}
        lines += ["rerun      the same bytes in every file"]
        lines += [f"           although {c}" for c in differing]
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    elif not quiet:
        for line in lines:
            screen().print(line, soft_wrap=True)


def _rerun(
    folder: Path, model: str | None, calibration: str | None, device: str | None, shard: int
) -> list[str]:
    """Repeat the run; what was different about it although the bytes are the same."""
    from transformers.utils import logging as transformers_logging

    from llmquant.quantization.rerun import demand_same
    from llmquant.training.stage import rerun

    transformers_logging.disable_progress_bar()  # of the models that a recipe's training loads
    comparison = rerun(folder, model, calibration=calibration, device=device, max_shard_size=shard)
    demand_same(folder, comparison)
    return list(comparison.circumstances)
