"""What a run is refused for, and when: before the original is asked anything, and before a model
that is not quantized yet is rounded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from children import Run
from folder_kit import links_to
from training_kit import SHORT, Train

import llmquant.training.prepared as prepared
import llmquant.training.stage as stage
from llmquant.errors import LayoutError, LlmquantError, UsageError
from llmquant.quantization.options import QuantizeOptions
from llmquant.recipe import Recipe
from llmquant.training.options import QatOptions


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails where the original would be loaded, or anything rounded."""

    def no(*_: object, **__: object) -> None:
        pytest.fail("too late")

    monkeypatch.setattr(prepared, "load", no)
    monkeypatch.setattr(stage, "round_only", no)


@pytest.mark.usefixtures("unasked")
def test_a_layout_that_cannot_hold_the_result(train: Train, tmp_path: Path) -> None:
    with pytest.raises(LayoutError, match="cannot become awq without loss"):
        train(tmp_path / "out", layout="awq")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unasked")
def test_a_reference_that_is_quantized(train: Train, tmp_path: Path, quantized: Path) -> None:
    with pytest.raises(UsageError, match=r"small-w3 is quantized .* the unquantized original"):
        train(tmp_path / "out", reference=quantized)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("seed", [-1, 2**63], ids=["negative", "too large"])
def test_a_seed_that_no_recipe_has(train: Train, tmp_path: Path, seed: int) -> None:
    with pytest.raises(UsageError, match=f"seed {seed} is not between 0"):
        train(tmp_path / "out", seed=seed)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize(
    ("section", "options", "told"),
    [
        pytest.param({"source": "file:none.txt"}, {}, "none.txt", id="no file"),
        pytest.param({"source": None}, {}, "training needs a text", id="no text"),
        pytest.param({"heldout": 9999}, {}, "need", id="too little text"),
        pytest.param({"heldout_source": "file:no.txt"}, {}, "no.txt", id="no held-out text"),
        pytest.param({"seqlen": 129}, {}, "128 positions", id="context"),
        pytest.param({}, {"dtype": "float16"}, "float16", id="float16"),
        pytest.param({}, {"max_cache": 10_000}, "--max-cache", id="disk"),
        pytest.param({}, {"evaluation": "file:not.txt"}, "not.txt", id="evaluation text"),
    ],
)
def test_before_anything_is_rounded(
    tmp_path: Path,
    model: Path,
    rtn: Recipe,
    text: Path,
    section: dict[str, Any],
    options: dict[str, Any],
    told: str,
) -> None:
    recipe = rtn.updated({"qat": {**SHORT, "source": f"file:{text}", **section}})
    with pytest.raises(LlmquantError, match=told):
        stage.quantize(
            model, tmp_path / "out", recipe, training=(QatOptions(**options), stage.QatEvents())
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("unasked")
def test_hidden_states_of_a_model_that_will_be_rotated(
    tmp_path: Path, model: Path, rtn: Recipe, text: Path
) -> None:
    section = {**SHORT, "source": f"file:{text}", "hidden_loss": 1.0}
    recipe = rtn.updated({"qat": section, "rotation": {}})
    with pytest.raises(UsageError, match=r"leave out qat\.hidden_loss"):
        stage.quantize(model, tmp_path / "out", recipe)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        pytest.param({"qat.seqlen": 129}, "qat.seqlen=129", id="context"),
        pytest.param(
            {"qat.hidden_loss": 1.0, "rotation": {}}, "leave out qat.hidden_loss", id="hidden"
        ),
    ],
)
def test_a_plan_is_refused_for_it_too(
    run: Run, tmp_path: Path, model: Path, rtn: Recipe, changes: dict[str, Any], told: str
) -> None:
    recipe = rtn.updated({"qat": {**SHORT, "source": "file:text.txt"}})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert run("plan", model, "--recipe", file).code == 0
    file.write_text(recipe.updated(changes).to_yaml())
    for more in ((), ("--target-bpw", "4.5")):
        ended = run("plan", model, "--recipe", file, *more)
        assert (ended.code, told in ended.err) == (2, True), ended


def test_a_layout_that_cannot_hold_what_is_to_be_rounded(run: Run, model: Path, text: Path) -> None:
    ended = run(
        "qat", model, "-o", "out", "--recipe", "gptq-w3g32", "--format", "awq", "--seqlen", "32",
        "--data", f"file:{text}", "--batch-size", "4", "--heldout", "4",
    )  # fmt: skip
    assert ended.code == 2
    assert "4 bits only" in ended.err
    assert not list(Path().glob("*out*"))


def test_the_command_says_it_in_its_own_words(run: Run, model: Path, quantized: Path) -> None:
    ended = run("qat", model, "-o", "out", "--recipe", "rtn-w4g128")
    assert ended.code == 2
    assert "--data SOURCE" in ended.err
    assert "--method" not in ended.err
    ended = run("qat", quantized, "-o", "out", "--reference", model, "--seed", "-1")
    assert ended.code == 2
    assert "seed -1 is not between" in ended.err


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("held", ["start", "reference", "text", "held-out text"])
def test_a_destination_that_holds_what_is_read(
    train: Train, tmp_path: Path, model: Path, quantized: Path, text: Path, held: str
) -> None:
    """A model by links, or a text."""
    original = model if held == "reference" else quantized
    out = Path(shutil.copytree(original, tmp_path / "out"))
    shutil.copy(text, out / "text.txt")
    more: dict[str, Any] = {
        "start": lambda: {"start": links_to(out, tmp_path / "links")},
        "reference": lambda: {"reference": links_to(out, tmp_path / "links")},
        "text": lambda: {"source": f"file:{out / 'text.txt'}"},
        "held-out text": lambda: {"heldout_source": f"file:{out / 'text.txt'}"},
    }[held]()
    with pytest.raises(UsageError, match="which --overwrite would delete"):
        train(out, options=QatOptions(overwrite=True), **more)
    assert (out / "text.txt").is_file()


@pytest.mark.usefixtures("unasked")
def test_a_destination_that_holds_what_is_read_before_anything_is_rounded(
    tmp_path: Path, model: Path, rtn: Recipe, text: Path
) -> None:
    out = Path(shutil.copytree(model, tmp_path / "out"))
    recipe = rtn.updated({"qat": {**SHORT, "source": f"file:{text}"}})
    options = QuantizeOptions(overwrite=True)
    with pytest.raises(UsageError, match="which --overwrite would delete"):
        stage.quantize(links_to(out, tmp_path / "links"), out, recipe, options)
    recipe = recipe.updated({"qat.source": f"file:{shutil.copy(text, out)}"})
    with pytest.raises(UsageError, match="which --overwrite would delete"):
        stage.quantize(model, out, recipe, options)
