"""Two models on the same items: what one gained and the other lost, and whether that is more than
chance.

Accuracies of two models on one set of items are dependent, mostly right and wrong together; only
the items on which they differ say anything. So flips are counted both ways, the difference has the
standard error of the item-by-item differences, and McNemar's test asks whether flips go one way
more than a fair coin's would: exactly, by the binomial distribution.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmquant.errors import UsageError
from llmquant_eval.report.results import PairedMetric, TaskResult


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value that ``lost`` and ``gained`` flips are equally likely; 1 where there
    are none."""
    from scipy.stats import binomtest  # seconds to import, and only tasks need it

    flips = lost + gained
    return float(binomtest(lost, flips).pvalue) if flips else 1.0


def paired_metric(reference: str, candidate: str) -> PairedMetric:
    """Compare two strings of ``1`` (right) and ``0`` (wrong) over the same items in the same order.

    Raises:
        UsageError: they are not equally long.
    """
    if len(reference) != len(candidate):
        raise UsageError(
            f"{len(reference)} items of the reference cannot be paired with {len(candidate)}"
        )
    pairs = list(zip(reference, candidate, strict=True))
    lost, gained = pairs.count(("1", "0")), pairs.count(("0", "1"))
    items = len(pairs)
    difference = (gained - lost) / items
    error = None
    if items > 1:
        error = math.sqrt(((gained + lost) / items - difference**2) / (items - 1))
    return PairedMetric(
        lost=lost,
        gained=gained,
        both_right=pairs.count(("1", "1")),
        both_wrong=pairs.count(("0", "0")),
        difference=difference,
        standard_error=error,
        p_value=mcnemar(lost, gained),
    )


def with_pairs(candidate: TaskResult, reference: TaskResult) -> TaskResult:
    """The candidate's result with every metric that both have item by item.

    Raises:
        UsageError: the two did not answer the same items.
    """
    if candidate.items_sha256 != reference.items_sha256:
        raise UsageError(
            f"task {candidate.task}: the two models were not given the same items; run them in one evaluation"
        )
    paired = {
        name: paired_metric(reference.metrics[name].correct or "", own.correct)
        for name, own in candidate.metrics.items()
        if own.correct is not None
        and name in reference.metrics
        and reference.metrics[name].correct is not None
    }
    return candidate.model_copy(update={"paired": paired})


def paired_tasks(
    candidate: Sequence[TaskResult], reference: Sequence[TaskResult]
) -> list[TaskResult]:
    """:func:`with_pairs` for each task of the candidate; the reference has them all."""
    by_task = {result.task: result for result in reference}
    return [with_pairs(result, by_task[result.task]) for result in candidate]
