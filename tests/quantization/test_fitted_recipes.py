"""Recipes on models that their group size does not divide: through the command line, and that what
is stored repeats the run."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from children import Run
from tiny_models import EXAMPLE

from llmquant.formats import FORMATS
from llmquant.models.architectures import ARCHITECTURES
from llmquant.models.groups import fit_groups
from llmquant.models.reading.linears import Linears
from llmquant.models.selection import select
from llmquant.recipe import Recipe, load_recipe

LLAMA = ARCHITECTURES["llama"]
LEAVES = {
    "self_attn.q_proj": 192,
    "self_attn.k_proj": 192,
    "self_attn.v_proj": 192,
    "self_attn.o_proj": 128,
    "mlp.gate_proj": 192,
    "mlp.up_proj": 192,
    "mlp.down_proj": 256,
}


def linears(**columns: int) -> Linears:
    """Three Llama blocks and a head; ``columns`` by the last part of a name."""
    widths = {leaf: columns.get(leaf.rpartition(".")[2], width) for leaf, width in LEAVES.items()}
    shapes = {
        f"model.layers.{i}.{leaf}": (64, width) for i in range(3) for leaf, width in widths.items()
    }
    return Linears({**shapes, "lm_head": (64, 192)}, "lm_head", tied=False)


def sizes(recipe: Recipe, of: Linears, layout: str = "compressed-tensors") -> dict[str, str]:
    """Linear → scheme."""
    return {n: str(s) for n, s in select(of, LLAMA, recipe, FORMATS[layout]).schemes.items()}


CASES = [
    pytest.param({}, {}, 1, id="kinds"),
    pytest.param({"ignore": []}, {}, 1, id="the head too"),
    pytest.param({"overrides": [{"match": "model.layers.1.*", "bits": 8}]}, {}, 1, id="a block of 8 bits"),
    pytest.param({"overrides": [{"match": "lm_head", "bits": 8}], "ignore": []}, {}, 1, id="a head of 8 bits"),
    pytest.param({"overrides": [{"match": "o_proj", "group_size": -1}]}, {}, 1, id="rows stay"),
    pytest.param({}, {"o_proj": 40}, 2, id="and rows"),
    pytest.param({"weights": {"bits": 8, "symmetric": False}}, {}, 1, id="8 bits with zero-points"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "columns", "count"), CASES)
def test_the_fitted_recipe_says_it_all(
    changes: dict[str, Any], columns: dict[str, int], count: int
) -> None:
    """Strict, it gives the same schemes; the wanted grid is kept but for the size."""
    wanted = Recipe.model_validate({"method": "rtn", **changes})
    of = linears(**columns)
    recipe, told = fit_groups(of, LLAMA, wanted, FORMATS["compressed-tensors"])
    assert len(told) >= count
    strict = recipe.updated({"weights.strict_groups": True})
    assert fit_groups(of, LLAMA, strict, FORMATS["compressed-tensors"]) == (recipe, ())
    assert fit_groups(of, LLAMA, recipe, FORMATS["compressed-tensors"]) == (recipe, ())
    for name, (_, width) in of.shapes.items():
        before, after = (r.weights_of(*of.names(name)) for r in (wanted, recipe))
        if recipe.selects(*of.names(name)):
            size = before.group_size if before.group_size == -1 or width % 128 == 0 else 64
            assert after.group_size == (-1 if width == 40 else size), name
            assert (after.bits, after.symmetric) == (before.bits, before.symmetric), name
    assert sizes(recipe, of) == sizes(strict.updated({"weights.strict_groups": False}), of)


def test_overrides_are_few() -> None:
    recipe, _ = fit_groups(linears(), LLAMA, Recipe(method="rtn"), FORMATS["compressed-tensors"])
    assert [o.match for o in recipe.overrides] == [
        f"model.layers.*.{leaf}" for leaf, width in LEAVES.items() if width == 192
    ]
    whole, _ = fit_groups(
        linears(o_proj=192, down_proj=192), LLAMA, Recipe(), FORMATS["compressed-tensors"]
    )
    assert whole == Recipe().updated({"weights.group_size": 64})


def test_where_the_size_divides_the_recipe_is_not_touched() -> None:
    wide = linears(**dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 128))
    for recipe in (
        Recipe(),
        Recipe.model_validate({"overrides": [{"match": "lm_head", "bits": 8}]}),
    ):
        assert fit_groups(wide, LLAMA, recipe, FORMATS["awq"]) == (recipe, ())


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize(
    ("layout", "schemes"),
    [
        ("compressed-tensors", {"q_proj": "W4 g64 sym", "down_proj": "W4 g32 sym"}),
        ("gptq", {"q_proj": "W4 g64 sym", "down_proj": "W4 g32 sym"}),
        ("awq", {"q_proj": "W4 g32 sym", "down_proj": "W4 g32 sym"}),
    ],
    ids=["compressed-tensors", "gptq", "awq"],
)
def test_a_shipped_recipe_on_a_narrow_model(
    run: Run, model: Path, layout: str, schemes: dict[str, str]
) -> None:
    """plan, the screen, the record and inspect say the same; the stored recipe gives the same
    files."""
    asked = ("--recipe", "rtn-w4g128", "--format", layout)
    planned = run("plan", model, *asked, "--json")
    ran = run("quantize", model, "-o", "out", *asked)
    assert (planned.code, ran.code) == (0, 0)
    assert (
        "instead of 128 for 12 linears (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj)"
        in ran.err
    )
    said = " ".join(ran.out.split())
    assert "group size groups of 32 instead of 128 for 2 linears (down_proj): " in said
    told = json.loads(planned.out)
    assert {
        m["name"].rpartition(".")[2]: m["scheme"] for m in told["modules"]
    }.items() >= schemes.items()
    record = json.loads(Path("out/manifest.json").read_text(encoding="utf-8"))
    seen = json.loads(run("inspect", "out", "--json").out)
    assert told["regrouped"] == record["regrouped"] == seen["regrouped"]
    assert {
        n.rpartition(".")[2]: m["spec"] for n, m in record["modules"].items()
    }.items() >= schemes.items()
    assert "group size" in run("inspect", "out").out
    again = run("quantize", model, "-o", "again", "--recipe", "out/recipe.yaml")
    assert (again.code, "instead of" in again.said) == (0, False)
    same = {n: h for n, h in hashes(Path("out")).items() if n != "manifest.json"}
    assert hashes(Path("again")).items() >= same.items()
    assert load_recipe("again/recipe.yaml") == load_recipe("out/recipe.yaml")
    assert "strict_groups" not in Path("out/recipe.yaml").read_text(encoding="utf-8")


def test_a_size_of_the_command_line_is_meant(run: Run, model: Path) -> None:
    """Of a recipe too that says so; the stored one does not repeat the word."""
    asked = ("quantize", model, "-o", "out", "--recipe")
    assert run(*asked, "rtn-w4g128", "--group-size", "64").said.count("does not divide its 96") == 1
    Path("mine.yaml").write_text("method: rtn\nweights: {group_size: 64, strict_groups: true}\n")
    ran = run(*asked, "mine.yaml")
    assert (ran.code, "does not divide its 96" in ran.said) == (2, True)
    ran = run(
        *asked,
        "mine.yaml",
        "--include",
        "*.q_proj",
        "--include",
        "*.k_proj",
        "--include",
        "*.v_proj",
    )
    assert ran.code == 0
    assert "strict_groups" not in Path("out/recipe.yaml").read_text(encoding="utf-8")


def test_a_model_that_fits_says_nothing(run: Run) -> None:
    ran = run("quantize", EXAMPLE, "-o", "out", "--recipe", "rtn-w4g128")
    assert (ran.code, "group size" in ran.out, "instead of" in ran.err) == (0, False, False)
    assert "regrouped" not in json.loads(Path("out/manifest.json").read_text(encoding="utf-8"))
