"""``llmquant allocate`` and ``quantize --target-bpw`` as a user meets them."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
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


def test_a_recipe_is_written_whole_or_not_at_all(
    run: Run, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a recipe is a recipe: of what its second half said, nothing would be known."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Path("mixed.yaml").write_text("method: rtn\n", encoding="utf-8")
    bits = ("--target-bpw", "4.5", "--calibration", f"file:{text}", "--overwrite", *FEW, *SHORT)
    monkeypatch.setattr("llmquant.written.os.fsync", full)
    for more, says in (
        ((), "free some space and run again"),  # the first measurement could not be saved
        (("--no-resume",), "mixed.yaml cannot be written"),
    ):
        told = run("allocate", model, "-o", "mixed.yaml", *bits, *more)
        assert (told.code, says in told.said) == (1, True), told.said
        assert "No space left on device" in told.said
        assert [p.name for p in Path().iterdir() if "mixed" in p.name] == ["mixed.yaml"]
        assert Path("mixed.yaml").read_text(encoding="utf-8") == "method: rtn\n"


def test_a_recipe_is_refused_before_any_work_where_nobody_may_write(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmquant.cli.commands.allocate.command.os.access", lambda *_: False)
    told = run("allocate", model, "--target-bpw", "4.5", "-o", "mixed.yaml", *SHORT)
    assert (told.code, "no permission to write in" in told.said) == (2, True)


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
    pytest.param(
        ("--method", "rtn", "--act-order", "group"),
        "--act-order applies only to GPTQ",
        id="--act-order of rtn",
    ),
]


@pytest.mark.parametrize("command", [("quantize", "-o", "out"), ("plan",)], ids=lambda c: c[0])
@pytest.mark.parametrize(("arguments", "message"), QUANTIZE)
def test_options_that_contradict_each_other(
    run: Run, model: Path, command: tuple[str, ...], arguments: tuple[str, ...], message: str
) -> None:
    told = run(*command, model, *arguments)
    assert (told.code, message in told.err) == (2, True)


def test_a_plan_says_what_is_known_before_schemes_are_chosen(
    run: Run, model: Path, text: Path, tmp_path: Path
) -> None:
    asked = ("--target-bpw", "4.6", "--method", "rtn", "--engine", "transformers")
    told = run("plan", model, *asked, "--json")
    assert told.code == 0, told.err
    known = json.loads(told.out)
    calibration = (*SHORT, "--calibration", f"file:{text}")
    made = run("quantize", model, "-o", "out", *asked, *calibration)
    assert made.code == 0, made.said
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.9 * known["bytes_on_disk"] < size <= known["bytes_on_disk"]
    assert f"(possible: {known['smallest']:.3f} to {known['largest']:.3f})" in made.out
    assert known["items"] == 8
    assert {s.split()[-1] for s in known["schemes"]} == {"sym", "unquantized"}
    said = " ".join(run("plan", model, *asked).out.split())
    for fact in (
        f"→ at most {known['bytes_on_disk'] / 1e6:.2f} MB of weight files; at most 4.6 bits per selected weight",
        "which of W2, W3, W4, W8, unquantized each of 8 sets of linears gets",
        "`llmquant allocate` chooses them",
    ):
        assert fact in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(("--target-bpw", "1"), "below the smallest possible size", id="too small"),
        pytest.param(("--target-bpw", "4.5", "--format", "awq"), "AWQ has one scheme", id="mix"),
        pytest.param(("--target-bpw", "4.5", "--ignore", "nothing"), "matches none", id="pattern"),
    ],
)
def test_a_plan_refuses_what_the_run_does(
    run: Run, model: Path, text: Path, arguments: tuple[str, ...], message: str
) -> None:
    calibration = (*SHORT, "--calibration", f"file:{text}")
    ran = run("quantize", model, "-o", "out", *arguments, *calibration)
    told = run("plan", model, *arguments)
    assert (told.code, told.err) == (ran.code, ran.err)
    assert (told.code, message in told.err) == (2, True)


@pytest.mark.parametrize("option", [("--measure",), ("--modules",), ("--gpu-memory", "8GiB")])
def test_a_plan_for_a_size_has_no_schemes_yet(
    run: Run, model: Path, option: tuple[str, ...]
) -> None:
    told = run("plan", model, "--target-bpw", "4.5", *option)
    assert told.code == 2
    assert f"{option[0]} needs each linear's scheme, which --target-bpw chooses" in told.err


def test_a_size_is_planned_with_embeddings_of_a_fitted_group_size(
    run: Run, make_model: Callable[..., Path]
) -> None:
    narrow = make_model(hidden_size=172, head_dim=16)
    told = run("plan", narrow, "--target-bpw", "4.5", "--embeddings", "4", "--json")
    assert told.code == 0, told.err
    (first, *_) = json.loads(told.out)["regrouped"]
    assert first["embeddings"]
