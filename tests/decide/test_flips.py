"""The exact test of flips: its level by simulation, its interval by its definition."""

from __future__ import annotations

import math
from bisect import bisect_left

import numpy as np
import pytest
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from llmquant_eval.decide.flips import Flips, score

ALPHA, POWER, PAIRS = 0.05, 0.8, 5_000
MARGIN = 0.01
# Standard errors of a share of 5,000 pairs that is the level: four of them are never exceeded by
# chance in these many cells.
NOISE = 4 * math.sqrt(ALPHA * (1 - ALPHA) / PAIRS)


def drawn(items: int, lost: float, gained: float, seed: int) -> list[tuple[Flips, int]]:
    """Simulated samples, equal ones once with their count."""
    draw = np.random.default_rng(seed)
    counts = draw.multinomial(items, [lost, gained, 1 - lost - gained], PAIRS)[:, :2]
    distinct, times = np.unique(counts, axis=0, return_counts=True)
    return [
        (Flips(int(a), int(b), items), int(n)) for (a, b), n in zip(distinct, times, strict=True)
    ]


def share(samples: list[tuple[Flips, int]], says: str, margin: float = MARGIN) -> float:
    """How many of the samples are decided, ``p_not_worse`` or ``p_worse``.

    P-values fall as the statistic grows, so the border is found by halving.
    """
    sign = 1 if says == "p_not_worse" else -1

    def statistic(sample: tuple[Flips, int]) -> float:
        flips = sample[0]
        at = np.asarray(float(flips.gained)), np.asarray(float(flips.lost))
        return -sign * float(score(*at, flips.items, -margin))

    ordered = sorted(samples, key=statistic)
    border = bisect_left(
        range(len(ordered)), True, key=lambda i: getattr(ordered[i][0], says)(margin) > ALPHA
    )
    return sum(times for _, times in ordered[:border]) / PAIRS


@pytest.mark.parametrize("items", [50, 280, 1000, 5000])
@pytest.mark.parametrize("discordant", [0.01, 0.05, 0.3])
def test_a_loss_of_the_margin_ships_no_more_often_than_the_level(items, discordant):
    lost, gained = (discordant + MARGIN) / 2, (discordant - MARGIN) / 2
    assert share(drawn(items, lost, gained, items), "p_not_worse") <= ALPHA + NOISE


@pytest.mark.parametrize("items", [50, 1000])
@pytest.mark.parametrize("discordant", [0.01, 0.1])
def test_a_loss_of_the_margin_is_no_oftener_called_worse(items, discordant):
    lost, gained = (discordant + MARGIN) / 2, (discordant - MARGIN) / 2
    assert share(drawn(items, lost, gained, 1), "p_worse") <= ALPHA + NOISE


def test_the_normal_approximation_would_be_too_generous():
    """Why it is exact: 280 items, one in a hundred flips, and always to the worse."""
    z = float(score(np.asarray(0.0), np.asarray(0.0), 280, -MARGIN))
    assert norm.sf(z) <= ALPHA
    assert (1 - MARGIN) ** 280 > ALPHA + 0.009
    assert Flips(0, 0, 280).p_not_worse(MARGIN) > ALPHA


@pytest.mark.parametrize("items", [400, 5000])
@pytest.mark.parametrize("discordant", [0.02, 0.1, 0.3])
@pytest.mark.parametrize("difference", [-0.01, 0.0])
def test_power_is_what_the_detectable_distance_says(items, discordant, difference):
    lost, gained = (discordant - difference) / 2, (discordant + difference) / 2
    expected = Flips(round(items * lost), round(items * gained), items)
    margin = 0.02
    for _ in range(50):  # the margin from which the truth is just that far away
        margin = expected.detectable(margin, ALPHA, POWER) - expected.difference
    shipped = share(
        drawn(items, expected.lost / items, expected.gained / items, 2), "p_not_worse", margin
    )
    assert shipped == pytest.approx(POWER, abs=0.05)


@pytest.mark.parametrize(
    "flips", [Flips(12, 2, 50), Flips(3, 5, 400), Flips(0, 4, 30), Flips(40, 38, 900)]
)
def test_the_interval_is_where_the_likelihood_given_the_difference_says(flips):
    """Tango's ends: the score there, with the variance at the rate of flips that is most likely
    under that difference (found numerically here), is the normal quantile."""
    for end, sign in zip(flips.interval(0.9), (1, -1), strict=True):

        def unlikely(rate: float, end: float = end) -> float:
            rest = 1 - 2 * rate - end
            if rate + end <= 0 or rest <= 0:
                return math.inf
            same = flips.items - flips.lost - flips.gained
            return -(
                flips.lost * math.log(rate) + flips.gained * math.log(rate + end) + same * math.log(rest)
            )  # fmt: skip

        low = max(1e-9, 1e-9 - end)
        rate = minimize_scalar(
            unlikely, bounds=(low, (1 - end) / 2 - 1e-9), method="bounded", options={"xatol": 1e-10}
        ).x
        variance = (2 * rate + end - end**2) / flips.items
        assert sign * (flips.difference - end) / math.sqrt(variance) == pytest.approx(
            norm.ppf(0.95), rel=1e-3
        )


@pytest.mark.parametrize(
    "flips",
    [
        Flips(0, 0, 1),
        Flips(1, 0, 1),
        Flips(0, 1, 1),
        Flips(10, 0, 10),
        Flips(0, 10, 10),
        Flips(5, 5, 10),
    ],
)
def test_every_table_has_numbers(flips):
    low, high = flips.interval(0.9)
    assert -1 <= low <= flips.difference <= high <= 1
    assert 0 <= flips.p_not_worse(MARGIN) <= 1
    assert 0 <= flips.p_worse(MARGIN) <= 1
    assert flips.detectable(MARGIN, ALPHA, POWER) > 0


def test_identical_answers_ship_when_there_are_enough_of_them():
    assert Flips(0, 0, 50).p_not_worse(MARGIN) > ALPHA
    needed = Flips(0, 0, 50).needed(MARGIN, ALPHA, POWER)
    assert needed == 299
    assert Flips(0, 0, needed).p_not_worse(MARGIN) <= ALPHA
    assert Flips(0, 0, needed - 1).p_not_worse(MARGIN) > ALPHA


def test_large_samples_agree_with_the_approximation():
    flips = Flips(1700, 1650, 100_000)
    z = float(score(np.asarray(1650.0), np.asarray(1700.0), 100_000, -0.002))
    assert flips.p_not_worse(0.002) == pytest.approx(float(norm.sf(z)), rel=0.02)
