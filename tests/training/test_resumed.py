"""What an interrupted run that rounds and then trains leaves, and who goes on from it: the same
command with the same bytes, another one not at all."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import SHORT, Train

import llmquant.training.stage as stage
from llmquant.checkpoint.reader import sha256_file
from llmquant.errors import UsageError
from llmquant.quantization.options import QuantizeOptions
from llmquant.recipe import Recipe
from llmquant.training.options import QatEvents, TrainingStep
from llmquant.training.stage import quantize


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in sorted(folder.iterdir())}


@pytest.fixture
def trained(gptq: Recipe) -> Recipe:
    return gptq.updated({"qat": SHORT})


@pytest.fixture
def rounded(
    model: Path, trained: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Leaves a run that was stopped as soon as the rounded folder had its name."""

    def stopped(*arguments: Any, **named: Any) -> None:
        round_only(*arguments, **named)
        raise KeyboardInterrupt

    round_only = stage.round_only
    with monkeypatch.context() as patched:
        patched.setattr(stage, "round_only", stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize(model, tmp_path / "out", trained)
    return round_only


@pytest.mark.usefixtures("rounded")
def test_the_rounded_folder_is_found_as_soon_as_it_has_its_name(
    tmp_path: Path, model: Path, trained: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "round_only", None)  # it must not be asked again
    done = quantize(model, tmp_path / "out", trained)
    monkeypatch.undo()
    whole = quantize(model, tmp_path / "whole", trained)
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")
    assert done.calibration is not None
    assert whole.calibration is not None
    assert asdict(done.calibration.summary) == asdict(whole.calibration.summary)
    assert not list(tmp_path.glob(".*"))


def test_warnings_of_the_first_step_are_told_after_the_second(
    tmp_path: Path, model: Path, trained: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    (original := Path(shutil.copytree(model, tmp_path / "model"))).joinpath("a.py").write_text("1")
    told = quantize(original, tmp_path / "whole", trained).warnings
    with monkeypatch.context() as patched:
        patched.setattr(stage, "qat", stop)
        with pytest.raises(KeyboardInterrupt):
            quantize(original, tmp_path / "out", trained)
    assert any("a.py" in warning for warning in told)
    assert quantize(original, tmp_path / "out", trained).warnings == told


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize(
    ("changes", "options", "told"),
    [
        pytest.param({"weights.bits": 3}, {}, "weights.bits was 4 and is 3", id="recipe"),
        pytest.param({"seed": 1}, {}, "recipe seed was 0 and is 1", id="seed"),
        pytest.param({}, {"base_model": "mine"}, "--base-model was none and is mine", id="name"),
        pytest.param({}, {"max_shard_size": 10**6}, "--max-shard-size", id="shards"),
        pytest.param({}, {"evaluation": "text"}, "overlap with --eval-text", id="evaluation"),
        pytest.param({}, {"threads": 3}, "threads was 1 and is 3", id="threads"),
    ],
)
def test_another_run_is_told_what_differs_and_deletes_nothing(
    tmp_path: Path,
    model: Path,
    trained: Recipe,
    text: Path,
    changes: dict[str, Any],
    options: dict[str, Any],
    told: str,
) -> None:
    kept = hashes(tmp_path / ".out.start")
    threads = torch.get_num_threads()
    if options.get("evaluation"):
        options = {"evaluation": f"file:{text}"}
    if wanted := options.get("threads"):
        options, told = {}, told.replace("was 1", f"was {threads}")
        torch.set_num_threads(wanted)
    try:
        with pytest.raises(UsageError, match=told):
            quantize(model, tmp_path / "out", trained.updated(changes), QuantizeOptions(**options))
    finally:
        torch.set_num_threads(threads)
    assert hashes(tmp_path / ".out.start") == kept
    again = QuantizeOptions(restart=True)
    done = quantize(model, tmp_path / "out", trained.updated({"weights.bits": 3}), again)
    assert done.modules[0].spec.startswith("W3")


def test_nothing_is_left_of_a_rounding_that_cannot_be(
    tmp_path: Path, model: Path, trained: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: Any, **__: Any) -> None:
        raise UsageError("no")

    monkeypatch.setattr(stage, "round_only", refuses)
    with pytest.raises(UsageError, match="no"):
        quantize(model, tmp_path / "out", trained)
    assert not list(tmp_path.iterdir())


def _stop(step: TrainingStep) -> None:
    if step.step == 5:
        raise KeyboardInterrupt


def test_a_state_that_is_half_removed_is_nobodys(train: Train, tmp_path: Path) -> None:
    """As a kill in the midst of ``--restart`` leaves it."""
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", events=QatEvents(on_step=_stop))
    (tmp_path / ".out.qat" / "run.json").unlink()
    train(tmp_path / "whole", lr=0.003)
    assert train(tmp_path / "out", lr=0.003).resumed == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


@pytest.mark.parametrize("both", [False, True], ids=["trained only", "rounded too"])
def test_what_a_kill_at_the_very_end_leaves_is_removed_by_the_same_command(
    tmp_path: Path, model: Path, trained: Recipe, train: Train, both: bool
) -> None:
    out, aside = tmp_path / "out", tmp_path / "aside"
    aside.mkdir()

    def keep(step: TrainingStep) -> None:
        if step.step == SHORT["steps"]:
            for left in tmp_path.glob(".out.*"):
                copy = shutil.copytree if left.is_dir() else shutil.copy2
                copy(left, aside / left.name)

    def again() -> None:
        if both:
            quantize(model, out, trained, training=(stage.QatOptions(), QatEvents(on_step=keep)))
        else:
            train(out, events=QatEvents(on_step=keep))

    again()
    before = hashes(out)
    for left in list(aside.iterdir()):
        left.rename(tmp_path / left.name)
    assert list(tmp_path.glob(".out.*"))
    with pytest.raises(UsageError, match="already exists"):
        again()
    assert not list(tmp_path.glob(".out.*"))
    assert hashes(out) == before
