"""``llmquant export``: a model as a file or folder for other engines, proved to hold the same
numbers."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.commands.edge.gguf import GGUF, write_gguf
from llmquant.cli.options import (
    FolderOrFileOption,
    JsonOption,
    OverwriteOption,
    QuietOption,
    ThreadsOption,
)
from llmquant.cli.progress import steps
from llmquant.cli.stopping import stoppable
from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant.conversion.onnx.export import OnnxResult

_ONNX = "onnx"

_Model = Annotated[str, typer.Argument(help="Model folder or hub name, quantized or not.")]
_To = Annotated[
    str,
    typer.Option(
        metavar="KIND", help="onnx (a folder for ONNX Runtime) or gguf (a file for llama.cpp)."
    ),
]
_Provider = Annotated[
    str | None,
    typer.Option(
        "--ep",
        metavar="NAME",
        help="ONNX: execution provider that will run it: cpu, cuda, dml or webgpu [default: cpu].",
    ),
]
_Level = Annotated[
    int | None,
    typer.Option(
        "--accuracy-level",
        metavar="N",
        help="ONNX: 0 leaves activations alone, 4 rounds them to int8, faster on a CPU [default: 0].",
    ),
]
_Head = Annotated[
    str | None,
    typer.Option(
        "--head",
        metavar="KIND",
        help="ONNX: of a head that is not quantized: fp16 leaves it alone, int8 and int4 round it [default: fp16].",
    ),
]
_Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="KIND",
        help="ONNX: packed (as they are), fp32, fp16, or int8 with activations rounded as it runs "
        "[default: what MODEL holds].",
    ),
]
_Python = Annotated[
    str | None,
    typer.Option(
        "--onnx-python",
        metavar="PATH",
        help="ONNX: the Python of the environment that has it [default: .venv-onnx/bin/python].",
        envvar="LLMQUANT_ONNX_PYTHON",
    ),
]
_Check = Annotated[
    bool,
    typer.Option("--check/--no-check", help="ONNX: run a few tokens through MODEL and the result."),
]


def export_command(
    model: _Model,
    to: _To,
    output: FolderOrFileOption,
    provider: _Provider = None,
    accuracy_level: _Level = None,
    head: _Head = None,
    weights: _Weights = None,
    onnx_python: _Python = None,
    check: _Check = True,
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write MODEL for ONNX Runtime or llama.cpp, and prove it."""
    from llmquant.runtime.threads import set_threads

    set_threads(threads)
    if to == GGUF:
        given = {
            "--ep": provider,
            "--accuracy-level": accuracy_level,
            "--head": head,
            "--weights": weights,
            "--no-check": None if check else True,
        }
        if lonely := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{lonely[0]} belongs to --to onnx; leave it out")
        write_gguf(model, output, overwrite=overwrite, quiet=quiet, as_json=as_json)
        return
    if to != _ONNX:
        raise UsageError(
            f"--to {to} does not exist; choose onnx or gguf (other layouts: llmquant convert)"
        )
    from transformers.utils import logging as transformers_logging

    from llmquant.conversion.onnx.export import export_onnx
    from llmquant.conversion.onnx.options import KEPT, OnnxOptions

    transformers_logging.disable_progress_bar()  # it would be drawn across ours
    options = OnnxOptions(
        provider=provider or "cpu",
        accuracy_level=accuracy_level or 0,
        head=head or KEPT,
        weights=weights,
        python=onnx_python,
        check=check,
        overwrite=overwrite,
    )
    with stoppable(), steps(hidden=quiet or as_json) as on_progress:
        result = export_onnx(model, output, options, on_progress)
    _tell_onnx(result, quiet, as_json)


def _tell_onnx(result: OnnxResult, quiet: bool, as_json: bool) -> None:
    record = result.record
    if as_json:
        facts: dict[str, Any] = {
            "path": str(result.path),
            "format": _ONNX,
            "bytes_written": result.bytes_written,
            **record.model_dump(mode="json"),
            "warnings": list(result.warnings),
            "notes": list(result.notes),
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    elif not quiet:
        _show(result)
    for warning in result.warnings:
        sys.stderr.write(f"warning: {warning}\n")


def _show(result: OnnxResult) -> None:
    record, check = result.record, result.record.check
    level = "" if record.accuracy_level is None else f", accuracy level {record.accuracy_level}"
    kept = [n for n, node in record.nodes.items() if node not in record.requantized]
    lines = [
        f"{result.path}: onnx for {record.provider}, {record.scheme}{level}, {result.bytes_written / 1e6:,.2f} MB",
        f"proved: {len(kept)} of {len(record.nodes)} linears and {record.unchanged} other tensors, "
        "read back from the graph, are the folder's bit for bit",
    ]
    if check is not None:
        lines.append(
            f"checked: logits of {check.tokens} tokens at most {check.max_difference:.2g} from the folder's "
            f"(the largest is {check.largest_logit:.3g}), mean KL {check.kl_mean:.2g} nats"
        )
    sys.stdout.write("\n".join(lines) + "\n")
    for note in result.notes:
        sys.stderr.write(f"note: {note}\n")
