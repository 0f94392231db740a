"""``llmquant convert``: a quantized folder in another layout, with equal numbers, or every reason
why not."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmquant.cli.options import (
    JsonOption,
    OverwriteOption,
    QuietOption,
    ThreadsOption,
    from_home,
)
from llmquant.cli.progress import steps
from llmquant.cli.sizes import check_shard_size
from llmquant.cli.stopping import stoppable
from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant.conversion import ConvertResult
    from llmquant.conversion.gguf.file import GgufResult

_GGUF = "gguf"

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
_Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="PATH",
        help="Folder to make (for gguf: the file).",
        callback=from_home,
    ),
]
_Dtype = Annotated[
    str,
    typer.Option(
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
    output: _Output,
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
    if to == _GGUF:
        if dtype != "auto" or scale_dtype is not None or base is not None:
            raise UsageError(
                "--dtype, --scale-dtype and --base do not apply to gguf, whose scales are fp16"
            )
        from llmquant.checkpoint.hub import resolve
        from llmquant.conversion.gguf.file import export_gguf
        from llmquant.conversion.source import refuse_gguf

        refuse_gguf(model)
        exported = export_gguf(resolve(model), output, overwrite=overwrite)
        _tell(_gguf_facts(exported), (), quiet, as_json)
        return
    from llmquant.conversion import ConvertOptions, convert

    options = ConvertOptions(dtype, scale_dtype, base, overwrite, max_shard_size)
    with stoppable(), steps(hidden=quiet or as_json) as on_progress:
        result = convert(model, to, output, options, on_progress)
    _tell(_facts(result), result.warnings, quiet, as_json)


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
    }


def _gguf_facts(result: GgufResult) -> dict[str, Any]:
    return {
        "path": str(result.path),
        "format": _GGUF,
        "bytes_written": result.nbytes,
        "types": dict(result.types),
    }


def _tell(facts: dict[str, Any], warnings: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    elif not quiet:
        said = f"{facts['path']}: {facts['format']}, {facts['bytes_written'] / 1e6:,.2f} MB"
        if "modules" in facts:
            said += f" (was {facts['source_format']}, {facts['source_bytes'] / 1e6:,.2f} MB); {facts['scheme']}"
            said += f"\nproved: the numbers of {facts['modules']} packed modules, re-read from disk, equal the source's"
        sys.stdout.write(said + "\n")
    if not quiet and not as_json:
        for note in facts.get("notes", ()):
            sys.stderr.write(f"note: {note}\n")
    for warning in warnings:
        sys.stderr.write(f"warning: {warning}\n")
