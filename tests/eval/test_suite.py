"""Suites as YAML: what they mean, and what is refused with the place of the mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import llmquant
from llmquant.errors import UsageError
from llmquant_eval.leaderboard.html import TEMPLATE
from llmquant_eval.report.page import HEAD
from llmquant_eval.suites.schema import Suite, file_name, load_suite, shipped_suites, slug

ROOT = Path(__file__).resolve().parents[2]
GOOD = """
recipes: [rtn-w4g128]
texts: [{name: t, source: "file:t.txt"}]
protocols: [ppl/gptq-64]
"""


def suite(text: str, tmp_path: Path) -> Suite:
    path = tmp_path / "suite.yaml"
    path.write_text(text, encoding="utf-8")
    return load_suite(str(path))


def test_recipes_come_first_and_are_called_by_their_names(tmp_path: Path) -> None:
    read = suite(
        GOOD + "models: [{label: other, model: out/other}, {label: mine, recipe: dir/mine.yaml}]",
        tmp_path,
    )
    assert [(m.label, m.model, m.recipe) for m in read.all_models()] == [
        ("rtn-w4g128", None, "rtn-w4g128"),
        ("other", "out/other", None),
        ("mine", None, "dir/mine.yaml"),
    ]
    assert [m.label for m in read.only({"mine"}).all_models()] == ["mine"]


def test_a_pattern_is_every_shipped_recipe_that_it_matches(tmp_path: Path) -> None:
    names = llmquant.shipped_recipes()
    assert suite(GOOD.replace("[rtn-w4g128]", '["*"]'), tmp_path).recipes == names
    some = suite(GOOD.replace("[rtn-w4g128]", '["gptq-w4*"]'), tmp_path).recipes
    assert some == tuple(name for name in names if name.startswith("gptq-w4"))
    assert 0 < len(some) < len(names)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(GOOD + "surprise: 1", "surprise: there is no such key", id="unknown key"),
        pytest.param(
            GOOD.replace("name: t,", "name: t, x: 1,"),
            r"texts\.0\.x: there is no such key",
            id="unknown key inside",
        ),
        pytest.param(
            GOOD + "models: [{label: a}]",
            "a: give either model or recipe",
            id="neither model nor recipe",
        ),
        pytest.param(
            GOOD + "models: [{label: a, model: m, recipe: r}]",
            "a: give either",
            id="model and recipe",
        ),
        pytest.param(
            GOOD + "models: [{label: a, model: m, base: b}]",
            "base belongs to recipe",
            id="base of a model",
        ),
        pytest.param(
            GOOD + "models: [{label: a, recipe: r, made_by: c}]",
            "made_by belongs",
            id="maker of a recipe",
        ),
        pytest.param(
            GOOD + "models: [{model: m}]", r"models\.0\.label: Field required", id="no label"
        ),
        pytest.param(
            GOOD + 'models: [{label: "a\\nb", model: m}]',
            "one line of printable text",
            id="label of two lines",
        ),
        pytest.param(
            GOOD + f"models: [{{label: {'a' * 101}, model: m}}]",
            "at most 100 characters",
            id="endless label",
        ),
        pytest.param(
            GOOD + "models: [{label: RTN w4g128, model: m}]",
            "label 'rtn-w4g128' is given twice",
            id="labels of one file name",
        ),
        pytest.param(
            GOOD.replace("64]", "64, ppl/gptq-64]"),
            "protocol 'ppl/gptq-64' is given twice",
            id="protocol twice",
        ),
        pytest.param(
            GOOD.replace("64]", '64, "a,b"]'),
            "write one protocol per list entry",
            id="protocols with commas",
        ),
        pytest.param(
            GOOD.replace("name: t", "name: t/t"), r"texts\.0\.name", id="a text's name with a slash"
        ),
        pytest.param(
            GOOD.replace("protocols: [ppl/gptq-64]", ""),
            "texts and protocols need each other",
            id="no protocol",
        ),
        pytest.param("recipes: [rtn-w4g128]", "nothing to measure", id="no text and no task"),
        pytest.param(
            GOOD.replace("[rtn-w4g128]", '["zzz-*"]'),
            "no shipped recipe matches 'zzz-\\*'",
            id="pattern of nothing",
        ),
        pytest.param("", "nothing to measure", id="an empty file"),
        pytest.param("[1, 2]", "valid dictionary", id="a list"),
        pytest.param("a: [", "cannot be read as YAML", id="not YAML"),
        pytest.param(
            GOOD + "dtype: float32\ndtype: bfloat16\n",
            r'suite\.yaml cannot be read as YAML: found duplicate key "dtype".*, line 6, column 1$',
            id="key twice",
        ),
        pytest.param(
            GOOD.replace("name: t,", "name: t, name: u,"),
            'duplicate key "name".*, line 3, column',
            id="key twice inside",
        ),
        pytest.param(
            GOOD + "models:\n- label: a\n  model: m\n  label: b\n",
            'duplicate key "label".*, line 8, column 3',
            id="key twice in a list",
        ),
    ],
)
def test_what_is_no_suite_is_refused_with_the_place(
    text: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        suite(text, tmp_path)
    assert "suite.yaml" in str(caught.value)


def test_a_section_with_nothing_in_it_is_not_given(tmp_path: Path) -> None:
    """``models:`` whose entries are all commented out is null in YAML."""
    file = tmp_path / "suite.yaml"
    file.write_text(
        "description:\nmodels:\nrecipes:\ntexts:\nprotocols:\ncost:\nnoise_floor:\n"
        "calibration:\ntasks: {names: [arc_easy], limit: }\n",
        encoding="utf-8",
    )
    read = load_suite(str(file))
    assert read == Suite.model_validate({"tasks": {"names": ["arc_easy"]}})
    file.write_text("tasks: {names: [arc_easy]}\nmodel:\n", encoding="utf-8")
    with pytest.raises(UsageError, match="model: there is no such key"):
        load_suite(str(file))


def test_null_is_auto() -> None:
    suite = Suite.model_validate(
        {
            "texts": [{"name": "t", "source": "file:t"}],
            "protocols": ["ppl/gptq"],
            "dtype": None,
            "device": None,
            "kernel": None,
        }
    )
    assert (suite.dtype, suite.device, suite.kernel, suite.threads) == (
        "auto",
        "auto",
        "auto",
        None,
    )


def test_a_name_that_is_no_suite_tells_those_there_are() -> None:
    with pytest.raises(
        UsageError,
        match=r"--suite quik is no file and no suite of llmquant's own \(quick, standard\)",
    ):
        load_suite("quik")


@pytest.mark.parametrize("name", sorted(shipped_suites()))
def test_shipped_suites_name_recipes_that_there_are(name: str) -> None:
    read = load_suite(name)
    assert read.reference is None  # it comes from the command line
    assert set(read.recipes) <= set(llmquant.shipped_recipes())


def test_the_wheel_has_suites_page_and_tasks() -> None:
    inside = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    package = ROOT / "eval" / "llmquant_eval"
    tasks = sorted((package / "tasks" / "local").glob("*.yaml"))
    data = [*shipped_suites().values(), TEMPLATE, HEAD, *tasks]
    assert len(data) >= 2 + 1 + 4
    assert {f"llmquant_eval/{path.relative_to(package)}" for path in data} <= inside


@pytest.mark.parametrize(
    ("label", "expected"),
    [("GPTQ w4/g128", "gptq-w4-g128"), ("../../etc", "etc"), ("…", "model"), ("a_b.c", "a_b.c")],
    ids=["spaces", "a path", "nothing left", "kept"],
)
def test_a_label_as_a_file_name(label: str, expected: str) -> None:
    assert slug(label) == expected
    assert file_name(label, "t", "ppl/gptq-64") == f"{expected}--t--ppl-gptq-64.json"
    assert file_name(label, None, "") == f"{expected}--tasks.json"


def test_changes_of_the_command_line_are_validated_too(tmp_path: Path) -> None:
    read = suite(GOOD, tmp_path)
    assert read.changed(dtype="float32", reference=None).dtype == "float32"
    with pytest.raises(UsageError, match="the command line's options: batch_size"):
        read.changed(batch_size=0)
