"""The knapsack against every choice there is."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmquant.errors import UsageError
from llmquant.planning.allocation.knapsack import Option, solve, undominated

OPTION = st.builds(
    Option, st.integers(0, 60).map(lambda n: n * 96), st.floats(0, 1).map(lambda c: round(c, 4))
)
ITEMS = st.lists(st.lists(OPTION, min_size=1, max_size=4), min_size=1, max_size=5)


def every_choice(items: list[list[Option]], budget: int) -> float:
    """The smallest cost within the budget, by trying all."""
    fits = (c for c in itertools.product(*items) if sum(o.size for o in c) <= budget)
    return min(sum(o.cost for o in c) for c in fits)


@settings(deadline=None, max_examples=60)
@given(ITEMS, st.integers(0, 12_000))
def test_it_finds_what_trying_everything_finds(items: list[list[Option]], spare: int) -> None:
    budget = sum(min(o.size for o in options) for options in items) + spare
    found = solve(items, budget)
    best = every_choice(items, budget)
    assert (
        found.size
        == sum(options[i].size for options, i in zip(items, found.chosen, strict=True))
        <= budget
    )
    assert found.cost == sum(
        options[i].cost for options, i in zip(items, found.chosen, strict=True)
    )
    assert best <= found.cost <= best * (1 + 1e-5) + 1e-12
    assert found.bound <= best * (1 + 1e-9) + 1e-12
    assert found.gap <= 1e-5


def test_costs_of_very_different_magnitude_are_all_minded() -> None:
    items = [[Option(1, 1e-9), Option(2, 1e-10)], [Option(1, 1.0), Option(5, 1e-9)]]
    assert solve(items, 7).chosen == (1, 1)
    assert solve(items, 6).chosen == (0, 1)
    assert solve(items, 3).chosen == (1, 0)


def test_a_byte_over_the_budget_is_over_it() -> None:
    items = [[Option(10**9 + 1, 5.0), Option(2 * 10**9 + 7, 1.0)] for _ in range(3)]
    exact = 2 * (10**9 + 1) + 2 * 10**9 + 7
    assert sorted(solve(items, exact).chosen) == [0, 0, 1]
    assert solve(items, exact - 1).chosen == (0, 0, 0)


def test_too_small_a_budget_is_refused() -> None:
    with pytest.raises(UsageError, match="the smallest choice takes 30 bytes, the budget is 29"):
        solve([[Option(10, 1.0)], [Option(20, 1.0), Option(25, 0.5)]], 29)


def test_options_that_are_beaten_are_dropped() -> None:
    options = [
        Option(5, 2.0),
        Option(4, 2.0),
        Option(4, 3.0),
        Option(9, 1.0),
        Option(10, 1.0),
        Option(6, 2.5),
    ]
    assert undominated(options) == [1, 3]


def test_a_large_problem_is_solved_to_a_small_gap() -> None:
    """80 blocks of 4 items with 25 options each: what a 70B model gives."""
    draw = random.Random(0)
    items = []
    for weights in (62_914_560, 67_108_864, 469_762_048, 234_881_024) * 80:
        sensitivity = math.exp(draw.gauss(0, 1.5)) * math.sqrt(weights)
        items.append(
            [
                Option(
                    weights * (bits * group + extra) // group // 8,
                    sensitivity * 4.0**-bits * group**0.3 / extra,
                )
                for bits in (2, 3, 4, 8)
                for group in (32, 64, 128)
                for extra in (16, 16 + bits)
            ]
            + [Option(weights * 2, 0.0)]
        )
    total = sum(options[-1].size // 2 for options in items)
    found = solve(items, int(total * 4.5 / 8))
    assert found.size <= total * 4.5 / 8
    assert found.gap <= 1e-5


def test_nothing_of_the_solver_reaches_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(1)
    items = [
        [Option(draw.randrange(10**6), draw.random() ** 9) for _ in range(20)] for _ in range(60)
    ]
    solve(items, sum(min(o.size for o in i) for i in items) + 10**7)
    assert capfd.readouterr().out == ""
