"""The capital is a fair game: held against its definition, term by term, and against chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import kstest

from llmquant.drift.evidence import EXPERTS, Evidence, densities, waiting

EDGES = (0.0, 1.0, 2.0, 3.0)


def plays(
    sample: list[float], stream: list[float], seed: str = "s"
) -> tuple[Evidence, list[float]]:
    counts = np.bincount(np.searchsorted(EDGES, sample, side="right"), minlength=5).tolist()
    evidence, ranks = Evidence(EDGES, counts, seed), []
    rank = evidence._rank
    evidence._rank = lambda number: ranks.append(rank(number)) or ranks[-1]
    for number in stream:
        evidence.add(number)
    return evidence, ranks


@pytest.mark.parametrize("expert", range(EXPERTS))
def test_every_bet_is_at_fair_odds(expert):
    total, _ = quad(lambda p: float(densities(p)[expert]), 0, 1, points=[0.5])
    assert total == pytest.approx(1, abs=1e-6)
    assert min(densities(p)[expert] for p in np.linspace(0, 1, 101)) >= 0


def test_the_capital_is_the_sum_over_all_moments_to_begin():
    stream = np.random.default_rng(0).normal(1.5, 1, 40).tolist()
    evidence, ranks = plays([0.5, 1.5, 2.5], stream)
    bets = np.array([densities(p) for p in ranks])
    expected = waiting(len(ranks))
    for start in range(len(ranks)):
        weight = waiting(start) - waiting(start + 1)
        expected += weight * bets[start:].prod(0).mean()
    assert evidence.value == pytest.approx(expected, rel=1e-12)


def test_ranks_are_uniform_however_small_the_sample():
    draw = np.random.default_rng(1)
    found = []
    for i in range(400):
        numbers = draw.exponential(1.5, 12).tolist()
        found += plays(numbers[:4], numbers[4:], f"s{i}")[1]
    assert kstest(found, "uniform").pvalue > 0.01


@pytest.mark.parametrize(
    ("mean", "spread", "most"),
    [
        pytest.param(2.5, 1.0, 120, id="larger"),
        pytest.param(0.5, 1.0, 120, id="smaller"),
        pytest.param(1.5, 3.0, 120, id="wider"),
        pytest.param(1.5, 0.1, 120, id="narrower"),
    ],
)
def test_a_change_is_found_after_a_long_quiet_time(mean, spread, most):
    draw = np.random.default_rng(2)
    quiet, changed = draw.normal(1.5, 1, 3000), draw.normal(mean, spread, most)
    evidence, _ = plays(draw.normal(1.5, 1, 200).tolist(), quiet.tolist())
    assert evidence.value < 10
    assert max(evidence.add(number) for number in changed.tolist()) > 1000


def test_it_goes_on_where_it_was():
    stream = np.random.default_rng(3).normal(2, 1, 60).tolist()
    whole, _ = plays([0.5, 1.5], stream)
    part, _ = plays([0.5, 1.5], stream[:30])
    second = Evidence(EDGES, [0] * 5, "s")
    second.restore(part.counts, part.seen, part.capital.tolist())
    assert second.value == part.value
    assert [second.add(number) for number in stream[30:]][-1] == whole.value
