"""docs/json.md against what the commands print: no key that is not in it, and none in it that is
not printed."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import Run
from tiny_models import EXAMPLE

PAGE = Path(__file__).parents[2] / "docs" / "json.md"
WINDOWS = ("--nsamples", "2", "--seqlen", "32")
TEXT = ("--calibration", f"file:{EXAMPLE / 'calibration.txt'}")
# Keys that are not printed by the runs below, since they need another request.
ELSEWHERE = {"quantize": {"qat"}}
# Objects whose own keys the page tells in words.
WHOLE = {"calibration", "recipe", "qat", "target", "training", "processor", "memory", "disk"}
WHOLE |= {"auto", "compiled", "threads", "computing", "kernels_for", "expected", "speed"}


def told(heading: str, table: int = 0) -> set[str]:
    """The keys in the first column of a section's table."""
    section = PAGE.read_text("utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", section, re.MULTILINE)
    cells = [row.split("|")[1] for row in tables[table].splitlines()[2:]]
    return {key for cell in cells for key in re.findall(r"`([^`]+)`", cell)}


def base(key: str) -> str:
    return re.split(r"[.\[]", key)[0]


def printed(value: dict[str, Any], documented: set[str]) -> set[str]:
    """The keys of a value, as the page would write them."""
    found: set[str] = set()
    for key, inner in value.items():
        own = {k for k in documented if base(k) == key}
        if key in WHOLE or own == {key}:
            assert not isinstance(inner, dict | list) or key in WHOLE, f"{key} needs .* or []"
            found.add(key)
        elif own == {f"{key}.*"}:
            assert isinstance(inner, dict), key
            found.add(f"{key}.*")
        elif own == {f"{key}[]"}:
            assert isinstance(inner, list), key
            found.add(f"{key}[]")
        elif isinstance(inner, list) and inner and isinstance(inner[0], dict):
            parts = {k.removeprefix(f"{key}[].") for k in own}
            found |= {f"{key}[].{k}" for k in printed(inner[0], parts)}
        else:
            found.add(key)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import llmquant

    made = tmp_path_factory.mktemp("json") / "packed"
    llmquant.quantize(EXAMPLE, made, llmquant.load_recipe("rtn-w4g128"))
    return made


COMMANDS: dict[str, Callable[[Path], list[Any]]] = {
    "quantize": lambda _: ["quantize", EXAMPLE, "-o", "q", "--recipe", "gptq-w4g128", *TEXT, *WINDOWS],
    "plan": lambda _: ["plan", EXAMPLE, "--recipe", "qat-w4g128"],
    "plan 1": lambda _: ["plan", EXAMPLE, "--target-bpw", "4.5"],
    "plan 2": lambda _: ["plan", EXAMPLE, "--explain"],
    "advise": lambda _: ["advise", EXAMPLE],
    "allocate": lambda _: ["allocate", EXAMPLE, "-o", "r.yaml", "--target-bpw", "4.5", *TEXT, *WINDOWS],
    "qat": lambda folder: ["qat", folder, "-o", "t", "--reference", EXAMPLE, "--steps", "1", "--batch-size", "1",
                           "--heldout", "1", "--data", TEXT[1], "--seqlen", "32"],
    "inspect": lambda folder: ["inspect", folder],
    "verify": lambda folder: ["verify", folder, "--rerun", "--model", EXAMPLE],
    "convert": lambda folder: ["convert", folder, "--to", "gptq", "-o", "c"],
    "export": lambda folder: ["export", folder, "--to", "gguf", "-o", "m.gguf"],
    "generate": lambda folder: ["generate", folder, "a story", "--max-new-tokens", "2"],
    "doctor": lambda _: ["doctor"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_key(run: Run, folder: Path, name: str) -> None:
    heading, _, table = name.partition(" ")
    documented = told(heading, int(table or 0))
    ended = run(*COMMANDS[name](folder), "--json")
    assert ended.code == 0, ended.err
    assert printed(json.loads(ended.out), documented) == documented - ELSEWHERE.get(name, set())


def test_an_import(run: Run, folder: Path) -> None:
    assert run("export", folder, "--to", "gguf", "-o", "m.gguf").code == 0
    documented = told("import")
    ended = run("import", "m.gguf", "-o", "imported", "--json")
    assert printed(json.loads(ended.out), documented) == documented


def test_what_computed(run: Run, folder: Path) -> None:
    told_of = {k.removeprefix("computing.") for k in told("What computed")}
    ended = run("generate", folder, "a story", "--max-new-tokens", "2", "--json")
    assert json.loads(ended.out)["computing"].keys() == told_of


def test_the_reports_are_where_the_page_says() -> None:
    names = re.findall(r"`(llmquant\w*(?:\.\w+)+)`", PAGE.read_text("utf-8"))
    assert len(names) == 6
    for name in names:
        module, _, cls = name.rpartition(".")
        fields = getattr(importlib.import_module(module), cls).model_fields
        assert ("schema_version" in fields) == (name != names[-1])
