"""``llmquant allocate`` and ``quantize --target-bpw`` as a user meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from children import Run
from folder_kit import links_to

from llmquant.recipe import load_recipe

FEW = (
    "--group-sizes",
    "32",
    "--widths",
    "2,4,8,16",
    "--probe-tokens",
    "64",
    "--sensitivity",
    "block",
)
SHORT = ("--nsamples", "4", "--seqlen", "32")


def test_it_prints_a_table_and_writes_a_recipe_that_runs(run: Run, model: Path, text: Path) -> None:
    told = run(
        "allocate",
        model,
        "--target-bpw",
        4.2,
        "-o",
        "mixed.yaml",
        *FEW,
        *SHORT,
        "--calibration",
        f"file:{text}",
    )
    assert told.code == 0, told.err
    for fact in (
        "layers.0.self_attn.q_proj + k_proj + v_proj",
        "bits per selected weight of 4.2 allowed",
        "saves per MB",
        "proved optimal",
        "relative block error altogether",
        "llmquant quantize",
    ):
        assert fact in told.out
    written = Path("mixed.yaml").read_text(encoding="utf-8")
    assert written.startswith("# 4.")
    assert "- {match: model.layers." in written
    ran = run("quantize", model, "--recipe", "mixed.yaml", "-o", "out")
    assert ran.code == 0, ran.err
    assert load_recipe("out/recipe.yaml") == load_recipe("mixed.yaml")


def test_json_is_one_object_and_nothing_else(run: Run, model: Path, text: Path) -> None:
    told = run(
        "allocate",
        model,
        "--target-bpw",
        5,
        "-o",
        "mixed.yaml",
        *FEW,
        *SHORT,
        "--calibration",
        f"file:{text}",
        "--json",
    )
    assert told.code == 0, told.err
    assert told.err == ""
    result = json.loads(told.out)
    assert result["bits_per_weight"] <= 5
    assert result["recipe"] == load_recipe("mixed.yaml").model_dump(mode="json")
    assert sum(i["bytes"] for i in result["items"]) * 8 / result[
        "bits_per_weight"
    ] == pytest.approx(61440)
    assert sum(i["damage"] for i in result["items"]) == pytest.approx(result["predicted"])


def test_quantize_does_both(run: Run, model: Path, text: Path) -> None:
    ran = run(
        "quantize",
        model,
        "--target-bpw",
        4.9,
        "--sym",
        "--engine",
        "vllm",
        "-o",
        "out",
        *SHORT,
        "--calibration",
        f"file:{text}",
    )
    assert ran.code == 0, ran.err
    assert "proved optimal" in ran.out
    recipe = load_recipe("out/recipe.yaml")
    assert recipe.description.startswith("allocated for at most 4.9 bits per weight")
    assert {recipe.weights.bits, *(o.bits or 4 for o in recipe.overrides)} <= {4, 8}


REFUSED = [
    pytest.param(
        ("--target-bpw", "1"),
        2,
        "below the smallest possible size; these choices reach from",
        id="too small",
    ),
    pytest.param(
        ("--target-bpw", "4.5", "--widths", "4,x"),
        2,
        "--widths '4,x' must be whole numbers separated by commas",
        id="widths",
    ),
    pytest.param(
        ("--target-bpw", "4.5", "-o", "."), 2, "is a folder; give the name of a file", id="a folder"
    ),
    pytest.param(
        ("--target-bpw", "4.5", "-o", "no/such/file.yaml"), 2, "there is no folder", id="no folder"
    ),
    pytest.param(
        ("--target-bpw", "4.5", "-o", "there.yaml"),
        2,
        "exists; --overwrite replaces it",
        id="a file",
    ),
]


@pytest.mark.parametrize(("arguments", "code", "message"), REFUSED)
def test_mistakes_are_told_in_words(
    run: Run, model: Path, text: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    Path("there.yaml").write_text("precious", encoding="utf-8")
    target = () if "-o" in arguments else ("-o", "new.yaml")
    told = run("allocate", model, *target, *SHORT, "--calibration", f"file:{text}", *arguments)
    assert told.code == code
    assert message in told.err
    assert not Path("new.yaml").exists()
    assert Path("there.yaml").read_text(encoding="utf-8") == "precious"


def test_the_recipe_does_not_take_the_place_of_what_is_read(
    run: Run, model: Path, text: Path
) -> None:
    copied, folder = Path(shutil.copy(text, "text.txt")), Path(shutil.copytree(model, "m"))
    bits = ("--target-bpw", "4.5", "--calibration", f"file:{copied}", "--overwrite", *SHORT)
    for output in (copied, folder / "config.json"):
        before = output.read_bytes()
        told = run("allocate", folder, "-o", output, *bits)
        assert (told.code, "which would be overwritten" in told.said) == (2, True)
        assert output.read_bytes() == before


def test_a_size_is_not_chosen_for_a_destination_that_holds_the_model(run: Run, model: Path) -> None:
    links = links_to(Path(shutil.copytree(model, "out")).absolute(), Path("links"))
    told = run("quantize", links, "-o", "out", "--target-bpw", "4.5", "--overwrite", *SHORT)
    assert (told.code, "which --overwrite would delete" in told.said) == (2, True)


QUANTIZE = [
    pytest.param(
        ("--target-bpw", "4.5", "--bits", "4"),
        "--target-bpw chooses bits and group sizes itself",
        id="with --bits",
    ),
    pytest.param(
        ("--engine", "vllm"), "--engine limits what --target-bpw may choose", id="--engine alone"
    ),
]


@pytest.mark.parametrize(("arguments", "message"), QUANTIZE)
def test_options_that_contradict_each_other(
    run: Run, model: Path, arguments: tuple[str, ...], message: str
) -> None:
    told = run("quantize", model, "-o", "out", *arguments)
    assert (told.code, message in told.err) == (2, True)
