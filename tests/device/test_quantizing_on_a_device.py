"""Every way of quantizing, with the work on a device: the same folder, nothing on the wrong side,
no wait in the loops, one block at a time."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nearly_equal import check_nearly_equal
from pretend_device import NAME, WaitedError, ledger, no_waiting

from llmquant.algorithms import block_tuning
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.quantization.options import QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.quantization.steps import rounding
from llmquant.recipe import Recipe
from llmquant.stats import InputStats, PairStats

pytestmark = pytest.mark.device
columns = sys.modules["llmquant.algorithms.gptq"]  # the package has a function of that name
TUNE = {"steps": 4, "lr": 0.01, "scale_lr": 0.002, "batch_size": 2, "checks": 2, "patience": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn"},
    "gptq": {},
    "gptq, act-order by group": {"gptq": {"act_order": "group"}},
    "gptq, no order": {"gptq": {"act_order": "off"}},
    "awq+gptq": {"awq": {"grid": 4}},
    "smooth+rtn, W8A8": {
        "method": "rtn",
        "smooth": {},
        "weights": {"bits": 8, "group_size": -1, "activations": "int8-dynamic"},
    },
    "mixed": {"overrides": [{"match": "*down_proj", "bits": 8}]},
    "gptaq": {"gptq": {"asymmetric": 0.5}},
    "descent passes": {"gptq": {"passes": 1}},
    "tune": {"tune": TUNE},
    "rotation": {"rotation": {}},
    "packed embeddings": {"embeddings": {"bits": 8}},
}


@pytest.fixture(params=CHANGES.values(), ids=CHANGES.keys())
def recipe(request: pytest.FixtureRequest, gptq: Recipe) -> Recipe:
    return gptq.updated(request.param)


def test_the_weights_are_nearly_those_of_the_cpu(
    recipe: Recipe, model: Path, tmp_path: Path
) -> None:
    here = quantize(model, tmp_path / "cpu", recipe, QuantizeOptions(device="cpu")).path
    with ledger() as seen:
        there = quantize(model, tmp_path / "device", recipe, QuantizeOptions(device=NAME)).path
    assert seen.to_device > 0
    check_nearly_equal(there, here)


@pytest.fixture
def quiet_loops(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """GPTQ's loop over columns and the statistics may not wait for the device; how often each
    ran."""
    ran: dict[str, int] = {}

    def guard(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            ran[name] = ran.get(name, 0) + 1
            with no_waiting():
                return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    guard(columns, "_visit_block")
    guard(InputStats, "add")
    guard(PairStats, "add_pair")
    guard(block_tuning._Latent, "weight")
    guard(block_tuning, "_squared_error")
    guard(torch.optim.Adam, "step")
    return ran


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"_visit_block", "add"}),
        ({"gptq": {"asymmetric": 0.5}}, {"_visit_block", "add_pair"}),
        ({"tune": TUNE}, {"_visit_block", "add", "weight", "_squared_error", "step"}),
    ],
    ids=["gptq", "gptaq", "tune"],
)
def test_nothing_waits_in_the_loops(
    changes: dict[str, Any], expected: set[str], gptq: Recipe, model: Path, tmp_path: Path,
    quiet_loops: dict[str, int],
) -> None:  # fmt: skip
    quantize(model, tmp_path / "out", gptq.updated(changes), QuantizeOptions(device=NAME))
    assert set(quiet_loops) == expected


def test_a_wait_in_a_loop_is_caught(
    gptq: Recipe, model: Path, tmp_path: Path, quiet_loops: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = columns.round_to_codes
    monkeypatch.setattr(columns, "round_to_codes", lambda w, *a: plain(w + 0 * w.sum().item(), *a))
    with pytest.raises(WaitedError):
        quantize(model, tmp_path / "out", gptq, QuantizeOptions(device=NAME))


def test_a_tensor_left_on_the_cpu_is_caught(
    gptq: Recipe, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = columns._start_grid

    def forgetful(*args: Any) -> Any:
        grid = plain(*args)
        grid.scales = grid.scales.cpu()
        return grid

    monkeypatch.setattr(columns, "_start_grid", forgetful)
    with pytest.raises(RuntimeError, match="same device"):
        quantize(model, tmp_path / "out", gptq, QuantizeOptions(device=NAME))


def block_bytes(model: Path) -> int:
    """Of one block in float32."""
    reader = CheckpointReader(model)
    return sum(4 * math.prod(i.shape) for n, i in reader.tensors.items() if n.startswith("model.layers.0."))  # fmt: skip


def peak_of(recipe: Recipe, model: Path, output: Path) -> int:
    with ledger() as seen:
        quantize(model, output, recipe, QuantizeOptions(device=NAME))
    assert seen.live == seen.base
    return seen.peak


def test_one_block_is_on_the_device_and_not_two(
    rtn: Recipe, gptq: Recipe, make_model: Callable[..., Path], tmp_path: Path
) -> None:
    """Three blocks take no more memory than one."""
    one, three = (make_model(intermediate_size=1024, num_hidden_layers=layers) for layers in (1, 3))
    for name, recipe in {"rtn": rtn, "gptq": gptq}.items():
        alone = peak_of(recipe, one, tmp_path / f"{name}-one")
        assert peak_of(recipe, three, tmp_path / f"{name}-three") < alone + block_bytes(one) / 2


def test_a_second_copy_of_a_block_is_caught(
    gptq: Recipe, make_model: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(intermediate_size=1024, num_hidden_layers=2)
    alone, copies = peak_of(gptq, model, tmp_path / "plain"), []
    plain = columns.gptq

    def hoarding(weight: torch.Tensor, *args: Any) -> Any:
        copies.append(weight.clone())
        return plain(weight, *args)

    monkeypatch.setattr(rounding, "gptq", hoarding)
    with ledger() as seen:
        quantize(model, tmp_path / "hoarded", gptq, QuantizeOptions(device=NAME))
    assert seen.peak > alone + block_bytes(model) / 2
