"""What the tests of suites share: a suite on the small random model, with a recipe that fits it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmquant_eval.suites.schema import Suite

RTN = "method: rtn\nweights: {bits: 4, group_size: 32}\nscales: {steps: 0}\n"
PROTOCOL = "ppl/gptq-64"


def recipe(folder: Path, text: str = RTN) -> Path:
    """A recipe whose groups of 32 fit the small models."""
    path = folder / "coarse.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def suite_of(base: Path, text: Path, models: list[dict[str, Any]], **more: Any) -> Suite:
    """A suite in float32 without speeds and noise floor; ``more`` replaces or adds keys."""
    keys: dict[str, Any] = {
        "reference": str(base),
        "reference_label": "fp16",
        "models": models,
        "texts": [{"name": "words", "source": f"file:{text}"}],
        "protocols": [PROTOCOL],
        "dtype": "float32",
        "cost": False,
        "noise_floor": False,
    }
    return Suite.model_validate(keys | more)
