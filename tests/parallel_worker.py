"""What one process of a world does in test_parallel.py: ``torchrun … parallel_worker.py
REQUEST.json``.

Each run goes to the folder that the request names; what the last, deliberately failing one raised
in each process goes to ``error-RANK.txt`` beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pretend_device import NAME, install

from llmquant.checkpoint.manifest import read_manifest
from llmquant.errors import LlmquantError, QuantizationError
from llmquant.quantization import calibrated
from llmquant.quantization.options import QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.distributed import World, joined


def _fail(*_: Any) -> Any:
    raise QuantizationError("deliberate")


def work(world: World, request: dict[str, Any]) -> None:
    """The runs of a request, one after the other."""
    for run in request["runs"]:
        if run["device"] == NAME:
            install()
        options = QuantizeOptions(run["device"], world=world, max_memory=run["max_memory"])
        result = quantize(
            request["model"], run["output"], Recipe.model_validate(run["recipe"]), options
        )
        assert {m.name for m in result.modules} == set(read_manifest(result.path).modules), (
            "every process has the whole result"
        )
    failing = request["failing"]
    if world.rank == 1:
        calibrated.observe = _fail
    try:
        quantize(
            request["model"],
            failing["output"],
            Recipe.model_validate(failing["recipe"]),
            QuantizeOptions(world=world),
        )
    except LlmquantError as e:
        told = Path(failing["output"]).with_name(f"error-{world.rank}.txt")
        told.write_text(f"{type(e).__name__}: {e}", encoding="utf-8")


if __name__ == "__main__":
    try:
        with joined(World.of()) as world:
            work(world, json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    except LlmquantError as e:
        sys.exit(str(e))
