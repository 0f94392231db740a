"""The API page has every public name, once, and no other."""

from __future__ import annotations

import re
from pathlib import Path

import llmquant

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference.md"


def test_the_page_has_every_public_name_once():
    shown = re.findall(r"^::: llmquant\.(\w+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(shown) == sorted(llmquant.__all__)
