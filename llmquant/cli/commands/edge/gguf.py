"""A quantized folder as a GGUF file, for ``export`` and ``convert``: written, proved and told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from llmquant.cli.stopping import stoppable

GGUF = "gguf"


def write_gguf(model: str, output: Path, *, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Write the file and say what it is.

    Raises:
        UsageError: MODEL is a GGUF file, or the destination cannot be.
        FormatError: the file cannot hold MODEL's numbers.
        ProofError: what was written is something else.
    """
    from llmquant.checkpoint.hub import resolve
    from llmquant.conversion.gguf.file import export_gguf
    from llmquant.conversion.source import refuse_gguf

    refuse_gguf(model)
    with stoppable():
        result = export_gguf(resolve(model), output, overwrite=overwrite)
    if as_json:
        facts = {
            "path": str(result.path),
            "format": GGUF,
            "bytes_written": result.nbytes,
            "types": dict(result.types),
        }
        sys.stdout.write(json.dumps(facts) + "\n")
    elif not quiet:
        sys.stdout.write(
            f"{result.path}: gguf, {result.nbytes / 1e6:,.2f} MB\n"
            f"proved: {len(result.types)} tensors, read back from disk, are the folder's numbers\n"
        )
