"""Means of paired scores: level, power, agreement with scipy, what a small sample cannot say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_1samp

from llmquant_eval.decide.means import Differences

ALPHA, POWER = 0.05, 0.8


def each(values, largest=1.0) -> Differences:
    """Every item on its own."""
    return Differences(np.asarray(values, float), np.ones(len(values)), largest)


def test_the_interval_is_scipys():
    values = np.random.default_rng(0).gamma(2.0, 1.0, 80) - 2.0
    theirs = bootstrap(
        (values,),
        np.mean,
        confidence_level=0.9,
        n_resamples=9_999,
        method="BCa",
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert each(values).interval(0.9) == pytest.approx(tuple(theirs), abs=0.02)


def test_t_is_scipys_without_groups():
    values = np.random.default_rng(0).normal(0.02, 0.1, 60)
    theirs = ttest_1samp(values, -0.01, alternative="greater").pvalue
    assert each(values)._t(-0.01) == pytest.approx(theirs)


@pytest.mark.parametrize("shape", ["normal", "skewed", "rare"])
@pytest.mark.parametrize("items", [50, 300])
def test_a_loss_of_the_margin_ships_no_more_often_than_the_level(shape, items, monkeypatch):
    monkeypatch.setattr("llmquant_eval.decide.means._RESAMPLES", 799)
    draw, margin, runs, wrong = np.random.default_rng(items), 0.05, 400, 0
    for _ in range(runs):
        if shape == "normal":
            values = draw.normal(-margin, 0.2, items)
        elif shape == "skewed":
            values = margin - draw.exponential(2 * margin, items)
        else:
            values = -(draw.random(items) < margin).astype(float)
        wrong += each(values).p_not_worse(margin) <= ALPHA
    assert wrong / runs <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


def test_items_of_one_document_count_once():
    """Copies of every item change neither the mean nor what is known of it."""
    values = np.random.default_rng(3).normal(-0.005, 0.05, 60)
    alone = each(values)
    copied = Differences(values * 10, np.full(60, 10.0), 1.0)
    assert copied.mean == pytest.approx(alone.mean)
    assert copied.error == pytest.approx(alone.error)
    assert copied.p_not_worse(0.02) == pytest.approx(alone.p_not_worse(0.02))


def test_power_is_what_the_detectable_difference_says(monkeypatch):
    monkeypatch.setattr("llmquant_eval.decide.means._RESAMPLES", 799)
    draw, margin, runs = np.random.default_rng(5), 0.05, 300
    distance = each(draw.normal(0, 0.2, 100_000)[:400]).detectable(margin, ALPHA, POWER)
    shipped = sum(
        each(draw.normal(distance - margin, 0.2, 400)).p_not_worse(margin) <= ALPHA
        for _ in range(runs)
    )
    assert shipped / runs == pytest.approx(POWER, abs=0.1)


@pytest.mark.parametrize(("items", "ships"), [(1, False), (20, False), (298, False), (299, True)])
def test_identical_scores_need_a_sample(items, ships):
    same = each(np.zeros(items))
    assert (same.p_not_worse(0.01) <= ALPHA) == ships
    assert same.p_worse(0.01) > ALPHA


def test_one_group_decides_nothing():
    alone = Differences(np.array([-30.0]), np.array([100.0]), 1.0)
    assert alone.p_not_worse(0.01) == alone.p_worse(0.01) == 1.0
    assert alone.interval(0.9) == (-math.inf, math.inf)
    assert alone.needed(0.01, ALPHA, POWER) is None
