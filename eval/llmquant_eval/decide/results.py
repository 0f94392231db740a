"""Scores item by item: what two models are compared by, wherever it was measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import AwareDatetime, Field, ValidationError

from llmquant.errors import UsageError
from llmquant_eval.report.results import Finite, Sha256, Strict


class Item(Strict):
    """One item.

    Attributes:
        id: the same in every result of these items.
        group: items of one group (a document, a conversation) are not independent.
        scores: metric → score; 1 and 0 are right and wrong.
        prompt, answer: for people.
    """

    id: str
    group: str | None = None
    scores: dict[str, Finite]
    prompt: str | None = None
    answer: str | None = None


class ItemResults(Strict):
    """One model's scores on a set of items.

    Attributes:
        model: what is compared.
        data: where the items come from.
        lower_is_better: metrics of which less is better.
        notes: what was left out, and why.
        conditions: what must be the same in two results that are compared: how answers were asked
            for.
        computing: what should be, and is said where it is not: dtype, device, kernel, lm-eval.
    """

    schema_version: Literal[1] = 1
    kind: Literal["items"] = "items"
    created: AwareDatetime | None = None
    model: str
    data: str
    data_sha256: Sha256 | None = None
    lower_is_better: tuple[str, ...] = ()
    items: tuple[Item, ...] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    conditions: dict[str, str] = Field(default_factory=dict)
    computing: dict[str, str] = Field(default_factory=dict)

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"


def validated(raw: dict[str, Any], source: Path) -> ItemResults:
    """Results from what their JSON says.

    Raises:
        UsageError: something else, a score that is no number, an id that two items have, a metric
            of which less is better and no item has; names the item and the field.
    """
    try:
        results = ItemResults.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        raise UsageError(f"{source}: {_place(raw, first['loc'])}: {first['msg']}") from e
    check_ids(results, source)
    known = metrics_in(results)
    for name in results.lower_is_better:
        if name not in known:  # a metric whose name is misspelled there would be judged upside down
            raise UsageError(
                f"{source}: lower_is_better names {name!r}, which no item has a score of; "
                f"they have {', '.join(sorted(known)) or 'none'}"
            )
    return results


def check_alike(baseline: ItemResults, candidate: ItemResults) -> None:
    """Raises UsageError for results that were measured under different conditions, or that do not
    agree which scores are better."""
    if (said := unlike(baseline.conditions, candidate.conditions)) is not None:
        raise UsageError(
            f"{baseline.model} and {candidate.model} were not asked alike, {said}; "
            "measure both with the same options"
        )
    both = metrics_in(baseline) & metrics_in(candidate)
    lower = (set(baseline.lower_is_better) ^ set(candidate.lower_is_better)) & both
    if lower:
        raise UsageError(
            f"of {min(lower)} less is better in one of the results, and more in the other; "
            "measure both with the same --lower-is-better"
        )


def unlike(baseline: Mapping[str, str], candidate: Mapping[str, str]) -> str | None:
    """The first condition that differs, with both values; None where none does. What only one of
    them says counts for nothing."""
    for name, value in baseline.items():
        if value != candidate.get(name, value):
            return f"{name}: {value}, and {candidate[name]}"
    return None


def metrics_in(results: ItemResults) -> set[str]:
    """The names of all scores."""
    return {name for item in results.items for name in item.scores}


def check_ids(results: ItemResults, source: Path | str) -> None:
    """Raises UsageError for an id that two items have."""
    name, count = Counter(item.id for item in results.items).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{source}: item {name!r} is there more than once; ids must be unique")


def _place(raw: dict[str, Any], where: tuple[int | str, ...]) -> str:
    """A place in the file as a person finds it: an item by its id."""
    items = raw.get("items")
    if len(where) > 1 and where[0] == "items" and isinstance(where[1], int):
        item = items[where[1]] if isinstance(items, list) else None
        name = item.get("id") if isinstance(item, dict) else None
        return f"item {name or where[1]}: {'.'.join(map(str, where[2:]))}"
    return ".".join(map(str, where))
