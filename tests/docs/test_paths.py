"""Paths that the pages name in backticks exist, so that a move of a file shows here."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "CONTRIBUTING.md",
    "SECURITY.md",
    "docs/architecture.md",
    "docs/benchmarks.md",
    "docs/methods.md",
    "docs/troubleshooting.md",
)
FOLDERS = "bench|csrc|docs|eval|examples|llmquant|recipes|serve|tests"
ROOMS = "checkpoint|planning|quantization"  # the architecture page names these from llmquant/


def named(page: str) -> list[str]:
    """Paths in backticks below a folder of the project; NAME stands for one to be made."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.findall(rf"`((?:{FOLDERS}|{ROOMS})/[\w./-]*)`", text)
    return sorted({path for path in found if "NAME" not in path})


def exists(path: str) -> bool:
    return (ROOT / path).exists() or (ROOT / "llmquant" / path).exists()


@pytest.mark.parametrize("page", PAGES)
def test_the_paths_of_a_page_exist(page):
    assert [path for path in named(page) if not exists(path)] == []


def test_paths_are_found_and_a_wrong_one_would_be_told():
    assert "llmquant/models/rows/table.py" in named("docs/architecture.md")
    assert not exists("llmquant/models/no_such_file.py")


def test_the_rows_of_the_architecture_page_are_those_that_the_layer_test_holds():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    told = [tuple(re.findall(r"`(\w+)`", row)) for row in re.findall(r"^\d+\. (`.*)$", page, re.M)]
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    assigned = {ast.unparse(n.targets[0]): n.value for n in tree.body if isinstance(n, ast.Assign)}
    *held, last = ast.literal_eval(assigned["ROWS"])["llmquant"]
    assert last == ("__main__",)
    assert told == held
