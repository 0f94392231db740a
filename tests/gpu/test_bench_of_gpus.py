"""bench/gpu on the CPU with small shapes: that the first minutes on a GPU do not end in a typo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu" / "run.py"
STEPS = ("rounding", "models", "block", "large", "products")


def run(folder: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    out = folder / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--tiny", "--out", str(out), *arguments],
        capture_output=True,
        text=True,
    )
    assert out.exists(), done.stderr
    return done.returncode, json.loads(out.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def told(
    make_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What a whole run says of a small model."""
    model = make_model(max_position_embeddings=512)
    code, found = run(tmp_path_factory.mktemp("gpu"), "--model", str(model), "--group", "32")
    assert {s: found[s].get("error") for s in STEPS} == dict.fromkeys(STEPS)
    assert code == 0
    return found


def test_every_step_says_what_it_is_there_for(told: dict[str, Any]) -> None:
    for method in told["rounding"]["small"].values():
        assert method["modules"] == method["same_digest"] == 14
        assert method["equal_codes"] == 1.0
    found = told["models"]["small"]
    kl = found["kl_nats_per_token"]
    assert 0 < kl["cpu float32"] < 1
    assert kl["reference"] != kl["cpu float32"], "another dtype gives other numbers"
    assert abs(kl["reference"] - kl["cpu float32"]) < 0.2 * kl["cpu float32"]
    for speeds in (found["speeds"]["reference"], told["large"]["cpu"]):
        assert speeds["decode_tokens_per_second"] > 0
        assert speeds["served_tokens_per_second"] > 0
        assert speeds["served"] == "run anew"  # not on a GPU
        assert speeds["prefill_tokens_per_second"] > 0
    assert told["block"]["block_seconds"] == sum(told["block"]["seconds"].values())


def test_cells_are_checked_and_held_against_the_goal(told: dict[str, Any]) -> None:
    found = told["products"]
    cells = found["cells"]
    assert {(*c["shape"], c["rows"]) for c in cells} == {
        (*s, m) for s in ((128, 128), (64, 256)) for m in (1, 5)
    }
    assert all(c["relative_error"] < 0.01 for c in cells)
    assert found["not_measured"] == 0
    for spec, goal in found["goals"].items():
        mine = [c for c in cells if c["spec"] == spec]
        best = [
            max(c["speedup"] for c in mine if (c["shape"], c["rows"]) == (s, m))
            for s in ([128, 128], [64, 256])
            for m in (1, 5)
        ]
        assert goal["slowest"] == min(best)
        assert goal["kept"] == (min(best) >= 3.3)


def test_failures_and_missing_time_are_told(tmp_path: Path) -> None:
    code, found = run(
        tmp_path, "--model", str(tmp_path / "gone"), "--steps", "rounding,block,products",
        "--budget", "0",
    )  # fmt: skip
    assert code == 1
    assert "gone" in found["rounding"]["error"]
    assert found["block"]["block_seconds"] > 0
    assert found["products"]["cells"] == []
    assert found["products"]["not_measured"] > 0


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--out", str(tmp_path / "x.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 2
    assert "finds no GPU" in done.stderr
