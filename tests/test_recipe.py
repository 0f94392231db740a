"""Recipes: what ships loads, what is wrong is refused with its place, what is written down repeats
the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llmquant.errors import RecipeError
from llmquant.recipe import Override, Recipe, load_recipe, matches, shipped
from llmquant.spec import QuantSpec

SHIPPED = {
    "rtn-w4g128": ("rtn", QuantSpec(4, 128)),
    "gptq-w4g128": ("gptq", QuantSpec(4, 128)),
    "rotate-gptq-w4g128": ("gptq", QuantSpec(4, 128)),
    "gptq-w4g64-asym": ("gptq", QuantSpec(4, 64, symmetric=False)),
    "gptq-w4g32": ("gptq", QuantSpec(4, 32)),
    "gptq-w4g32-asym": ("gptq", QuantSpec(4, 32, symmetric=False)),
    "awq-gptq-w4g32-asym": ("awq+gptq", QuantSpec(4, 32, symmetric=False)),
    "small-w4g32-asym": ("awq+gptq", QuantSpec(4, 32, symmetric=False)),
    "gptq-w8": ("gptq", QuantSpec(8, 128)),
    "gptq-w3g32": ("gptq", QuantSpec(3, 32)),
    "awq-w4g128": ("awq+rtn", QuantSpec(4, 128)),
    "awq-w4g128-asym": ("awq+rtn", QuantSpec(4, 128, False)),
    "w8a8": ("gptq", QuantSpec(8, None)),
    "smoothquant-w8a8": ("smooth+gptq", QuantSpec(8, None)),
    "best-w4g128": ("gptq+tune", QuantSpec(4, 128)),
    "rotate-best-w4g128": ("gptq+tune", QuantSpec(4, 128)),
    "best-w4g32-asym": ("awq+gptq+tune", QuantSpec(4, 32, symmetric=False)),
    "best-w3g128": ("gptq+tune", QuantSpec(3, 128)),
    "best-w2g32": ("gptq+tune", QuantSpec(2, 32)),
    "qat-w4g128": ("gptq+tune+qat", QuantSpec(4, 128)),
    "qat-w3g128": ("gptq+tune+qat", QuantSpec(3, 128)),
    "qat-w2g32": ("gptq+tune+qat", QuantSpec(2, 32)),
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_what_their_names_say(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.steps, recipe.weights.spec) == SHIPPED[name]
    assert recipe.description
    assert (recipe.rotation is not None) == ("rotate" in name)
    assert recipe == load_recipe(shipped()[name])


def test_every_shipped_recipe_loads_and_is_in_the_gallery() -> None:
    assert set(shipped()) >= set(SHIPPED)
    gallery = (next(iter(shipped().values())).parent / "README.md").read_text(encoding="utf-8")
    for name in shipped():
        load_recipe(name)
        assert f"`{name}`" in gallery


def test_a_recipe_that_trains_reads_a_text_whatever_it_rounds_by() -> None:
    trained = Recipe.model_validate({"method": "rtn", "qat": {}})
    assert (trained.needs_text, trained.reads_text) == (False, True)
    assert not Recipe(method="rtn").reads_text


def loaded(tmp_path: Path, yaml: str) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(yaml, encoding="utf-8")
    return load_recipe(path)


WRONG = [
    pytest.param("wieghts: {bits: 4}", "wieghts: there is no such key", id="unknown key"),
    pytest.param(
        "weights: {bits: 4, bitz: 3}",
        r"weights\.bitz: there is no such key",
        id="unknown nested key",
    ),
    pytest.param(
        "overrides: [{match: x, bitz: 4}]",
        r"overrides\.0\.bitz: there is no such key",
        id="in an override",
    ),
    pytest.param(
        "weights: {bits: 4}\nweights: {bits: 8}",
        'found duplicate key "weights".*line 2',
        id="key twice",
    ),
    pytest.param(
        "weights: {bits: 4, bits: 8}", 'found duplicate key "bits"', id="nested key twice"
    ),
    pytest.param(
        "weights: {bits: 5}",
        r"weights: bits=5 is not supported; choose one of 2, 3, 4, 8",
        id="5 bits",
    ),
    pytest.param(
        "weights: {group_size: 0}",
        "weights: group_size=0 must be a positive divisor",
        id="group of 0",
    ),
    pytest.param(
        "weights: {group_size: null}",
        r"weights\.group_size: Input should be a valid integer",
        id="no group size",
    ),
    pytest.param("weights: 3", "weights: it is 3, not a mapping of keys", id="weights no mapping"),
    pytest.param(
        "overrides: [{match: x, bits: 5}]",
        r"overrides\.0: bits=5 is not supported",
        id="impossible override",
    ),
    pytest.param("overrides: [{match: '', bits: 4}]", r"overrides\.0\.match: ", id="empty match"),
    pytest.param("method: magic", "method: Input should be 'rtn'", id="unknown method"),
    pytest.param("include: ['*', '']", "include: a module pattern is empty", id="empty pattern"),
    pytest.param(
        "ignore: lm_head", "ignore: Input should be a valid tuple", id="one pattern, no list"
    ),
    pytest.param(
        "ignore:", r"below ignore; write \[\] to quantize the head", id="nothing below ignore"
    ),
    pytest.param(
        "seed: -1", "seed: Input should be greater than or equal to 0", id="negative seed"
    ),
    pytest.param(
        "seed: 99999999999999999999",
        "seed: Input should be less than or equal to 92",
        id="seed beyond int64",
    ),
    pytest.param(
        "scales: {norm: .inf}", r"scales\.norm: Input should be a finite number", id="infinite norm"
    ),
    pytest.param("gptq: {damping: .nan}", r"gptq\.damping: ", id="damping NaN"),
    pytest.param("calibration: {nsamples: 0}", r"calibration\.nsamples: ", id="no samples"),
    pytest.param(
        "gptq: {act_order: group}\nweights: {group_size: -1}",
        "act_order: group needs a group size",
        id="order of one group",
    ),
    pytest.param(
        "smooth: {}",
        "no linear has any; set weights.activations",
        id="smooth without int8 activations",
    ),
    pytest.param(
        "smooth: {}\nawq: {}\nweights: {bits: 8, group_size: -1, activations: int8-dynamic}",
        "awq and smooth both scale",
        id="two scalings",
    ),
    pytest.param(
        "rotation: {residual: off, heads: false}",
        "rotate nothing; leave the section out",
        id="rotation of nothing",
    ),
    pytest.param("rotation: {residual: upwards}", r"rotation\.residual: ", id="unknown rotation"),
    pytest.param("smooth: {alpha: 2}", r"smooth\.alpha\.", id="alpha of 2"),
    pytest.param("[1, 2]", r"recipe: it is \[1, 2\], not a mapping of keys", id="a list"),
    pytest.param("weights: {bits: 4", "cannot be read as YAML", id="cut"),
    pytest.param("a: !!python/object:os.system {}", "cannot be read as YAML", id="code"),
    pytest.param("[" * 5000, "cannot be read as YAML", id="nested too deep"),
    pytest.param("a: \0", "cannot be read as YAML", id="zero byte"),
]


@pytest.mark.parametrize("key", sorted(Recipe.model_fields.keys() - {"ignore", "method"}))
def test_a_key_with_nothing_below_it_is_not_given(tmp_path: Path, key: str) -> None:
    assert loaded(tmp_path, f"method: rtn\n{key}:\n") == Recipe(method="rtn")


@pytest.mark.parametrize(("yaml", "words"), WRONG)
def test_a_wrong_recipe_is_refused_with_its_place(tmp_path: Path, yaml: str, words: str) -> None:
    with pytest.raises(RecipeError, match=f"(?s){words}") as refused:
        loaded(tmp_path, yaml)
    assert str(tmp_path / "r.yaml") in str(refused.value)
    assert refused.value.exit_code == 2


def test_a_recipe_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(
        RecipeError, match=r"no recipe 'nope': not a file, and the shipped ones are .*gptq-w4g128"
    ):
        load_recipe("nope")


@pytest.mark.parametrize("word", ["off", "'off'", "false"])
def test_off_is_a_word_though_yaml_has_it_for_a_truth_value(tmp_path: Path, word: str) -> None:
    assert loaded(tmp_path, f"gptq: {{act_order: {word}}}").gptq.act_order == "off"


EVERYTHING: dict[str, Any] = {
    "description": "für ✓",
    "method": "gptq",
    "weights": {"bits": 3, "group_size": 32, "symmetric": False},
    "overrides": [{"match": "*.down_proj", "bits": 8, "group_size": -1}],
    "scales": {"steps": 4, "smallest": 0.5, "norm": 2.4, "weighted": True},
    "gptq": {
        "block_size": 64,
        "damping": 0.05,
        "act_order": "off",
        "true_sequential": False,
        "asymmetric": 0.5,
        "passes": 2,
    },
    "rotation": {"residual": "off", "heads": True, "seed": 4},
    "tune": {
        "steps": 9,
        "lr": 0.1,
        "scale_lr": 0,
        "batch_size": 2,
        "checks": 3,
        "patience": 1,
        "target": "block",
    },
    "include": ["*_proj"],
    "ignore": ["*.o_proj"],
    "calibration": {
        "source": "file:x: y.txt",
        "nsamples": 3,
        "seqlen": 16,
        "packing": "sample",
        "batch_size": 2,
    },
    "seed": 7,
}


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_a_recipe_written_down_is_the_recipe(tmp_path: Path, values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    again = loaded(tmp_path, recipe.to_yaml())
    assert again == recipe
    assert (again.to_yaml(), again.sha256()) == (recipe.to_yaml(), recipe.sha256())


def test_an_empty_file_is_the_default_recipe(tmp_path: Path) -> None:
    assert loaded(tmp_path, "# nothing\n") == Recipe()


def test_the_first_token_counts_where_a_recipe_says_nothing_of_it() -> None:
    off = Recipe().updated({"calibration.first_token_share": 0})
    assert Recipe().calibration.first_token_share == 1 / 64
    assert off.sha256() != Recipe().sha256()
    blind = {"method": "rtn"}  # looks at no text, so it is the same recipe either way
    assert off.updated(blind).sha256() == Recipe().updated(blind).sha256()


def test_updates_replace_only_what_they_name() -> None:
    recipe = Recipe.model_validate(EVERYTHING)
    changed = recipe.updated({"weights.bits": 4, "seed": 0})
    assert (changed.weights.bits, changed.seed) == (4, 0)
    assert changed.updated({"weights.bits": 3, "seed": 7}) == recipe
    assert changed.sha256() != recipe.sha256()
    with pytest.raises(RecipeError, match="the command line's options: weights: bits=7"):
        recipe.updated({"weights.bits": 7})


def test_an_update_reaches_into_a_section_that_was_left_out() -> None:
    assert Recipe().tune is None
    tuned = Recipe().updated({"tune.steps": 7})
    assert tuned.tune is not None
    assert tuned.tune.steps == 7
    assert (tuned.steps, tuned.needs_text) == ("gptq+tune", True)
    assert tuned.updated({"tune": None}) == Recipe()
    assert [
        Recipe(method="rtn").needs_text,
        Recipe(method="rtn").updated({"tune": {}}).needs_text,
    ] == [False, True]


OVERRIDES = (
    Override(match="*.layers.0.*", bits=8),
    Override(match="down_proj", group_size=-1, symmetric=False),
)


@pytest.mark.parametrize(
    ("module", "spec"),
    [
        ("model.layers.0.mlp.down_proj", QuantSpec(8, 128)),
        ("model.layers.1.mlp.down_proj", QuantSpec(4, None, symmetric=False)),
        ("model.layers.1.mlp.up_proj", QuantSpec(4, 128)),
    ],
    ids=["the first match counts", "the second", "none"],
)
def test_overrides(module: str, spec: QuantSpec) -> None:
    assert Recipe(overrides=OVERRIDES).weights_of(module).spec == spec


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("*", "model.layers.0.mlp.up_proj", True),
        ("up_proj", "model.layers.0.mlp.up_proj", True),
        ("mlp.up_proj", "model.layers.0.mlp.up_proj", True),
        ("p_proj", "model.layers.0.mlp.up_proj", False),
        ("model.layers.1.*", "model.layers.1.mlp.up_proj", True),
        ("model.layers.1.*", "model.layers.11.mlp.up_proj", False),
        ("model.layers.[01].*", "model.layers.1.mlp.up_proj", True),
        ("lm_head", "lm_head", True),
        ("LM_HEAD", "lm_head", False),
    ],
)
def test_patterns(pattern: str, module: str, expected: bool) -> None:
    assert matches(pattern, module) is expected


def test_ignore_wins_over_include() -> None:
    recipe = Recipe(include=("*_proj",), ignore=("o_proj",))
    assert [recipe.selects(f"a.{m}") for m in ("q_proj", "o_proj", "gate")] == [True, False, False]


def test_yaml_is_1_2_where_off_is_a_word(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("method: gptq\ngptq: {act_order: off}\n", encoding="utf-8")
    assert load_recipe(path).gptq.act_order == "off"


@pytest.mark.parametrize("key", ["scheme.bits", "seed.bits", "weights.bit", "nothing"])
def test_a_key_that_recipes_do_not_have_is_named(key):
    with pytest.raises(RecipeError, match=key.split(".")[0]):
        load_recipe("rtn-w4g128").updated({key: 3})
