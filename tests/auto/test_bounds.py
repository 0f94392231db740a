"""A bound is met by the upper limit of a loss, at a level that all rungs share."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from auto_kit import TOKENS, metric, metric_of, model_result, task
from scipy.stats import t

from llmquant.errors import UsageError
from llmquant_eval.auto.bounds import Bounds, quantile
from llmquant_eval.auto.request import AutoRequest, parse_bound, parse_duration


@pytest.mark.parametrize(
    ("text", "share"),
    [
        pytest.param("2%", 0.02, id="percent"),
        pytest.param("2 %", 0.02, id="with a space"),
        pytest.param("0.02", 0.02, id="a share"),
        pytest.param(None, None, id="not given"),
    ],
)
def test_a_share_is_read(text, share):
    assert parse_bound("--max-kl", text, "0.02") == share


@pytest.mark.parametrize("text", ["", "two", "%", "nan", "inf%", "2%%"])
def test_no_number_names_the_option(text):
    with pytest.raises(UsageError, match=r"--max-kl .* is not a number"):
        parse_bound("--max-kl", text, "0.02")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        pytest.param({}, "say what the model may lose", id="none"),
        pytest.param({"ppl_increase": 2.0}, "--max-ppl-increase 200% is not between", id="200 %"),
        pytest.param({"ppl_increase": 0.0}, "--max-ppl-increase 0% is not", id="nothing"),
        pytest.param({"kl": -0.1}, "--max-kl -0.1 is no divergence", id="negative KL"),
        pytest.param({"kl": 0.0}, "--max-kl 0 is no divergence", id="no KL"),
        pytest.param({"task_drop": 1.0}, "--max-task-drop 100% is not between", id="everything"),
    ],
)
def test_an_impossible_bound_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        Bounds(**given)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        pytest.param("2h", 7200, id="hours"),
        pytest.param("90m", 5400, id="minutes"),
        pytest.param("1h30m", 5400, id="both"),
        pytest.param("1.5 h", 5400, id="a fraction"),
        pytest.param("45s", 45, id="seconds"),
        pytest.param("45", 45, id="no unit"),
    ],
)
def test_a_time_is_read(text, seconds):
    assert parse_duration("--time-budget", text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1h", "soon", "2d", "h"])
def test_no_time_names_the_option(text):
    with pytest.raises(UsageError, match=r"--time-budget .* is not a time"):
        parse_duration("--time-budget", text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"data": ()}, "--data", id="no text"),
        pytest.param({"max_bytes": 5, "fit": 5}, "give one of them", id="two sizes"),
        pytest.param({"fit": 0}, "--fit 0 holds no model", id="no size"),
        pytest.param({"alpha": 0.5}, "--alpha 0.5", id="alpha"),
        pytest.param({"tasks": "arc_easy"}, "give both or neither", id="tasks without a bound"),
        pytest.param({"limit": 3}, "belong to --tasks", id="limit without tasks"),
        pytest.param({"output": Path()}, "no name for a new folder", id="no name"),
        pytest.param({"max_windows": 0}, "--max-windows 0", id="no windows"),
    ],
)
def test_an_impossible_request_is_refused(changes, message, tmp_path):
    given = {"model": "m", "output": tmp_path / "o", "data": ("d",), "bounds": Bounds(kl=0.1)}
    with pytest.raises(UsageError, match=message):
        AutoRequest(**given | changes)


def test_the_limit_of_kl_is_students():
    sums = np.random.default_rng(0).gamma(2.0, 1.0, 25)
    means = sums / TOKENS
    wanted = means.mean() + t.ppf(0.99, 24) * means.std(ddof=1) / 5
    (check,) = Bounds(kl=1.0).checks({"kl_mean": metric_of(sums)}, [], 0.01)
    assert check.value == pytest.approx(means.mean(), rel=1e-12)
    assert check.upper == pytest.approx(wanted, rel=1e-12)


def test_the_limit_of_a_ratio_is_that_of_its_logarithm():
    (check,) = Bounds(ppl_increase=0.5).checks(
        {"perplexity_ratio": metric(1.1, 0.011, 21)}, [], 0.05
    )
    assert check.value == pytest.approx(0.1)
    assert check.upper == pytest.approx(1.1 * math.exp(t.ppf(0.95, 20) * 0.01) - 1)


def test_a_bootstrap_has_as_many_draws_as_blocks():
    found = metric(1.0, 0.1, 4, error_method="block bootstrap")  # 400 tokens, 20 blocks of 20
    assert quantile(found, 0.05) == pytest.approx(t.ppf(0.95, 19))


@pytest.mark.parametrize(
    ("bound", "error", "met"),
    [
        pytest.param(0.02, 0.0001, True, id="clearly below"),
        pytest.param(0.0101, 0.0001, False, id="below, but the limit is not"),
        pytest.param(0.005, 0.0001, False, id="above"),
        pytest.param(0.02, None, False, id="no error is known"),
    ],
)
def test_the_limit_decides(bound, error, met):
    (check,) = Bounds(kl=bound).checks({"kl_mean": metric(0.01, error)}, [], 0.05)
    assert check.met is met


@pytest.mark.parametrize(
    ("lost", "gained", "items", "met"),
    [
        pytest.param(0, 0, 299, True, id="no flip in 299 rules out a point"),
        pytest.param(0, 0, 298, False, id="298 do not"),
        pytest.param(30, 5, 400, False, id="worse"),
        pytest.param(5, 30, 400, True, id="better"),
    ],
)
def test_a_drop_is_tested_exactly(lost, gained, items, met):
    (check,) = Bounds(task_drop=0.01).checks({}, [task(lost, gained, items)], 0.05)
    assert (check.met, check.name) == (met, "drop of mine/acc")
    assert check.value == pytest.approx((lost - gained) / items)


def test_a_task_without_items_that_are_right_or_wrong_is_refused():
    nothing = task(0, 0, 10).model_copy(update={"paired": {}})
    with pytest.raises(UsageError, match="task mine has no right and wrong"):
        Bounds(task_drop=0.01).checks({}, [nothing], 0.05)


def test_several_bounds_are_all_checked():
    bounds = Bounds(ppl_increase=0.02, kl=0.02, task_drop=0.05)
    checks = bounds.checks(model_result(1, 0.01).metrics, [task(0, 0, 299)], 0.05)
    assert [c.name for c in checks] == ["perplexity increase", "KL", "drop of mine/acc"]
    assert all(c.met for c in checks)


def test_looking_often_does_not_let_a_bad_one_pass_more_often():
    """Ten candidates whose true loss is the bound, judged on the same 40 windows, a thousand times:
    any of them passes in at most 5 of 100, and without the shared level in far more."""
    draw, looks, bound = np.random.default_rng(1), 10, 0.02
    passed = {0.05 / looks: 0, 0.05: 0}
    for _ in range(1000):
        shared = draw.gamma(20.0, 1 / 20, 40)  # what the windows have in common
        losses = [shared * draw.gamma(20.0, 1 / 20, 40) * bound * TOKENS for _ in range(looks)]
        metrics = [metric_of(sums) for sums in losses]
        for alpha in passed:
            bounds = Bounds(kl=bound)
            passed[alpha] += any(bounds.checks({"kl_mean": m}, [], alpha)[0].met for m in metrics)
    assert passed[0.05 / looks] <= 70  # 5 %, some skewness of the windows, and chance
    assert passed[0.05] > 150
