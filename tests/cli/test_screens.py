"""What commands print, on a terminal of 80 columns: nothing is cut or torn, and help speaks of
values in words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from children import Run

import llmquant.cli.screen

COMMANDS = (
    "advise", "plan", "allocate", "quantize", "qat", "convert", "export", "import", "inspect", "verify", "generate", "recipes", "doctor",
    "eval", "leaderboard", "validate", "compare", "bench", "auto", "serve", "chat", "monitor",
)  # fmt: skip


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llmquant.cli.screen, "_WIDTH", 80)


def test_the_list_of_commands_cuts_no_sentence(run: Run) -> None:
    listed = run("--help").out.partition("Commands:")[2].splitlines()[1:]
    assert [line.split()[0] for line in listed] == list(COMMANDS)
    assert [line for line in listed if not line.endswith(".") or line.endswith("...")] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_no_types_of_python(run: Run, command: str) -> None:
    usage, _, options = run(command, "--help").out.partition("Options:\n")
    assert re.findall(r"<(?:int|float|str|path|list)\b[^>]*>", options) == []
    assert re.findall(r"\b(?:model|prompt|folder|name)\b", usage.splitlines()[0]) == []


@pytest.mark.usefixtures("narrow")
def test_a_long_fact_continues_below_itself(run: Run, model: Path) -> None:
    done = run("quantize", model, "-o", "out", "--method", "rtn", "--group-size", "32").out
    computed = done.splitlines()[-6:]
    assert [line[:12].strip() for line in computed if line[:12].strip()][-2:] == ["proved", "time"]
    assert re.search(r"^computed    float32 on .*\n {12}\S", done, re.MULTILINE), done


@pytest.mark.usefixtures("narrow")
def test_the_names_of_modules_stay_whole(run: Run, model: Path, quantized: Path) -> None:
    for command in (("plan", model, "--group-size", "32"), ("inspect", quantized)):
        lines = run(*command, "--modules").out.splitlines()
        assert len([x for x in lines if re.match(r"model\.layers\.\d\.\w+\.\w+_proj ", x)]) == 14


@pytest.mark.usefixtures("narrow")
def test_recipes_keep_their_columns(run: Run) -> None:
    lines = run("recipes").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert all(re.match(r"\S+ +\S|  {6}", line) for line in lines if line.strip())
