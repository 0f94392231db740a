"""What a plan says that a run takes of a device's memory, against what it took."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from large_layout import seventy_billion
from pretend_device import NAME, ledger

from llmquant.planning.forecast import DeviceFit, device_fit, forecast
from llmquant.planning.preview import make_plan
from llmquant.quantization.options import QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.devices import device_memory

pytestmark = pytest.mark.device
GB = 1_000_000_000
CHANGES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "calibration.source": None},
    "gptq": {},
    "long windows": {"calibration.seqlen": 128},
    "gptaq": {"gptq": {"asymmetric": 0.5}},
    "tune": {"tune": {"steps": 2, "batch_size": 2}},
    "all Hessians": {"gptq": {"true_sequential": False}},
}


@pytest.fixture(scope="module")
def wide(make_model: Callable[..., Path]) -> Path:
    return make_model(hidden_size=128, intermediate_size=768, num_hidden_layers=1)


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_it_is_no_less_than_what_a_run_takes(
    changes: dict[str, Any], wide: Path, gptq: Recipe, tmp_path: Path
) -> None:
    """And not twice as much: what a matrix library needs to itself is not seen here."""
    recipe = gptq.updated({"scales.steps": 0, **changes})
    told = forecast(make_plan(wide, recipe), recipe).device_peak
    with ledger() as seen:
        quantize(wide, tmp_path / "out", recipe, QuantizeOptions(device=NAME))
    assert told / 2 < seen.peak < 1.15 * told


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return seventy_billion(tmp_path_factory.mktemp("large") / "llama-70b")


@pytest.mark.parametrize(
    ("changes", "memory", "fits", "change"),
    [
        ({}, 24 * 2**30, True, None),
        ({}, 21 * GB, False, "--dtype bfloat16"),
        ({}, 20 * GB, False, "--dtype bfloat16 and calibration.batch_size 1 in the recipe"),
        ({}, 8 * GB, False, None),
        ({"method": "rtn"}, 8 * GB, True, None),
        ({"method": "rtn"}, 1 * GB, False, None),
    ],
    ids=["24 GiB", "21 GB", "20 GB", "8 GB", "8 GB without a text", "1 GB"],
)
def test_a_block_of_70b_on_one_card(
    changes: dict[str, Any], memory: int, fits: bool, change: str | None, large: Path
) -> None:
    recipe = Recipe().updated(changes)
    told = device_fit(make_plan(large, recipe), recipe, 4, memory)
    assert told == DeviceFit(memory, fits, change)


def test_the_command_says_it(run: Run, model: Path) -> None:
    told = run("plan", model, "--group-size", "32", "--gpu-memory", "24GiB")
    assert told.code == 0, told.err
    assert "fits in 25.77 GB" in " ".join(told.out.split())
    told = run("plan", model, "--group-size", "32", "--gpu-memory", "1MB", "--json")
    facts = json.loads(told.out)
    told_of_it = [facts[f"device_{what}"] for what in ("memory_bytes", "fits", "fits_with")]
    assert told_of_it == [1_000_000, False, None]
    told = run("plan", model, "--group-size", "32", "--gpu-memory", "1MB")
    assert "does not fit in 1.00 MB; quantize on the CPU" in " ".join(told.out.split())


@pytest.mark.parametrize(
    ("size", "says"),
    [("much", "--gpu-memory 'much' is not a size"), ("0", "--gpu-memory 0 holds no model")],
)
def test_a_size_that_is_none(run: Run, model: Path, size: str, says: str) -> None:
    told = run("plan", model, "--gpu-memory", size)
    assert (told.code, says in told.err) == (2, True)


def test_memory_that_torch_does_not_tell() -> None:
    assert device_memory(torch.device("cpu")) is None
    assert device_memory(torch.device(NAME)) is None
