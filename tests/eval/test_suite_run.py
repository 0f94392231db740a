"""A suite as it runs: what is measured, what is taken from the cache, what a kill leaves, and what
one bad model costs."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import board_kit
import pytest
import torch
from suite_kit import PROTOCOL, RTN, recipe, suite_of

from llmquant.errors import (
    CheckpointError,
    LlmquantError,
    QuantizationError,
    SourceError,
    UsageError,
)
from llmquant_eval.leaderboard.board import StoredReport
from llmquant_eval.leaderboard.ranking import make_boards
from llmquant_eval.report.schema import Report
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request
from llmquant_eval.suites import run as suite_run
from llmquant_eval.suites.outdated import outdated_models
from llmquant_eval.suites.run import SuiteProgress, run_suite
from llmquant_eval.suites.schema import Suite

Altered = Callable[..., Path]


@pytest.fixture
def coarse(altered: Altered) -> Path:
    return altered("coarse", lambda w: (w * 32).round() / 32)


def steps_of(suite: Suite, cache: Path) -> tuple[dict[str, Report], list[str]]:
    """The reports, and what was measured for them now."""
    steps: list[str] = []
    finished = run_suite(
        suite, cache, SuiteProgress(overall=lambda what, done, total: steps.append(what))
    )
    assert finished.failures == {}
    assert steps.pop() == "done"
    assert finished.measured == len(steps) - sum(s.startswith("quantizing") for s in steps)
    return finished.reports, steps


def test_a_recipe_and_a_folder_are_measured_once(
    base_model: Path, coarse: Path, words: Path, tmp_path: Path
) -> None:
    mine = recipe(tmp_path)
    suite = suite_of(
        base_model,
        words,
        [{"label": "by recipe", "recipe": str(mine)}, {"label": "found", "model": str(coarse)}],
    )
    reports, steps = steps_of(suite, tmp_path / "cache")
    assert steps == [
        "quantizing by recipe",
        "quantizing recipes",
        f"by recipe: {PROTOCOL}",
        f"found: {PROTOCOL}",
    ]
    assert list(reports) == ["by-recipe--words--ppl-gptq-64.json", "found--words--ppl-gptq-64.json"]
    made, found = reports.values()
    assert [(m.label, m.role) for m in made.models] == [
        ("fp16", "reference"),
        ("by recipe", "candidate"),
    ]
    assert made.models[1].scheme == "W4 g32 sym"
    direct = evaluate(
        Request(
            (str(coarse),),
            f"file:{words}",
            reference=str(base_model),
            protocol=PROTOCOL,
            dtype="float32",
            cost=False,
        )
    )
    assert found.models[1].metrics == direct.models[1].metrics
    again, steps = steps_of(suite, tmp_path / "cache")
    assert again == reports
    assert steps == ["quantizing by recipe", "quantizing recipes"]  # looked up, not made


def test_the_command_of_a_row_makes_the_model_and_measures_it(
    base_model: Path, words: Path, tmp_path: Path
) -> None:
    suite = suite_of(base_model, words, [{"label": "Mine 1.0", "recipe": str(recipe(tmp_path))}])
    reports, _ = steps_of(suite, tmp_path / "cache")
    (report,) = reports.values()
    make, measure = report.command.split(" && ")
    assert shlex.split(make)[:5] == ["llmquant", "quantize", str(base_model), "-o", "out/mine-1.0"]
    assert shlex.split(measure)[:3] == ["llmquant", "eval", "out/mine-1.0"]
    assert str(tmp_path / "cache") not in report.to_json()
    assert report.models[1].source == "out/mine-1.0"


# What changes in the suite, and whether it is another measurement.
CHANGES: list[Any] = [
    pytest.param({}, [], id="nothing"),
    pytest.param({"models": [{"label": "renamed", "model": "{coarse}"}]}, [], id="label"),
    pytest.param({"reference_label": "original"}, [], id="the reference's label"),
    pytest.param(
        {"texts": [{"name": "other-name", "source": "file:{words}"}]}, [], id="the text's name"
    ),
    pytest.param(
        {"protocols": [PROTOCOL, "ppl/gptq-32"]}, ["ppl/gptq-32"], id="another protocol beside it"
    ),
    pytest.param(
        {"texts": [{"name": "w", "source": "file:{words}", "max_windows": 2}]},
        [PROTOCOL],
        id="fewer windows",
    ),
    pytest.param({"texts": [{"name": "w", "source": "file:{changed}"}]}, [PROTOCOL], id="text"),
    pytest.param({"dtype": "bfloat16"}, [PROTOCOL], id="dtype"),
    pytest.param({"kernel": "reference"}, [PROTOCOL], id="kernel"),
    pytest.param({"batch_size": 1}, [PROTOCOL], id="batch size"),
    pytest.param({"models": [{"label": "found", "model": "{other}"}]}, [PROTOCOL], id="weights"),
    pytest.param({"reference": "{other}"}, [PROTOCOL], id="the reference's weights"),
    pytest.param({"reference": None, "reference_label": None}, [PROTOCOL], id="no reference"),
]


@pytest.mark.parametrize(("change", "measured"), CHANGES)
def test_only_what_a_change_touches_is_measured_again(
    change: dict[str, Any],
    measured: list[str],
    base_model: Path,
    coarse: Path,
    altered: Altered,
    words: Path,
    tmp_path: Path,
) -> None:
    other, changed = altered("other", lambda w: w * 1.01), tmp_path / "changed.txt"
    changed.write_text(f"{words.read_text(encoding='utf-8')} w7 w8", encoding="utf-8")
    suite = suite_of(base_model, words, [{"label": "found", "model": str(coarse)}])
    steps_of(suite, tmp_path / "cache")
    names = {"coarse": coarse, "other": other, "changed": changed, "words": words}
    wanted = _filled(suite.model_dump() | change, names)
    _, steps = steps_of(Suite.model_validate(wanted), tmp_path / "cache")
    assert [step.partition(": ")[2] for step in steps] == measured


def _filled(value: Any, names: dict[str, Path]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, names) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_filled(inner, names) for inner in value]
    return value.format(**names) if isinstance(value, str) else value


def test_a_recipe_is_applied_again_when_what_it_says_changes(
    base_model: Path, words: Path, tmp_path: Path
) -> None:
    suite = suite_of(base_model, words, [{"label": "mine", "recipe": str(recipe(tmp_path))}])
    first, _ = steps_of(suite, tmp_path / "cache")
    recipe(tmp_path, RTN.replace("bits: 4", "bits: 3"))
    second, steps = steps_of(suite, tmp_path / "cache")
    assert steps[-1] == f"mine: {PROTOCOL}"
    name = "mine--words--ppl-gptq-64.json"
    assert [r[name].models[1].scheme for r in (first, second)] == ["W4 g32 sym", "W3 g32 sym"]


def test_a_result_is_of_the_recipe_as_it_is_now_also_where_the_weights_are_the_same(
    base_model: Path, words: Path, tmp_path: Path
) -> None:
    """Or else what is outdated would stay outdated, however often it is measured."""
    suite = suite_of(base_model, words, [{"label": "mine", "recipe": str(recipe(tmp_path))}])
    steps_of(suite, tmp_path / "cache")
    recipe(tmp_path, f"description: in other words\n{RTN}")
    reports, _ = steps_of(suite, tmp_path / "cache")
    (tmp_path / "results").mkdir()
    for name, report in reports.items():
        (tmp_path / "results" / name).write_text(report.to_json(), encoding="utf-8")
    assert outdated_models(suite, tmp_path / "results") == {}


def test_killed_in_the_middle_it_goes_on_where_it_was(
    base_model: Path, coarse: Path, altered: Altered, words: Path, tmp_path: Path
) -> None:
    models = [
        {"label": "a", "model": str(coarse)},
        {"label": "b", "model": str(altered("b", lambda w: w * 0.99))},
    ]
    suite = suite_of(base_model, words, models, protocols=[PROTOCOL, "ppl/gptq-32"])
    path, cache = tmp_path / "suite.json", tmp_path / "cache"
    path.write_text(suite.model_dump_json(), encoding="utf-8")
    # It kills itself within the third measurement, when the models have been loaded and a batch was
    # scored.
    code = f"""
import os, pathlib, signal
from llmquant_eval.suites.schema import Suite
from llmquant_eval.suites.run import SuiteProgress, run_suite
suite, at = Suite.model_validate_json(pathlib.Path({str(path)!r}).read_text()), []
def stage(name, done, total):
    if at[-1] == 2 and done:
        os.kill(os.getpid(), signal.SIGKILL)
run_suite(suite, pathlib.Path({str(cache)!r}), SuiteProgress(lambda what, done, total: at.append(done), stage))
"""
    killed = subprocess.run([sys.executable, "-c", code], env=os.environ, check=False)
    assert killed.returncode == -signal.SIGKILL
    _, steps = steps_of(suite, cache)
    assert steps == ["a: ppl/gptq-32", "b: ppl/gptq-32"]


def test_a_damaged_result_is_measured_again(
    base_model: Path, coarse: Path, words: Path, tmp_path: Path
) -> None:
    suite = suite_of(base_model, words, [{"label": "found", "model": str(coarse)}])
    reports, _ = steps_of(suite, tmp_path / "cache")
    (stored,) = (tmp_path / "cache" / "results").iterdir()
    stored.write_text(stored.read_text(encoding="utf-8")[:100], encoding="utf-8")
    again, steps = steps_of(suite, tmp_path / "cache")
    assert steps == [f"found: {PROTOCOL}"]
    (one,), (two,) = reports.values(), again.values()
    assert one.models == two.models


def test_one_bad_model_does_not_stop_the_others(
    base_model: Path, coarse: Path, altered: Altered, words: Path, tmp_path: Path
) -> None:
    sick = altered("sick", lambda w: torch.full_like(w, torch.nan))
    models = [{"label": "sick one", "model": str(sick)}, {"label": "found", "model": str(coarse)}]
    finished = run_suite(suite_of(base_model, words, models), tmp_path / "cache")
    assert list(finished.reports) == ["found--words--ppl-gptq-64.json"]
    assert finished.measured == 1
    assert list(finished.failures) == [f"sick one: {PROTOCOL}"]
    assert "sick gave a NaN" in finished.failures[f"sick one: {PROTOCOL}"]
    with pytest.raises(QuantizationError, match="sick gave a NaN"):
        run_suite(suite_of(base_model, words, models[:1]), tmp_path / "cache")


def test_tasks_are_run_once_for_each_model_and_paired(
    base_model: Path, coarse: Path, words: Path, tmp_path: Path
) -> None:
    items = tmp_path / "choice.jsonl"
    items.write_text(
        '{"question": "w3 w4", "choices": ["w5", "w6"], "answer": 0}\n'
        '{"question": "w7 w8", "choices": ["w9", "w10"], "answer": 1}\n', encoding="utf-8",
    )  # fmt: skip
    models = [
        {"label": "a", "model": str(coarse)},
        {"label": "b", "model": str(shutil.copytree(coarse, tmp_path / "b"))},
    ]
    suite = suite_of(
        base_model,
        words,
        models,
        texts=[],
        protocols=[],
        tasks={"names": [f"choice_local={items}"]},
    )
    reports, steps = steps_of(suite, tmp_path / "cache")
    assert steps == ["fp16: choice_local", "a: choice_local", "b: choice_local"]
    assert list(reports) == ["a--tasks.json", "b--tasks.json"]
    (board,) = make_boards([StoredReport(Path(name), report) for name, report in reports.items()])
    assert [row.name for row in board.rows] == ["fp16", "a", "b"]
    assert all(row.task is not None and row.task.paired for row in board.rows[1:])
    _, steps = steps_of(suite, tmp_path / "cache")
    assert steps == []
    items.write_text(items.read_text(encoding="utf-8").replace("w5", "w11"), encoding="utf-8")
    _, steps = steps_of(suite, tmp_path / "cache")
    assert steps == ["fp16: choice_local", "a: choice_local", "b: choice_local"]


def test_the_noise_floor_is_measured_once_a_ranking(
    base_model: Path, coarse: Path, altered: Altered, words: Path, tmp_path: Path
) -> None:
    models = [
        {"label": "a", "model": str(coarse)},
        {"label": "b", "model": str(altered("b", lambda w: w * 0.99))},
    ]
    suite = suite_of(base_model, words, models, noise_floor=True)
    reports, _ = steps_of(suite, tmp_path / "cache")
    assert [r.noise_floor is not None for r in reports.values()] == [True, False]
    _, steps = steps_of(suite, tmp_path / "cache")
    assert steps == []


def test_speed_and_memory_are_measured_once_for_each_model(
    base_model: Path, coarse: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = board_kit.cost(12.5)  # the measurement itself is tests of its own
    monkeypatch.setattr(suite_run, "measure_cost", lambda *arguments, **options: measured)
    suite = suite_of(
        base_model,
        words,
        [{"label": "a", "model": str(coarse)}],
        cost=True,
        protocols=[PROTOCOL, "ppl/gptq-32"],
    )
    reports, steps = steps_of(suite, tmp_path / "cache")
    assert steps[:2] == ["speed of fp16", "speed of a"]
    assert all(m.cost == measured for r in reports.values() for m in r.models)
    again, steps = steps_of(suite, tmp_path / "cache")
    assert (again, steps) == (reports, [])


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        pytest.param({"models": []}, UsageError, "no models to measure", id="no model"),
        pytest.param(
            {"models": [{"label": "a", "model": "{nothing}", "made_by": "make it"}]},
            CheckpointError,
            "a: .*nothing-here.*it is made by: make it",
            id="not a model",
        ),
        pytest.param(
            {"models": [{"label": "a", "model": "no/such/folder/here"}]},
            LlmquantError,
            "a: ",
            id="missing model",
        ),
        pytest.param(
            {"models": [{"label": "fp16", "model": "{coarse}"}]},
            UsageError,
            "both called fp16",
            id="one label",
        ),
        pytest.param(
            {"models": [{"label": "a", "recipe": "nope"}]},
            UsageError,
            "no recipe 'nope'",
            id="no recipe",
        ),
        pytest.param(
            {
                "reference": None,
                "reference_label": None,
                "models": [{"label": "a", "recipe": "rtn-w4g128"}],
            },
            UsageError,
            "a: a recipe needs a model to work on",
            id="no base",
        ),
        pytest.param(
            {"models": [{"label": "a", "recipe": "rtn-w4g128", "base": "http://127.0.0.1:9/v1#m"}]},
            UsageError,
            "is a server",
            id="recipe on a server",
        ),
        pytest.param(
            {"texts": [{"name": "t", "source": "file:{empty}"}]},
            SourceError,
            "empty",
            id="empty text",
        ),
        pytest.param(
            {"texts": [{"name": "t", "source": "file:{short}"}]},
            SourceError,
            "less than one window",
            id="short text",
        ),
        pytest.param(
            {"texts": [{"name": "t", "source": "file:no/such"}]},
            SourceError,
            "no/such",
            id="no text",
        ),
        pytest.param(
            {"models": [{"label": "a", "model": "{foreign}"}]},
            UsageError,
            "does not tokenize",
            id="tokenizers",
        ),
        pytest.param(
            {"protocols": ["ppl/words"]}, UsageError, "'ppl/words' is not known", id="protocol"
        ),
        pytest.param({"dtype": "int4"}, UsageError, "dtype 'int4' does not exist", id="dtype"),
    ],
)
def test_what_a_suite_cannot_do(
    keys: dict[str, Any],
    error: type[LlmquantError],
    message: str,
    base_model: Path,
    coarse: Path,
    words: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "nothing-here").mkdir()
    for name, content in (("empty", ""), ("short", "w3 w4 w5")):
        (tmp_path / f"{name}.txt").write_text(content, encoding="utf-8")
    foreign = Path(shutil.copytree(coarse, tmp_path / "foreign"))
    vocabulary = (foreign / "tokenizer.json").read_text(encoding="utf-8")
    swapped = vocabulary.replace('"w10"', '"w_"').replace('"w11"', '"w10"').replace('"w_"', '"w11"')
    (foreign / "tokenizer.json").write_text(swapped, encoding="utf-8")
    names = {
        "nothing": tmp_path / "nothing-here",
        "coarse": coarse,
        "empty": tmp_path / "empty.txt",
        "short": tmp_path / "short.txt",
        "foreign": foreign,
    }
    given = {"models": [{"label": "a", "model": "{coarse}"}]} | keys
    suite = suite_of(base_model, words, **_filled(given, names))
    with pytest.raises(error, match=message):
        run_suite(suite, tmp_path / "cache")
