"""The recipe of a model for which none is named: the rule, and what commands make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from children import Run
from safetensors.torch import load_file, save_file

from llmquant.planning import defaults
from llmquant.planning.costs import Cost, SizeClass, size_classes
from llmquant.planning.defaults import CANDIDATES, choose, choose_recipe
from llmquant.recipe import Recipe, load_recipe, shipped


def measured(**kl: float) -> SizeClass:
    costs = {name.replace("_", "-"): Cost(4.0, value, 1 + value, 9.0) for name, value in kl.items()}
    return SizeClass("some", None, None, "a model", "some text", "a file", costs)


@pytest.mark.parametrize(
    ("layout", "kl", "chosen"),
    [
        pytest.param(
            "compressed-tensors",
            {"gptq_w4g128": 0.02, "gptq_w4g32_asym": 0.01},
            "gptq-w4g128",
            id="close enough",
        ),
        pytest.param(
            "compressed-tensors",
            {"gptq_w4g128": 0.03, "gptq_w4g64_asym": 0.02, "gptq_w4g32_asym": 0.01},
            "gptq-w4g64-asym",
            id="the smallest that is",
        ),
        pytest.param(
            "compressed-tensors",
            {"gptq_w4g128": 0.3, "gptq_w4g32": 0.2, "gptq_w4g32_asym": 0.1},
            "gptq-w4g32-asym",
            id="the closest",
        ),
        pytest.param(
            "compressed-tensors",
            {"gptq_w4g128": 0.3, "gptq_w4g32_asym": 0.1, "awq_gptq_w4g32_asym": 0.09},
            "awq-gptq-w4g32-asym",
            id="the closest takes longer",
        ),
        pytest.param(
            "compressed-tensors",
            {"gptq_w4g32_asym": 0.02, "awq_gptq_w4g32_asym": 0.01},
            "gptq-w4g32-asym",
            id="the quicker of two that are close enough",
        ),
        pytest.param(
            "gptq",
            {"gptq_w4g128": 0.3, "gptq_w4g32": 0.2, "gptq_w4g32_asym": 0.1},
            "gptq-w4g32",
            id="vLLM has no zero-points in gptq",
        ),
        pytest.param("compressed-tensors", {}, "gptq-w4g128", id="not measured"),
        pytest.param(
            "compressed-tensors",
            {"gptq_w4g64_asym": 0.3, "rtn_w4g128": 0.0},
            "gptq-w4g64-asym",
            id="one that is no candidate",
        ),
    ],
)
def test_the_rule(
    layout: str, kl: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "class_of", lambda *_: measured(**kl))
    assert choose(1, layout, tied=True).name == chosen


@pytest.mark.parametrize(
    ("parameters", "tied", "untied"),
    [
        (1, "toy", "toy"),
        (20_000_000, "small", "small-untied"),
        (999_999_999, "small", "small-untied"),
        (10**9, "large", "large"),
        (10**12, "large", "large"),
    ],
    ids=["toy", "from 20 million", "below a billion", "a billion", "huge"],
)
def test_every_size_has_a_class(parameters: int, tied: str, untied: str) -> None:
    names = [
        choose(parameters, "compressed-tensors", tied=t).size_class.name for t in (True, False)
    ]
    assert names == [tied, untied]


ROOT = Path(__file__).parents[2]
ROTATED = "rotate-gptq-w4g32-asym"


@pytest.mark.parametrize(
    ("tied", "width", "chosen", "why"),
    [
        pytest.param(False, 64, ROTATED, None, id="a head of its own"),
        pytest.param(True, 64, "awq-gptq-w4g32-asym", "gives it its own", id="a tied head"),
        pytest.param(False, 172, "awq-gptq-w4g32-asym", "hidden_size 172", id="no such rotation"),
    ],
)
def test_rotation_is_for_heads_of_their_own(
    make_model: Any,
    tied: bool,
    width: int,
    chosen: str,
    why: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        defaults,
        "class_of",
        lambda *_: measured(gptq_w4g128=0.3, rotate_gptq_w4g32_asym=0.1, awq_gptq_w4g32_asym=0.2),
    )
    model = make_model(
        tie_word_embeddings=tied, hidden_size=width, num_attention_heads=2, num_key_value_heads=2
    )
    default = choose_recipe(model, "compressed-tensors")
    assert default.name == chosen
    if why is None:
        assert default.unfit == {}
        assert default.recipe.rotation is not None
    else:
        assert why in default.unfit[ROTATED]


def test_a_tied_head_that_is_stored_too_counts_once(make_model: Any) -> None:
    model = make_model(tie_word_embeddings=True)
    before = choose_recipe(model, "compressed-tensors").parameters
    file = model / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file)
    assert choose_recipe(model, "compressed-tensors").parameters == before


def test_the_table_is_about_shipped_recipes() -> None:
    classes = size_classes()
    assert classes[-1].below is None
    limits = [c.below for c in classes[:-1] if c.below is not None]
    assert limits == sorted(limits)
    for c in classes:
        assert set(c.costs) <= set(shipped())
        assert bool(c.costs) == bool(c.model) == bool(c.source)
    assert set(CANDIDATES) <= set(shipped())


CELLS = {
    "rtn-w4g128": ("rtn", "W4 g128 sym"),
    "gptq-w4g128": ("gptq", "W4 g128 sym"),
    "rotate-gptq-w4g128": ("gptq; rotated", "W4 g128 sym"),
    "gptq-w4g64-asym": ("gptq", "W4 g64 asym"),
    "gptq-w4g32": ("gptq", "W4 g32 sym"),
    "gptq-w4g32-asym": ("gptq", "W4 g32 asym"),
    "rotate-gptq-w4g32-asym": ("gptq; rotated", "W4 g32 asym"),
    "awq-gptq-w4g32-asym": ("awq+gptq", "W4 g32 asym"),
    "best-w4g128": ("best", "W4 g128 sym"),
    "rotate-best-w4g128": ("best; rotated", "W4 g128 sym"),
    "gptq-w8": ("gptq", "W8 g128 sym"),
}


def test_the_costs_of_untied_models_are_those_that_were_measured() -> None:
    """Of bench/results/quality.json, seed 0."""
    untied = next(c for c in size_classes() if c.name == "small-untied")
    cells = {
        (c["tool"], c["grid"]): c
        for c in json.loads((ROOT / "bench" / "results" / "quality.json").read_text())["cells"]
        if (c["model"], c["seed"]) == (untied.model, 0)
    }
    assert untied.costs.keys() == CELLS.keys()
    for name, (tool, grid) in CELLS.items():
        cell, cost = cells[f"llmquant {tool}", grid], untied.costs[name]
        assert cost.kl == float(f"{cell['kl_mean']:.3g}"), name
        assert cost.perplexity_ratio == round(cell["perplexity_ratio"], 4), name
        assert cost.cpu_seconds == round(cell["cpu_seconds"]), name
        assert cost.bits_per_weight == round(cell["bits_per_weight"], 5), name


def test_the_documented_costs_are_those_of_the_table() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    classes = {c.name: c for c in size_classes()}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith(tuple(f"| {name} |" for name in classes)) and line.count("`") == 2
    ]
    shown = {name: set() for name in classes}
    for kind, _, model, recipe, *numbers in rows:
        if kind == "large":
            continue
        name = recipe.split("`")[1]
        cost = classes[kind].costs[name]
        shown[kind].add(name)
        assert model == classes[kind].model
        figures = (cost.bits_per_weight, cost.kl, cost.perplexity_ratio, cost.cpu_seconds)
        assert [float(n) for n in numbers] == list(figures), (kind, name)
    for kind in ("small", "small-untied"):
        assert shown[kind] == classes[kind].costs.keys()


def test_the_default_of_a_toy_is_stored_as_before() -> None:
    assert choose(1, "compressed-tensors", tied=True).recipe == Recipe()
    assert Recipe().updated({"description": ""}) == load_recipe("gptq-w4g128").updated(
        {"description": ""}
    )


def test_a_model_without_a_recipe(run: Run, model: Path, text: Path) -> None:
    """quantize does what plan and --explain say."""
    asked = ("--calibration", f"file:{text}", "--nsamples", "4", "--seqlen", "32")
    explained = json.loads(run("plan", model, "--explain", "--json").out)
    planned = json.loads(run("plan", model, *asked, "--json").out)
    ran = run("quantize", model, "-o", "out", *asked)
    assert (ran.code, explained["recipe"], planned["chosen_recipe"]) == (0, *("gptq-w4g128",) * 2)
    assert f"recipe gptq-w4g128, chosen for {explained['reason']}" in ran.err
    stored = load_recipe("out/recipe.yaml")
    assert (stored.method, stored.description) == ("gptq", "")


def test_a_small_model_gets_what_the_table_says(
    run: Run, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        defaults, "class_of", lambda *_: measured(gptq_w4g128=0.3, gptq_w4g32_asym=0.1)
    )
    asked = ("--calibration", f"file:{text}", "--nsamples", "4", "--seqlen", "32")
    ran = run("quantize", model, "-o", "out", *asked, "--json")
    assert (ran.code, json.loads(ran.out)["modules"][0]["scheme"]) == (0, "W4 g32 asym")
    by_hand = run("plan", model, "--bits", "8", "--json")
    schemes = {m["scheme"] for m in json.loads(by_hand.out)["modules"]}
    assert schemes == {"W8 g64 sym", "W8 g32 sym"}


def test_explain_does_nothing_else(run: Run, model: Path) -> None:
    ran = run("quantize", model, "-o", "out", "--explain")
    assert (ran.code, list(Path().iterdir())) == (0, [])
    for fact in (
        "gptq-w4g128",
        "million parameters (toy)",
        "chosen",
        "rtn-w4g128",
        "eval/LEADERBOARD.md",
    ):
        assert fact in ran.out
    gptq = run("plan", model, "--explain", "--format", "gptq")
    assert "not in vLLM on a CPU: it takes asymmetric weights only as" in " ".join(gptq.out.split())


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        pytest.param(
            ("{m}", "--explain", "--recipe", "rtn-w4g128"), 2, "leave out --recipe", id="a recipe"
        ),
        pytest.param(("{m}", "--explain", "--bits", "8"), 2, "leave out --recipe", id="bits"),
        pytest.param(("{q}", "--explain"), 2, "is already quantized", id="a quantized model"),
        pytest.param(("nowhere/x/y", "--explain"), 2, "neither a folder nor a hub", id="no model"),
        pytest.param(("{m}", "--explain", "--format", "x"), 2, "choose one of", id="no format"),
    ],
)
def test_explain_refuses(
    run: Run, model: Path, quantized: Path, arguments: tuple[str, ...], code: int, told: str
) -> None:
    ran = run("plan", *(a.format(m=model, q=quantized) for a in arguments))
    assert (ran.code, told in ran.err) == (code, True)


def test_recipes_say_what_they_cost(run: Run) -> None:
    listed = run("recipes").out
    assert "toy: KL 0.012, perplexity x1.012" in listed
    assert "large" not in listed.partition("Sizes of models")[0]
    assert "from 1 billion parameters: not measured here" in listed
    told = json.loads(run("recipes", "--json").out)
    assert told["gptq-w4g128"]["costs"]["toy"]["kl"] == 0.012
    assert told["gptq-w4g128"]["costs"]["large"] is None
    assert told["gptq-w4g128"]["description"] == load_recipe("gptq-w4g128").description


def test_recipes_that_are_no_candidates_are_judged_too() -> None:
    """``--explain`` lists them with their costs, so what rules one out stands beside it."""
    names = (
        "best_w4g32_asym",
        "gptq_w3g32",
        "small_w4g32_asym",
        "rotate_best_w4g128",
        "gptq_w4g128",
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(defaults, "class_of", lambda *_: measured(**dict.fromkeys(names, 0.1)))
        default = choose(10**8, "compressed-tensors", tied=True)
    assert "zero-points" in default.limits["best-w4g32-asym"]
    assert "2 or 3 bits" in default.refused["gptq-w3g32"]
    assert "packed embeddings" in default.refused["small-w4g32-asym"]
    assert default.unfit.keys() == {ROTATED, "rotate-best-w4g128"}
    assert default.unheld == {}
    for judged in (default.limits, default.refused, default.unfit):
        assert "gptq-w4g128" not in judged


@pytest.mark.parametrize(
    ("layout", "unheld"),
    [
        ("compressed-tensors", {}),
        ("gptq", {"small-w4g32-asym": "is an embedding", "w8a8": "quantized activations"}),
        ("awq", {"small-w4g32-asym": "is an embedding", "w8a8": "quantized activations",
                 "gptq-w8": "4 bits only", "gptq-w3g32": "4 bits only"}),
    ],
)  # fmt: skip
def test_what_a_format_cannot_hold_is_said(layout: str, unheld: dict[str, str]) -> None:
    default = choose(10**6, layout, tied=True)
    for name in ("small-w4g32-asym", "w8a8", "gptq-w8", "gptq-w3g32", "gptq-w4g128"):
        why = default.unheld.get(name)
        assert (why is None) == (name not in unheld)
        assert why is None or unheld[name] in why
