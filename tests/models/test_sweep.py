"""docs/models.md is what the sweep finds."""

from __future__ import annotations

import re

import pytest
from small_kinds import KINDS
from sweep import METHODS, PAGE, Outcome, outcome_of

WORK = re.compile(r"^\| `([^`]+)` \| (all|[^|]+) \| (\d+ of \d+) \| ([^|]+) \|$", re.MULTILINE)
REASONS = re.compile(r"^\| `([^`]+)` \| ([^|]+) \|$", re.MULTILINE)
FEW = ("gptj", "granitemoe", "mamba")


def listed() -> dict[str, str]:
    """Model type → what the page says of it: its linears where it works, or the reason."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(REASONS.findall(text)) | {k: n for k, _, n, _ in WORK.findall(text)}


def check(outcome: Outcome) -> None:
    assert outcome.wrong == ()
    if outcome.works:
        assert listed()[outcome.kind] == outcome.linears
    else:
        assert listed()[outcome.kind] == outcome.why_not


def test_every_kind_is_listed_once() -> None:
    assert sorted(listed()) == sorted(KINDS)


@pytest.mark.parametrize("kind", FEW)
def test_the_page_says_what_the_sweep_finds(kind: str) -> None:
    check(outcome_of(kind, {"8-bit RTN": METHODS["8-bit RTN"]}))


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_no_kind_is_silently_wrong(kind: str) -> None:
    check(outcome_of(kind))
