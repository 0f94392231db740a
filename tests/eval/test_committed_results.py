"""The committed leaderboard is what its results say, and every shipped recipe has a result that is
its own."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

import llmquant
from llmquant_eval.leaderboard.markdown import render_markdown
from llmquant_eval.leaderboard.ranking import load_reports, make_boards
from llmquant_eval.report.schema import read_report
from llmquant_eval.suites.outdated import outdated_models, unexpected_files
from llmquant_eval.suites.schema import Suite, load_suite

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"
ZEN_4 = "AMD EPYC, avx512_bf16"


@pytest.fixture
def suite(monkeypatch: pytest.MonkeyPatch) -> Suite:
    monkeypatch.chdir(ROOT)  # a suite's paths are relative to where it is run
    return load_suite("eval/tiny-llama.yaml")


def committed_suites() -> list[Suite]:
    """The suites below eval/, whose results and pages are committed."""
    suites = [load_suite(str(path)) for path in sorted((ROOT / "eval").glob("*.yaml"))]
    return [suite for suite in suites if suite.outputs is not None]


@pytest.mark.parametrize("suite", committed_suites(), ids=lambda s: Path(s.outputs.results).name)
def test_a_leaderboard_is_rendered_from_its_results(suite: Suite) -> None:
    assert suite.outputs is not None
    assert suite.outputs.markdown is not None
    results = ROOT / suite.outputs.results
    assert unexpected_files(suite, results) == []
    assert len(list(results.glob("*.json"))) == len(suite.all_models())
    rendered = render_markdown(make_boards(load_reports(results)))
    assert (ROOT / suite.outputs.markdown).read_text(encoding="utf-8") == rendered, (
        "stale: run `make leaderboard` or `make leaderboard-real`"
    )


def check_readme(begins: str, fresh: str) -> None:
    """The rows of README.md from ``begins`` to the next empty line are ``fresh``, or are made
    so."""
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    start = readme.index(begins)
    table = readme[start : readme.index("\n\n", start) + 1]
    if os.environ.get("LLMQUANT_WRITE_RESULTS"):
        path.write_text(readme.replace(table, fresh), encoding="utf-8")
    assert table == fresh, (
        "README.md shows old figures; run this test with LLMQUANT_WRITE_RESULTS=1"
    )


def test_the_readme_shows_the_leaderboard() -> None:
    """Its table is the leaderboard's, less some columns; LLMQUANT_WRITE_RESULTS=1 writes it
    anew."""
    ranking = (ROOT / "eval" / "LEADERBOARD.md").read_text(encoding="utf-8").partition("\n## ")[2]
    rows = [line.strip("| ").split(" | ") for line in ranking.splitlines() if line.startswith("| ")]
    shown = [rows[0].index(c) for c in ("#", "model", "scheme", "ratio", "KL nats", "bits/w")]
    fresh = "".join(f"| {' | '.join(row[i] for i in shown)} |\n" for row in rows)
    check_readme("| # | model |", fresh)


def test_the_gallery_of_recipes_shows_what_was_measured() -> None:
    """Each shipped recipe has a row, with the leaderboard's bits, KL and ratio;
    LLMQUANT_WRITE_RESULTS=1 writes them."""
    candidates = {
        m.label: m
        for stored in load_reports(RESULTS)
        for m in stored.report.models
        if m.role == "candidate"
    }
    path = ROOT / "recipes" / "README.md"
    gallery = path.read_text(encoding="utf-8")
    rows = {line.split("`")[1]: line for line in gallery.splitlines() if line.startswith("| `")}
    assert set(rows) == set(llmquant.shipped_recipes())
    fresh = gallery
    for name, line in rows.items():
        cells = line.split(" | ")
        kl, ratio = (candidates[name].metrics[m].value for m in ("kl_mean", "perplexity_ratio"))
        cells[1:4] = [f"{candidates[name].bits_per_weight:.6g}", f"{kl:#.2g}", f"{ratio:.4f}"]
        fresh = fresh.replace(line, " | ".join(cells))
    if os.environ.get("LLMQUANT_WRITE_RESULTS"):
        path.write_text(fresh, encoding="utf-8")
    assert gallery == fresh, (
        "recipes/README.md shows old figures; run this test with LLMQUANT_WRITE_RESULTS=1"
    )


def mean_kl(cells: list[dict[str, Any]], grid: str, tools: str) -> str:
    """Over seeds 0 to 2, to three digits."""
    mine = (
        c
        for c in cells
        if (c["model"], c["grid"]) == ("tiny-llama", grid) and c["tool"] in tools.split("|")
    )
    found = {c["seed"]: c["kl_mean"] for c in mine}
    assert sorted(found) == [0, 1, 2], f"{tools} at {grid} has seeds {sorted(found)}"
    return f"{statistics.fmean(found.values()):#.3g}"


def test_the_readme_shows_the_real_model() -> None:
    """At 4 bits, means over seeds, nearest to the original first; LLMQUANT_WRITE_RESULTS=1 writes
    the table anew."""
    report = json.loads((ROOT / "bench" / "results" / "quality.json").read_text(encoding="utf-8"))
    grids = ("W4 g64 sym", "W4 g64 asym", "W4 g32 sym", "W4 g32 asym")
    runs: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for c in report["cells"]:
        if c["model"] == "SmolLM2-135M-Instruct" and c["grid"] in grids:
            runs[c["tool"]][c["grid"]].append(c)
    usual = {grid: mean(cells, "kl_mean") for grid, cells in runs["llmquant gptq"].items()}
    rows = []
    for tool, cells in runs.items():
        distance = statistics.fmean(
            math.log(mean(c, "kl_mean") / usual[grid]) for grid, c in cells.items()
        )
        shown = [
            f"{mean(cells[g], 'kl_mean'):.3f} ({mean(cells[g], 'perplexity_ratio'):.3f})" if g in cells else "–"
            for g in grids
        ]  # fmt: skip
        rows.append((distance, f"| {tool} | {' | '.join(shown)} | {minutes(cells)} |\n"))
    bits = [
        f"{g}, {mean(runs['llmquant gptq'][g], 'bits_per_weight'):g} bits" for g in grids
    ]  # as our layout has them
    head = (
        f"| KL (perplexity ratio) | {' | '.join(bits)} | CPU minutes |\n|---|---|---|---|---|---|\n"
    )
    check_readme("| KL (perplexity ratio) |", head + "".join(row for _, row in sorted(rows)))


def mean(cells: list[dict[str, Any]], metric: str) -> float:
    return statistics.fmean(c[metric] for c in cells)


def minutes(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Of the runs on the processor that most were measured on."""
    known = [c for cells in runs.values() for c in cells if c.get("processor") == ZEN_4]
    return f"{mean(known, 'cpu_seconds') / 60:.2g}" if known else "–"


def test_the_readme_shows_what_was_measured_beside_other_tools() -> None:
    """LLMQUANT_WRITE_RESULTS=1 writes the table anew."""
    cells = json.loads((ROOT / "bench" / "results" / "quality.json").read_text(encoding="utf-8"))[
        "cells"
    ]
    columns = (
        "llmquant gptq",
        "llm-compressor gptq",
        "llmquant awq",
        "llm-compressor awq",
        "llmquant best|llmquant best; 2 bits",
        "autoround 200",
    )
    grids = ("W4 g128 sym", "W4 g128 asym", "W4 g32 sym", "W3 g128 sym", "W2 g32 sym")
    fresh = "".join(
        f"| {grid} | {' | '.join(mean_kl(cells, grid, tools) for tools in columns)} |\n"
        for grid in grids
    )
    check_readme("| W4 g128 sym | ", fresh)


def test_the_table_of_quality_is_rendered_from_its_cells() -> None:
    script = ROOT / "bench" / "quality.py"
    rendered = subprocess.run(
        [sys.executable, script, "table"], check=True, capture_output=True, text=True
    ).stdout
    assert (ROOT / "docs" / "quality.md").read_text(encoding="utf-8") == rendered, (
        "run bench/quality.py table > docs/quality.md"
    )


def test_every_recipe_has_a_result_of_its_own(suite: Suite) -> None:
    assert set(llmquant.shipped_recipes()) <= {m.label for m in suite.all_models()}
    assert outdated_models(suite, RESULTS) == {}, (
        "run `make leaderboard`, which measures what is missing"
    )
    assert unexpected_files(suite, RESULTS) == []


def test_results_carry_no_path_of_a_machine() -> None:
    for path in (ROOT / "eval").glob("results*/*.json"):
        report = read_report(path)
        texts = [
            report.command,
            report.text.source if report.text else "",
            *(m.source for m in report.models),
        ]
        assert not [
            word
            for text in texts
            for word in text.split()
            if word.removeprefix("file:").startswith(("/", "~"))
        ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param("missing", "is not there", id="no result"),
        pytest.param("recipe", "another version of the recipe gptq-w8", id="another recipe"),
        pytest.param("text", "another text", id="another text"),
        pytest.param("protocol", "another protocol", id="another protocol"),
        pytest.param("reference", "other reference weights", id="another reference"),
        pytest.param("dtype", "measured in bfloat16", id="another dtype"),
        pytest.param("windows", "has 3 windows and not 242", id="fewer windows"),
        pytest.param("label", "has no candidate called gptq-w8", id="another label"),
        pytest.param("newer", "newer llmquant", id="a later schema"),
    ],
)
def test_a_result_that_is_not_the_one_wanted(
    change: str, message: str, suite: Suite, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder)
    (path,) = folder.glob("gptq-w8--*.json")
    report = read_report(path)
    base, own = report.models
    assert report.text is not None
    first = report.passes[0]
    edits = {
        "recipe": {"models": [base, own.model_copy(update={"recipe_sha256": "0" * 64})]},
        "text": {"text": report.text.model_copy(update={"sha256": "0" * 64})},
        "protocol": {"passes": [first.model_copy(update={"perplexity": "ppl/word-512"})]},
        "reference": {"models": [base.model_copy(update={"weights_sha256": "0" * 64}), own]},
        "dtype": {"settings": report.settings.model_copy(update={"dtype": "bfloat16"})},
        "windows": {"passes": [first.model_copy(update={"windows": 3})]},
        "label": {"models": [base, own.model_copy(update={"label": "another"})]},
    }
    text = report.model_copy(update=edits.get(change, {})).to_json()
    path.write_text(
        text.replace('"schema_version": 1', '"schema_version": 2') if change == "newer" else text,
        encoding="utf-8",
    )
    if change == "missing":
        path.unlink()
    found = outdated_models(suite, folder)
    assert list(found) == ["gptq-w8"]
    assert message in found["gptq-w8"]
