"""``llmquant convert``: a quantized folder in another layout, with equal numbers, or every reason
why not."""

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
from llmquant.cli.sizes import check_shard_size
from llmquant.cli.stopping import stoppable
from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant.conversion import ConvertResult

_Quantized = Annotated[
    str, typer.Argument(help="Quantized model folder or hub name, of llmquant or another tool.")
]
_To = Annotated[
    str,
    typer.Option(
        metavar="LAYOUT",
        help="compressed-tensors, int-quantized, gptq, gptq_v2, awq, gguf or dense.",
    ),
]
_Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Of a dense result: auto (the model's), bfloat16/bf16, float16/fp16, float32/fp32.",
    ),
]
_ScaleDtype = Annotated[
    str | None,
    typer.Option(
        metavar="DTYPE",
        help="Store scales in this dtype instead of the model's, if the layout allows it.",
    ),
]
_Base = Annotated[
    str | None,
    typer.Option(
        metavar="MODEL",
        help="The unquantized model; decides if the zero-point convention is ambiguous.",
    ),
]
_ShardSize = Annotated[int, typer.Option(help="Bytes per file of a dense result.")]


def convert_command(
    model: _Quantized,
    to: _To,
    output: FolderOrFileOption,
    dtype: _Dtype = "auto",
    scale_dtype: _ScaleDtype = None,
    base: _Base = None,
    max_shard_size: _ShardSize = 5_000_000_000,
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Rewrite a quantized MODEL in another layout, without loss."""
    check_shard_size(max_shard_size)
    from llmquant.runtime.threads import set_threads

    set_threads(threads)
    if to == GGUF:
        if dtype != "auto" or scale_dtype is not None or base is not None:
            raise UsageError(
                "--dtype, --scale-dtype and --base do not apply to gguf, whose scales are fp16"
            )
        write_gguf(model, output, overwrite=overwrite, quiet=quiet, as_json=as_json)
        return
    from llmquant.conversion import TARGETS, ConvertOptions, convert

    if to not in TARGETS:
        raise UsageError(f"--to {to!r} does not exist; choose one of {', '.join((*TARGETS, GGUF))}")
    options = ConvertOptions(dtype, scale_dtype, base, overwrite, max_shard_size)
    with stoppable(), steps(hidden=quiet or as_json) as on_progress:
        result = convert(model, to, output, options, on_progress)
    _tell(result, quiet, as_json)


def _facts(result: ConvertResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "source_format": result.source_format,
        "format": result.format,
        "scheme": result.scheme,
        "modules": result.modules,
        "bits_per_weight": result.bits_per_weight,
        "source_bytes": result.source_bytes,
        "bytes_written": result.bytes_written,
        "warnings": list(result.warnings),
        "notes": list(result.notes),
        "rounding": result.rounding,
    }


def _tell(result: ConvertResult, quiet: bool, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(_facts(result)) + "\n")
    elif not quiet:
        rounded = f" at that dtype: {result.rounding}" if result.rounding else ""
        sys.stdout.write(
            f"{result.path}: {result.format}, {result.bytes_written / 1e6:,.2f} MB "
            f"(was {result.source_format}, {result.source_bytes / 1e6:,.2f} MB); {result.scheme}\n"
            f"proved: the numbers of {result.modules} packed modules, re-read from disk, equal the source's{rounded}\n"
        )
        for note in result.notes:
            sys.stderr.write(f"note: {note}\n")
    for warning in result.warnings:
        sys.stderr.write(f"warning: {warning}\n")
