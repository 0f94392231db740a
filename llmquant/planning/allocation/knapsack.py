"""The multiple-choice knapsack: one option per item, total size within a budget, total cost as
small as can be.

Pure numbers; nothing here knows what an item is. Options that another option of the same item beats
in both size and cost can be in no better solution and are dropped first, which loses nothing. The
rest goes to HiGHS as a mixed-integer program (:func:`scipy.optimize.milp`), which returns beside
its solution a bound that no solution can beat: the two are equal up to the stated gap, or the time
limit was reached and the gap says by how much the answer could still be improved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

from llmquant.errors import UsageError

_TIME_LIMIT_SECONDS = 60.0
# HiGHS allows a constraint to be missed by 1e-6. Sizes are scaled by their common divisor, so that
# one step is far more.
_STEP = 1e-3
_RELAXED_COST = 1e2
_GAP = 1e-6


@dataclass(frozen=True, slots=True)
class Option:
    """One way to have an item: its size (bytes) and what it costs (any unit that adds up)."""

    size: int
    cost: float


@dataclass(frozen=True, slots=True)
class Solution:
    """A choice.

    Attributes:
        chosen: index of each item's option.
        size: total size, at most the budget.
        cost: total cost.
        bound: no choice within the budget costs less than this.
    """

    chosen: tuple[int, ...]
    size: int
    cost: float
    bound: float

    @property
    def gap(self) -> float:
        """By how much, as a fraction of the cost, a better choice could be better. 0 is proved
        optimal."""
        return max(0.0, (self.cost - self.bound) / self.cost) if self.cost > 0 else 0.0


def solve(items: Sequence[Sequence[Option]], budget: int) -> Solution:
    """The cheapest choice of one option per item with a total size of at most ``budget``.

    Args:
        items: at least one option each; sizes and costs not negative, costs finite.
        budget: in the sizes' unit.

    Raises:
        UsageError: even the smallest options together are larger than the budget.
    """
    smallest = sum(min(o.size for o in options) for options in items)
    if smallest > budget:
        raise UsageError(f"the smallest choice takes {smallest} bytes, the budget is {budget}")
    kept = [undominated(options) for options in items]
    picks, bound = _optimize(
        [[options[i] for i in indices] for options, indices in zip(items, kept, strict=True)],
        budget,
    )
    chosen = tuple(indices[pick] for indices, pick in zip(kept, picks, strict=True))
    size = sum(options[i].size for options, i in zip(items, chosen, strict=True))
    assert size <= budget
    return Solution(
        chosen, size, sum(options[i].cost for options, i in zip(items, chosen, strict=True)), bound
    )


def solve_alike(
    items: Sequence[Sequence[Option]],
    budget: int,
    kinds: Mapping[int, Sequence[Hashable]],
) -> Solution:
    """The cheapest choice that gives some items options of one kind.

    Args:
        items, budget: as in :func:`solve`.
        kinds: index of such an item → the kind of each of its options; None is no kind.

    Raises:
        UsageError: none is within the budget.
    """
    found: list[Solution] = []
    shared = set.intersection(*map(set, kinds.values())) - {None}
    for kind in sorted(shared, key=str):
        kept = [
            [k for k in range(len(options)) if i not in kinds or kinds[i][k] == kind]
            for i, options in enumerate(items)
        ]
        offered = [[o[k] for k in ks] for o, ks in zip(items, kept, strict=True)]
        if sum(min(o.size for o in options) for options in offered) <= budget:
            solution = solve(offered, budget)
            chosen = tuple(ks[pick] for ks, pick in zip(kept, solution.chosen, strict=True))
            found.append(replace(solution, chosen=chosen))
    if not found:
        raise UsageError(f"no kind that these items share is within {budget} bytes")
    return replace(min(found, key=lambda s: s.cost), bound=min(s.bound for s in found))


def undominated(options: Sequence[Option]) -> list[int]:
    """Indices of the options that no other one matches or beats in both size and cost, by growing
    size and falling cost."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i].size, options[i].cost, i)):
        if not kept or options[i].cost < options[kept[-1]].cost:
            kept.append(i)
    return kept


def _optimize(items: list[list[Option]], budget: int) -> tuple[list[int], float]:
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    options = [o for item in items for o in item]
    owner = np.repeat(np.arange(len(items)), [len(item) for item in items])
    one_each = csr_array(
        (np.ones(len(options)), (owner, np.arange(len(options)))), shape=(len(items), len(options))
    )
    unit = float(np.gcd.reduce([o.size for o in options])) or 1.0
    costs = np.array([o.cost for o in options])
    sizes = np.array([[o.size for o in options]]) / unit * _STEP
    constraints = [
        LinearConstraint(one_each, 1, 1),
        LinearConstraint(sizes, ub=budget // unit * _STEP),
    ]
    # HiGHS stops within 1e-6 of the optimum, absolutely, so costs are scaled until that is nothing:
    # by the relaxed problem's.
    relaxed = milp(costs / (costs.max() or 1.0), bounds=Bounds(0, 1), constraints=constraints)
    scale = float(relaxed.fun or 0.0) * (costs.max() or 1.0) / _RELAXED_COST or 1.0
    with _stdout_kept():
        solved = milp(
            costs / scale,
            integrality=np.ones(len(options)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={"time_limit": _TIME_LIMIT_SECONDS, "mip_rel_gap": _GAP},
        )
    if solved.x is None:
        raise UsageError(
            f"the allocation found no solution in {_TIME_LIMIT_SECONDS:g} s: {solved.message}; offer fewer options"
        )
    starts = np.cumsum([0, *(len(item) for item in items)])
    picks = [int(np.argmax(solved.x[a:b])) for a, b in pairwise(starts)]
    return picks, float(solved.mip_dual_bound) * scale


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """HiGHS 1.12 writes a line of its own debugging to file descriptor 1 now and then, which would
    break ``--json``."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


__all__ = ["Option", "Solution", "solve", "undominated"]
