"""Measured: what quantization costs the shipped model, against marks measured once with other tools on the same model.

Marks (docs/evaluation.md): llm-compressor 0.14 GPTQ with static act-order, 64 windows of 512 tokens of English Wikipedia,
float32 arithmetic, the first 120 windows of 512 tokens of ``heldout.txt``. Ours: the same sizes, another part of the same text,
mean over three calibration seeds. Nothing here is compared to the clock.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmquant import Recipe, inspect, load_recipe, quantize
from llmquant_eval.evaluate import evaluate
from llmquant_eval.plan import Request
from llmquant_eval.report import Report

pytestmark = pytest.mark.quality

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
HELDOUT = f"file:{MODEL / 'heldout.txt'}"
SEEDS = (0, 1, 2)
CALIBRATION = {
    "calibration.source": f"file:{MODEL / 'calibration.txt'}",
    "calibration.nsamples": 64,
    "calibration.seqlen": 512,
}


def measured(folders: list[Path]) -> Report:
    """Perplexity and KL of packed folders against the original, in float32 as the marks were taken."""
    request = Request(
        candidates=tuple(map(str, folders)), text=HELDOUT, reference=str(MODEL), protocol=None, window=512,
        max_windows=120, dtype="float32", device="cpu", kernel="dense", batch_size=8, cost=False, noise_floor=False,
    )  # fmt: skip
    return evaluate(request)


def runs(tmp_path: Path, recipe: Recipe, seeds: tuple[int, ...]) -> list[Path]:
    folders = [tmp_path / f"seed{seed}" for seed in seeds]
    for folder, seed in zip(folders, seeds, strict=True):
        quantize(MODEL, folder, recipe.updated({"seed": seed}))
    return folders


def values(report: Report, metric: str) -> list[float]:
    return [m.metrics[metric].value for m in report.models if m.role == "candidate"]


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        pytest.param({}, 0.01454, id="W4 g128 sym"),
        pytest.param({"weights.symmetric": False}, 0.01171, id="W4 g128 asym"),
        pytest.param({"weights.group_size": 32}, 0.01057, id="W4 g32 sym"),
        pytest.param({"weights.bits": 3}, 0.0706, id="W3 g128 sym"),
        pytest.param({"weights.bits": 2, "weights.group_size": 32}, 0.366, id="W2 g32 sym"),
    ],
)
def test_gptq_kl_is_at_most_llm_compressors(tmp_path: Path, changes: dict[str, object], mark: float) -> None:
    recipe = load_recipe("gptq-w4g128").updated({**CALIBRATION, **changes})
    kl = values(measured(runs(tmp_path, recipe, SEEDS)), "kl_mean")
    print(f"KL per seed {[round(k, 5) for k in kl]}, mean {sum(kl) / len(kl):.5f}, mark {mark}")
    assert sum(kl) / len(kl) <= mark


def test_awq_kl_is_at_most_llm_compressors(tmp_path: Path) -> None:
    """KL 0.0479 for llm-compressor's AWQ. One seed and the symmetric grid, to keep the suite short; docs/quality.md has more."""
    (kl,) = values(measured(runs(tmp_path, load_recipe("awq-w4g128").updated(CALIBRATION), (0,))), "kl_mean")
    print(f"KL {kl:.5f}")
    assert kl <= 0.0479


def test_asymmetric_calibration_beats_plain_gptq_at_three_bits(tmp_path: Path) -> None:
    recipe = load_recipe("gptq-w4g128").updated({**CALIBRATION, "weights.bits": 3})
    folders = [tmp_path / "plain", tmp_path / "asymmetric"]
    for folder, strength in zip(folders, (0.0, 0.5), strict=True):
        quantize(MODEL, folder, recipe.updated({"gptq.asymmetric": strength}))
    plain, asymmetric = values(measured(folders), "kl_mean")
    print(f"KL plain {plain:.5f}, asymmetric {asymmetric:.5f}")
    assert asymmetric <= 0.9 * plain


def test_the_best_three_bit_recipe_is_at_most_nine_tenths_of_autorounds(tmp_path: Path) -> None:
    """AutoRound 0.15 at its default 200 iterations: KL 0.0473. One seed, to keep the suite short; docs/decisions.md has more."""
    recipe = load_recipe("best-w3g128").updated(CALIBRATION)
    (kl,) = values(measured(runs(tmp_path, recipe, (0,))), "kl_mean")
    print(f"KL {kl:.5f}")
    assert kl <= 0.9 * 0.0473


def test_rtn_costs_no_more_than_min_max(tmp_path: Path) -> None:
    ours = load_recipe("rtn-w4g128")
    min_max = ours.updated({"scales.steps": 0})
    folders = [tmp_path / "ours", tmp_path / "minmax"]
    for folder, recipe in zip(folders, (ours, min_max), strict=True):
        quantize(MODEL, folder, recipe)
    searched, plain = values(measured(folders), "perplexity_ratio")
    assert searched <= plain
    assert searched <= 1.0702


def test_int8_costs_at_most_a_fifth_of_a_percent(tmp_path: Path) -> None:
    recipe = load_recipe("gptq-w8").updated(CALIBRATION)
    (ratio,) = values(measured(runs(tmp_path, recipe, (0,))), "perplexity_ratio")
    assert ratio <= 1.002


def test_symmetric_g128_takes_at_most_4_3_bits(tmp_path: Path) -> None:
    quantize(MODEL, tmp_path / "q", load_recipe("rtn-w4g128"))
    assert inspect(tmp_path / "q").bits_per_weight == 4.125
