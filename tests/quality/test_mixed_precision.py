"""Measured: an allocated model against the best uniform one of its size, on the shipped model.

docs/mixed-precision.md has the full comparison: both budgets, three calibration seeds, every
uniform scheme. Here one seed and fewer schemes to choose from keep it short; what is asserted is
less than what was measured.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from test_tiny_llama import CALIBRATION, MODEL, measured, values

from llmquant import Recipe, load_recipe, quantize
from llmquant.planning.allocation.allocate import allocate
from llmquant.planning.allocation.options import AllocateOptions

pytestmark = pytest.mark.quality


def kl(tmp_path: Path, recipes: dict[str, Recipe]) -> list[float]:
    for name, recipe in recipes.items():
        quantize(MODEL, tmp_path / name, recipe)
    return values(measured([tmp_path / name for name in recipes]), "kl_mean")


@pytest.mark.long
def test_mixed_at_3_5_bits_beats_uniform_3_5_bits(tmp_path: Path) -> None:
    recipe = load_recipe("gptq-w3g32").updated(CALIBRATION)
    options = AllocateOptions(
        3.5, widths=(3, 4, 8), group_sizes=(32, 128, -1), symmetric=True, probe_tokens=4096
    )
    allocation = allocate(MODEL, recipe, options)
    assert allocation.bits_per_weight <= 3.5
    mixed, uniform = kl(tmp_path, {"mixed": allocation.recipe, "uniform": recipe})
    print(f"KL mixed {mixed:.5f}, uniform {uniform:.5f}, predicted {allocation.predicted:.5f}")
    assert mixed <= 0.9 * uniform
    assert allocation.predicted == pytest.approx(mixed, rel=0.5)
