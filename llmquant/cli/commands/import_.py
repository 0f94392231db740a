"""``llmquant import``: a GGUF file, or a folder of pickles, as a model folder."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llmquant.cli.options import (
    JsonOption,
    OutputOption,
    OverwriteOption,
    QuietOption,
    ShardSizeOption,
    ThreadsOption,
)
from llmquant.cli.progress import steps
from llmquant.cli.sizes import check_shard_size
from llmquant.cli.stopping import stoppable
from llmquant.errors import UsageError

_Source = Annotated[
    Path,
    typer.Argument(
        metavar="FILE|DIR",
        help="GGUF file (of several shards any one, the others beside it), or a folder with pytorch_model.bin.",
    ),
]
_Dtype = Annotated[
    str,
    typer.Option(
        "--dtype",
        metavar="DTYPE",
        help="Of a GGUF file's tensors in the folder: auto (float16; bfloat16 or float32 where the file's matrices are), "
        "bfloat16/bf16, float16/fp16, float32/fp32.",
    ),
]
_Packed = Annotated[
    bool,
    typer.Option("--packed", help="Keep Q4_0 and Q8_0 as they are, code for code, in --format."),
]
_Layout = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="With --packed: compressed-tensors (default), gptq or gptq_v2.",
    ),
]


def import_command(
    source: _Source,
    output: OutputOption,
    dtype: _Dtype = "auto",
    packed: _Packed = False,
    layout: _Layout = None,
    max_shard_size: ShardSizeOption = 5_000_000_000,
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a model folder of a GGUF FILE, or of a DIR of pickles.

    It has config, tokenizer, chat template and weights. Of pickles it is the same tensors as
    safetensors; no code in them runs.
    """
    check_shard_size(max_shard_size)
    source = source.expanduser()
    if of_folder := source.is_dir():
        _refuse_options(dtype, packed, layout)
    from llmquant.runtime.threads import set_threads

    set_threads(threads)
    from llmquant.conversion.gguf.importing import ImportOptions, import_gguf
    from llmquant.conversion.pickles import import_pickles

    with stoppable(), steps(hidden=quiet or as_json) as on_progress:
        if of_folder:
            result = import_pickles(
                source,
                output,
                max_shard_size=max_shard_size,
                overwrite=overwrite,
                on_progress=on_progress,
            )
        else:
            options = ImportOptions(dtype, overwrite, max_shard_size, packed, layout)
            result = import_gguf(source, output, options, on_progress)
    facts = {**asdict(result), "path": str(result.path)}
    if as_json:
        sys.stdout.write(json.dumps(facts) + "\n")
    elif not quiet:
        _tell(facts)


def _refuse_options(dtype: str, packed: bool, layout: str | None) -> None:
    """Options of GGUF files say nothing of pickles."""
    given = {"--dtype": dtype != "auto", "--packed": packed, "--format": layout is not None}
    named = [option for option, said in given.items() if said]
    if named:
        raise UsageError(
            f"{', '.join(named)}: for a GGUF file only; the tensors of pickles are written as they are"
        )


def _tell(facts: dict[str, Any]) -> None:
    rounding = f"; {facts['rounding']}" if facts["rounding"] else ""
    types = ", ".join(f"{n} {kind}" for kind, n in facts["types"].items())
    sys.stdout.write(
        f"{facts['path']}: {facts['model_type']}, {facts['parameters'] / 1e6:,.1f}M parameters, "
        f"{facts['scheme'] or facts['dtype']}, {facts['bytes_written'] / 1e6:,.2f} MB "
        f"(was {facts['source_bytes'] / 1e6:,.2f} MB: {types})\n"
        f"proved: {facts['tensors']} tensors, read back from disk, are what was read{rounding}\n"
    )
    for note in facts["notes"]:
        sys.stderr.write(f"note: {note}\n")
