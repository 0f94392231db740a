"""Is the candidate's loss on these items smaller than a margin? SHIP, DON'T SHIP, INCONCLUSIVE.

SHIP: for every metric a loss of the margin or more is ruled out at level ``alpha``. DON'T SHIP: for
at least one, a loss beyond the margin is proved at that level. INCONCLUSIVE: the items do not tell.
With several metrics Holm's step-down correction keeps the probability of a wrong verdict on any of
them below ``alpha``.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np

from llmquant.errors import UsageError
from llmquant_eval.decide.flips import Array, Flips
from llmquant_eval.decide.means import Differences
from llmquant_eval.decide.results import Item, ItemResults, check_alike
from llmquant_eval.decide.schema import Decision, Example, FlipCounts, MetricVerdict, Verdict


@dataclass(frozen=True, slots=True)
class Bound:
    """What is asked for.

    Attributes:
        margin: the acceptable loss: of scores between 0 and 1 a share of all items (0.01 is one
            percentage point), of other scores a share of the baseline's mean.
        margins: metric → its own margin.
        alpha: the acceptable probability of a wrong verdict.
        power: with which ``detectable`` and ``needed`` are meant.
        metrics: those to decide by; empty means all.
        examples: how many flips of each kind to show.
        seed: of the bootstrap.
    """

    margin: float
    margins: Mapping[str, float] = field(default_factory=dict)
    alpha: float = 0.05
    power: float = 0.8
    metrics: Sequence[str] = ()
    examples: int = 5
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Paired:
    """The scores of one metric on the same items, so turned that higher is better."""

    name: str
    items: Sequence[tuple[Item, Item]]
    baseline: Array
    candidate: Array
    sign: int

    @property
    def groups(self) -> int | None:
        """How many groups the items come in; None if every item is on its own."""
        names = [i.group for i, _ in self.items]
        found = len({n for n in names if n is not None}) + names.count(None)
        return found if found < len(names) else None

    @property
    def binary(self) -> bool:
        return all(set(np.unique(np.abs(a))) <= {0.0, 1.0} for a in (self.baseline, self.candidate))

    @property
    def share(self) -> bool:
        """Whether all scores are between 0 and 1."""
        both = np.concatenate([self.baseline, self.candidate]) * self.sign
        return bool(both.min() >= 0 and both.max() <= 1)


def compare(baseline: ItemResults, candidate: ItemResults, bound: Bound) -> Verdict:
    """Decide.

    Raises:
        UsageError: the two are not about the same items or metrics, an unknown metric, a margin,
            level or power that is none.
    """
    _check(bound)
    pairs = _paired_items(baseline, candidate)
    check_alike(baseline, candidate)
    paired = _metrics(baseline, candidate, pairs, bound)
    metrics = [_metric(m, bound, bound.alpha / len(paired)) for m in paired]
    decided = _decided(metrics, bound.alpha)
    return Verdict(
        created=datetime.now(UTC),
        baseline=baseline.model,
        candidate=candidate.model,
        decision=_overall([m.decision for m in decided]),
        alpha=bound.alpha,
        power=bound.power,
        metrics=decided,
        notes=[
            *(f"{r.model}: {note}" for r in (baseline, candidate) for note in r.notes),
            *_computed_otherwise(baseline, candidate),
        ],
        versions={name: importlib.metadata.version(name) for name in ("llmquant", "scipy")},
    )


def _computed_otherwise(baseline: ItemResults, candidate: ItemResults) -> Iterator[str]:
    for name, value in baseline.computing.items():
        other = candidate.computing.get(name, value)
        if other != value:
            yield f"{name}: {value} for the baseline, {other} for the candidate, so a part of the difference may come from that"


def _check(bound: Bound) -> None:
    for name, value in (("alpha", bound.alpha), ("power", bound.power)):
        if not 0 < value < 1:
            raise UsageError(f"{name} is {value:g}; give a probability between 0 and 1")
    if bound.alpha >= 0.5:
        raise UsageError(f"alpha is {bound.alpha:g}; a level of 0.5 or more decides nothing")
    for margin in (bound.margin, *bound.margins.values()):
        if not 0 < margin < 1:
            raise UsageError(f"a margin of {margin:.4g} is not between 0 % and 100 %")


def _paired_items(baseline: ItemResults, candidate: ItemResults) -> list[tuple[Item, Item]]:
    """The items of both, in the baseline's order; raises UsageError if they are not the same."""
    if None not in (hashes := {baseline.data_sha256, candidate.data_sha256}) and len(hashes) > 1:
        raise UsageError(
            f"the two were measured on different data: {baseline.data} and {candidate.data}; measure both on one file"
        )
    others = {item.id: item for item in candidate.items}
    for left, right, items in (
        (baseline, candidate, [i.id for i in baseline.items if i.id not in others]),
        (candidate, baseline, sorted(others.keys() - {i.id for i in baseline.items})),
    ):
        if items:
            raise UsageError(
                f"{len(items):,} of {len(left.items):,} items of {left.model} are not in {right.model} (such as {', '.join(items[:3])}); "
                "compare results of the same items"
            )
    return [(item, others[item.id]) for item in baseline.items]


def _metrics(
    baseline: ItemResults, candidate: ItemResults, pairs: Sequence[tuple[Item, Item]], bound: Bound
) -> list[_Paired]:
    """The metrics to decide by; raises UsageError for one that is unknown or only in one result."""
    ours, theirs = (
        dict.fromkeys(n for i in r.items for n in i.scores) for r in (baseline, candidate)
    )
    names = list(bound.metrics) or list(ours | theirs)
    if not names:
        raise UsageError(f"{baseline.model} and {candidate.model} have no scores")
    for name in (*names, *bound.margins):
        if name not in ours or name not in theirs:
            lacking = baseline.model if name not in ours else candidate.model
            known = ", ".join(n for n in ours if n in theirs)
            raise UsageError(f"{lacking} has no metric {name!r}; both have: {known or 'none'}")
    return [_pairs_of(name, pairs, name in baseline.lower_is_better) for name in names]


def _pairs_of(name: str, pairs: Sequence[tuple[Item, Item]], lower: bool) -> _Paired:
    both = [(a, b) for a, b in pairs if name in a.scores or name in b.scores]
    for left, right in both:
        if name not in left.scores or name not in right.scores:
            raise UsageError(f"item {left.id!r} has a score for {name} in only one of the results")
    sign = -1 if lower else 1
    baseline, candidate = (
        np.array([pair[side].scores[name] for pair in both], dtype=np.float64) * sign
        for side in (0, 1)
    )
    return _Paired(name, both, baseline, candidate, sign)


def _metric(metric: _Paired, bound: Bound, level: float) -> MetricVerdict:
    """One metric, not yet decided. ``level``: of the strictest of Holm's steps, at which a number
    of items settles the question whatever the other metrics say."""
    asked = bound.margins.get(metric.name, bound.margin)
    share = metric.share
    margin = asked if share else asked * abs(float(metric.baseline.mean()))
    if margin == 0:
        raise UsageError(
            f"{metric.name}: the baseline's mean is 0, so no share of it can be a margin; leave this metric out (--metric)"
        )
    flips = _flips(metric, bound.examples) if metric.binary else None
    by_flips = flips is not None and metric.groups is None
    statistic: Flips | Differences
    if flips is not None and by_flips:
        statistic = Flips(flips.lost, flips.gained, len(metric.items))
        method, difference = "exact score test (Tango)", statistic.difference
    else:
        statistic = _differences(metric, 1.0 if share else None, bound.seed)
        method, difference = "t and BCa bootstrap", statistic.mean
        method += " over groups" if metric.groups is not None else ""
    low, high = statistic.interval(1 - 2 * bound.alpha)
    detectable = statistic.detectable(margin, level, bound.power)
    return MetricVerdict(
        metric=metric.name,
        items=len(metric.items),
        groups=metric.groups,
        baseline=float(metric.baseline.mean()) * metric.sign + 0.0,  # a mean of 0 has no sign
        candidate=float(metric.candidate.mean()) * metric.sign + 0.0,
        difference=difference,
        interval=(low, high) if math.isfinite(low) else None,
        method=method,
        points=share,
        margin=margin,
        margin_text=_margin_text(asked, share),
        flips=flips,
        p_not_worse=statistic.p_not_worse(margin),
        p_worse=statistic.p_worse(margin),
        adjusted_not_worse=1.0,
        adjusted_worse=1.0,
        detectable=detectable if math.isfinite(detectable) else None,
        needed=statistic.needed(margin, level, bound.power),
        decision="INCONCLUSIVE",
    )


def _margin_text(margin: float, share: bool) -> str:
    if not share:
        return f"{100 * margin:.4g} % of the baseline"
    points = f"{100 * margin:.4g}"
    return f"{points} point" if points == "1" else f"{points} points"


def _flips(metric: _Paired, examples: int) -> FlipCounts:
    right, wrong = (1.0, 0.0) if metric.sign > 0 else (-0.0, -1.0)
    sides = []
    for before, after in ((right, wrong), (wrong, right)):
        chosen = np.nonzero((metric.baseline == before) & (metric.candidate == after))[0]
        shown = tuple(_example(*metric.items[i]) for i in chosen[:examples])
        sides.append((len(chosen), shown))
    (lost, losses), (gained, gains) = sides
    return FlipCounts(lost=lost, gained=gained, lost_examples=losses, gained_examples=gains)


def _example(left: Item, right: Item) -> Example:
    return Example(id=left.id, prompt=left.prompt, baseline=left.answer, candidate=right.answer)


def _differences(metric: _Paired, largest: float | None, seed: int) -> Differences:
    """By group; ``largest`` None: the range of the scores that were seen."""
    names = [a.group if a.group is not None else ("", i) for i, (a, _) in enumerate(metric.items)]
    place = {name: i for i, name in enumerate(dict.fromkeys(names))}
    at = np.array([place[name] for name in names])
    differences = metric.candidate - metric.baseline
    both = np.concatenate([metric.baseline, metric.candidate])
    span = largest or float(both.max() - both.min()) or abs(float(both.max())) or 1.0
    sums = np.bincount(at, weights=differences, minlength=len(place)).astype(np.float64)
    counts = np.bincount(at, minlength=len(place)).astype(np.float64)
    return Differences(sums, counts, span, seed)


def _decided(metrics: Sequence[MetricVerdict], alpha: float) -> list[MetricVerdict]:
    """With p-values corrected for their number, and a decision for each."""
    safe = holm([m.p_not_worse for m in metrics])
    worse = holm([m.p_worse for m in metrics])
    decided = []
    for metric, not_worse, is_worse in zip(metrics, safe, worse, strict=True):
        decision: Decision = "INCONCLUSIVE"
        if not_worse <= alpha:
            decision = "SHIP"
        elif is_worse <= alpha:
            decision = "DON'T SHIP"
        changes = {
            "adjusted_not_worse": not_worse,
            "adjusted_worse": is_worse,
            "decision": decision,
        }
        decided.append(metric.model_copy(update=changes))
    return decided


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Scandinavian Journal of Statistics 6, 1979)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _overall(decisions: Sequence[Decision]) -> Decision:
    if "DON'T SHIP" in decisions:
        return "DON'T SHIP"
    return "SHIP" if all(d == "SHIP" for d in decisions) else "INCONCLUSIVE"
