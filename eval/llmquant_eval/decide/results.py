"""Scores item by item: what two models are compared by, wherever it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

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

    def to_json(self) -> str:
        return self.model_dump_json(indent=1, exclude_none=True) + "\n"


def parsed(text: str, source: Path) -> ItemResults:
    """The inverse of :meth:`ItemResults.to_json`.

    Raises:
        UsageError: something else, or a score that is no number; names the item and the field.
    """
    raw = json.loads(text)
    try:
        results = ItemResults.model_validate(raw)
    except ValidationError as e:
        first = e.errors()[0]
        raise UsageError(f"{source}: {_place(raw, first['loc'])}: {first['msg']}") from e
    seen: set[str] = set()
    for item in results.items:
        if item.id in seen:
            raise UsageError(f"{source}: item {item.id!r} is there twice; ids must be unique")
        seen.add(item.id)
    return results


def _place(raw: object, where: tuple[int | str, ...]) -> str:
    """A place in the file as a person finds it: an item by its id."""
    items = raw.get("items") if isinstance(raw, dict) else None
    if len(where) > 1 and where[0] == "items" and isinstance(where[1], int):
        item = items[where[1]] if isinstance(items, list) else None
        name = item.get("id") if isinstance(item, dict) else None
        return f"item {name or where[1]}: {'.'.join(map(str, where[2:]))}"
    return ".".join(map(str, where))
