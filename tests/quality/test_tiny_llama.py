"""Measured: what quantization costs the shipped model, against marks measured once with other tools
on the same model.

Marks (docs/evaluation.md): llm-compressor 0.14 GPTQ with static act-order, 64 windows of 512 tokens
of English Wikipedia, float32 arithmetic, the first 120 windows of 512 tokens of ``heldout.txt``.
docs/quality.md repeats that with three seeds for every cell. Here one seed, a quarter of the
calibration text and a third of the evaluation text keep it short, and make it no easier: less
calibration costs us 8% (W4 g128 sym, KL 0.0128 instead of 0.0119), which the marks do not pay. The
first 40 windows cost less than 120 (0.0125 instead of 0.0128), so marks are multiplied by that.
Nothing here is compared to the clock.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from llmquant import Recipe, inspect, load_recipe, quantize
from llmquant_eval.report.schema import Report
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request

pytestmark = pytest.mark.quality

MODEL = Path(__file__).parents[2] / "examples" / "tiny-llama"
HELDOUT = f"file:{MODEL / 'heldout.txt'}"
WINDOWS = 40
OF_MARKS = 0.0125 / 0.0128  # KL on the first 40 windows for KL on the marks' 120
CALIBRATION = {
    "calibration.source": f"file:{MODEL / 'calibration.txt'}",
    "calibration.nsamples": 16,
    "calibration.seqlen": 512,
}


def measured(folders: list[Path]) -> Report:
    """Perplexity and KL of packed folders against the original, in float32 as the marks were
    taken."""
    request = Request(
        candidates=tuple(map(str, folders)),
        text=HELDOUT,
        reference=str(MODEL),
        protocol=None,
        window=512,
        max_windows=WINDOWS,
        dtype="float32",
        device="cpu",
        kernel="dense",
        batch_size=8,
        cost=False,
        noise_floor=False,
    )
    return evaluate(request)


def made(tmp_path: Path, **recipes: Recipe) -> list[Path]:
    return [quantize(MODEL, tmp_path / name, recipe).path for name, recipe in recipes.items()]


def values(report: Report, metric: str) -> list[float]:
    return [m.metrics[metric].value for m in report.models if m.role == "candidate"]


@pytest.mark.parametrize(
    ("changes", "mark"),
    [
        pytest.param({}, 0.01454, id="W4 g128 sym"),
        # The narrowest of them: as much calibration text as the mark had.
        pytest.param(
            {"weights.symmetric": False, "calibration.nsamples": 64},
            0.01171,
            id="W4 g128 asym",
            marks=pytest.mark.long,
        ),
        pytest.param({"weights.group_size": 32}, 0.01057, id="W4 g32 sym", marks=pytest.mark.long),
        pytest.param({"weights.bits": 3}, 0.0706, id="W3 g128 sym", marks=pytest.mark.long),
        pytest.param(
            {"weights.bits": 2, "weights.group_size": 32},
            0.366,
            id="W2 g32 sym",
            marks=pytest.mark.long,
        ),
    ],
)
def test_gptq_kl_is_at_most_llm_compressors(
    tmp_path: Path, changes: dict[str, object], mark: float
) -> None:
    recipe = load_recipe("gptq-w4g128").updated({**CALIBRATION, **changes})
    (kl,) = values(measured(made(tmp_path, ours=recipe)), "kl_mean")
    print(f"KL {kl:.5f}, mark {mark} * {OF_MARKS:.3f} = {mark * OF_MARKS:.5f}")
    assert kl <= mark * OF_MARKS


@pytest.mark.long
def test_awq_kl_is_at_most_llm_compressors(tmp_path: Path) -> None:
    """KL 0.0479 for llm-compressor's AWQ. The symmetric grid alone, to keep the suite short;
    docs/quality.md has more."""
    (kl,) = values(
        measured(made(tmp_path, awq=load_recipe("awq-w4g128").updated(CALIBRATION))), "kl_mean"
    )
    print(f"KL {kl:.5f}, mark {0.0479 * OF_MARKS:.5f}")
    assert kl <= 0.0479 * OF_MARKS


@pytest.mark.long
def test_asymmetric_calibration_beats_plain_gptq_at_three_bits(tmp_path: Path) -> None:
    recipe = load_recipe("gptq-w4g128").updated({**CALIBRATION, "weights.bits": 3})
    folders = made(tmp_path, plain=recipe, asymmetric=recipe.updated({"gptq.asymmetric": 0.5}))
    plain, asymmetric = values(measured(folders), "kl_mean")
    print(f"KL plain {plain:.5f}, asymmetric {asymmetric:.5f}")
    assert asymmetric <= 0.9 * plain


@pytest.mark.long
def test_the_best_three_bit_recipe_is_at_most_nine_tenths_of_autorounds(tmp_path: Path) -> None:
    """AutoRound 0.15 at its default 200 iterations: KL 0.0473. docs/decisions.md has more.

    With all 64 windows: tuning lives on text, a quarter of it gives 0.0439 instead of about 0.038.
    """
    recipe = load_recipe("best-w3g128").updated({**CALIBRATION, "calibration.nsamples": 64})
    (kl,) = values(measured(made(tmp_path, best=recipe)), "kl_mean")
    print(f"KL {kl:.5f}, mark {0.0473 * OF_MARKS:.5f}")
    assert kl <= 0.9 * 0.0473 * OF_MARKS


def test_rtn_costs_no_more_than_min_max(tmp_path: Path) -> None:
    ours = load_recipe("rtn-w4g128")
    min_max = ours.updated({"scales.steps": 0})
    searched, plain = values(
        measured(made(tmp_path, ours=ours, min_max=min_max)), "perplexity_ratio"
    )
    print(f"perplexity ratio {searched:.5f}, min-max {plain:.5f}")
    assert searched <= plain
    assert searched <= 1.0702


@pytest.mark.long
def test_int8_costs_at_most_a_fifth_of_a_percent(tmp_path: Path) -> None:
    recipe = load_recipe("gptq-w8").updated(CALIBRATION)
    (ratio,) = values(measured(made(tmp_path, int8=recipe)), "perplexity_ratio")
    print(f"perplexity ratio {ratio:.5f}")
    assert ratio <= 1.002


def test_symmetric_g128_takes_at_most_4_3_bits(tmp_path: Path) -> None:
    quantize(MODEL, tmp_path / "q", load_recipe("rtn-w4g128"))
    assert inspect(tmp_path / "q").bits_per_weight == 4.125
