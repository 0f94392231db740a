"""What a candidate may lose, and whether a measurement says that it loses no more.

A bound is met when the *upper confidence limit* of the measured loss is not above it, not when the
measured loss is. Every rung of a ladder is one look at the same held-out text, and the more often
one looks the likelier a candidate passes by luck. So each rung gets an equal share of ``alpha``
(Bonferroni): the probability that any candidate passes whose true loss is above the bound is at
most ``alpha``, whichever of them is chosen. Where several bounds are given a candidate must meet
all of them, which makes a wrong choice less likely, so they need no further share.

* KL: ``mean + t · error``, Student's t over windows (over blocks where the error is a bootstrap's).
* Perplexity: the same for the logarithm of the ratio, whose error is the relative one.
* Tasks: lost and gained items, Tango's test with its exact p-value
  (:mod:`llmquant_eval.decide.flips`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from llmquant.errors import UsageError
from llmquant_eval.auto.schema import Check
from llmquant_eval.decide.flips import Flips
from llmquant_eval.report.results import Metric, PairedMetric, TaskResult
from llmquant_eval.scoring.window_layout import FEW_WINDOWS

_PREFERRED = ("acc", "exact_match")
"""Of a task's metrics, the one to go by; else its first one with a right and wrong per item."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """The acceptable losses, all of which hold; None: not asked for.

    Attributes:
        ppl_increase: of perplexity, as a share of the original's.
        kl: mean divergence in nats per token.
        task_drop: of each task's accuracy, as a share of its items.

    Raises:
        UsageError: none is given, or one that is not possible.
    """

    ppl_increase: float | None = None
    kl: float | None = None
    task_drop: float | None = None

    def __post_init__(self) -> None:
        if self.ppl_increase is self.kl is self.task_drop is None:
            raise UsageError(
                "say what the model may lose: --max-ppl-increase 2%, --max-kl 0.02 or --max-task-drop 1%"
            )
        for option, value, example in (
            ("--max-ppl-increase", self.ppl_increase, "2%"),
            ("--max-task-drop", self.task_drop, "1%"),
        ):
            if value is not None and not 0 < value < 1:
                raise UsageError(
                    f"{option} {100 * value:.4g}% is not between 0% and 100%; write a share such as {example}"
                )
        if self.kl is not None and not 0 < self.kl < math.inf:
            raise UsageError(
                f"--max-kl {self.kl:g} is no divergence; give nats per token above 0, such as 0.02"
            )

    def texts(self) -> list[str]:
        """In words, one for each."""
        words = {
            "perplexity at most {} above the original's": self.ppl_increase,
            "accuracy of each task at most {} below the original's": self.task_drop,
        }
        found = [text.format(f"{100 * v:.4g} %") for text, v in words.items() if v is not None]
        return found + ([] if self.kl is None else [f"KL at most {self.kl:g} nats per token"])

    def checks(
        self, metrics: Mapping[str, Metric], tasks: Sequence[TaskResult], alpha: float
    ) -> list[Check]:
        """What a measurement says of each bound, at level ``alpha``."""
        found = []
        if self.ppl_increase is not None:
            found.append(_ppl(metrics["perplexity_ratio"], self.ppl_increase, alpha))
        if self.kl is not None:
            found.append(_kl(metrics["kl_mean"], self.kl, alpha))
        if self.task_drop is not None:
            found += list(_drops(tasks, self.task_drop, alpha))
        return found


def quantile(metric: Metric, alpha: float) -> float:
    """Student's t, as many standard errors as a one-sided limit at level ``alpha`` is away."""
    from scipy.stats import t

    draws = metric.windows
    if metric.error_method == "block bootstrap":
        draws = round(metric.tokens / math.ceil(math.sqrt(metric.tokens)))
    elif metric.error_method == "by chat":  # of which there are at least so many
        draws = FEW_WINDOWS
    return float(t.isf(alpha, max(draws - 1, 1)))


def _ppl(metric: Metric, bound: float, alpha: float) -> Check:
    upper = None
    if metric.standard_error is not None:
        relative = metric.standard_error / metric.value
        upper = math.expm1(math.log(metric.value) + quantile(metric, alpha) * relative)
    return _check("perplexity increase", metric.value - 1, upper, bound)


def _kl(metric: Metric, bound: float, alpha: float) -> Check:
    upper = None
    if metric.standard_error is not None:
        upper = metric.value + quantile(metric, alpha) * metric.standard_error
    return _check("KL", metric.value, upper, bound)


def _check(name: str, value: float, upper: float | None, bound: float) -> Check:
    met = upper is not None and upper <= bound
    return Check(name=name, value=value, upper=upper, bound=bound, met=met)


def _drops(tasks: Sequence[TaskResult], bound: float, alpha: float) -> Iterator[Check]:
    for task in tasks:
        name, paired = _main_metric(task)
        flips = Flips(paired.lost, paired.gained, task.items)
        low, _ = flips.interval(1 - 2 * alpha)
        met = flips.p_not_worse(bound) <= alpha
        yield Check(
            name=f"drop of {task.task}/{name}",
            value=0.0 - flips.difference,
            upper=0.0 - low,
            bound=bound,
            met=met,
        )


def _main_metric(task: TaskResult) -> tuple[str, PairedMetric]:
    """Raises UsageError for a task without a right and wrong per item."""
    if not task.paired:
        raise UsageError(
            f"task {task.task} has no right and wrong per item, so --max-task-drop cannot be tested on it; leave it out"
        )
    name = next((n for n in _PREFERRED if n in task.paired), next(iter(task.paired)))
    return name, task.paired[name]
