"""Measuring for an allocation, interrupted and resumed: nothing is measured twice, and the choice
is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from children import Run

from llmquant.errors import DiskError, QuantizationError, UsageError
from llmquant.planning.allocation import sensitivity
from llmquant.planning.allocation.allocate import allocate
from llmquant.planning.allocation.options import AllocateOptions
from llmquant.planning.allocation.saved import saved_beside
from llmquant.quantization.options import Events
from llmquant.recipe import Recipe

OPTIONS = AllocateOptions(4.5, (2, 4, 8, 16), (32, -1), probe_tokens=64)


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], list[str]]:
    """Notes which items are measured, and stops before one, given by how many came before."""

    def watch(stop: int | None) -> list[str]:
        seen: list[str] = []

        def noted(self: Any, item: Any, *rest: Any) -> Any:
            if len(seen) == stop:
                raise KeyboardInterrupt
            seen.append(item.names[0])
            return judge(self, item, *rest)

        monkeypatch.setattr(sensitivity._Pass, "_judge", noted)
        return seen

    judge = sensitivity._Pass._judge
    return watch


@pytest.mark.parametrize("kind", ["kl", "block"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_what_was_measured_is_not_measured_again(
    model: Path, gptq: Recipe, tmp_path: Path, judged: Any, kind: Any, stop: int
) -> None:
    headed = gptq.updated({"ignore": ()})
    options = replace(OPTIONS, sensitivity=kind, state=tmp_path / ".q.measured")
    everything = judged(None)
    whole = allocate(model, headed, replace(options, state=None))
    first = judged(stop)
    with pytest.raises(KeyboardInterrupt, match=rf"{stop} of {len(everything)} measurements"):
        allocate(model, headed, options)
    rest = judged(None)
    notes: list[str] = []
    resumed = allocate(model, headed, options, Events(on_note=notes.append))
    assert first + rest == everything
    assert "lm_head" in rest
    assert resumed == whole
    assert notes == [f"{stop} of {len(everything)} measurements were saved; resuming"]
    none = judged(0)
    assert allocate(model, headed, options) == whole
    assert none == []


def test_a_torn_last_line_is_measured_again(
    model: Path, gptq: Recipe, tmp_path: Path, judged: Any
) -> None:
    kept = tmp_path / ".q.measured"
    whole = allocate(model, gptq, replace(OPTIONS, state=kept))
    kept.write_bytes(kept.read_bytes()[:-5])
    again = judged(None)
    assert allocate(model, gptq, replace(OPTIONS, state=kept)) == whole
    assert len(again) == 1
    assert judged(0) == []
    assert allocate(model, gptq, replace(OPTIONS, state=kept)) == whole


def test_another_size_takes_the_same_measurements(
    model: Path, gptq: Recipe, tmp_path: Path, judged: Any
) -> None:
    options = replace(OPTIONS, state=tmp_path / ".q.measured")
    allocate(model, gptq, options)
    larger = allocate(model, gptq, replace(OPTIONS, target_bpw=6.5))
    assert judged(0) == []
    assert allocate(model, gptq, replace(options, target_bpw=6.5)) == larger


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"widths": (4, 8)}, "widths was (2, 4, 8, 16) and is (4, 8)"),
        ({"sensitivity": "block"}, "sensitivity was kl and is block"),
        ({"dtype": "bfloat16"}, "--dtype was float32 and is bfloat16"),
    ],
    ids=str,
)
def test_other_settings_are_refused_and_nothing_is_lost(
    model: Path, gptq: Recipe, tmp_path: Path, judged: Any, changed: Any, says: str
) -> None:
    options = replace(OPTIONS, state=tmp_path / ".q.measured")
    allocate(model, gptq, options)
    with pytest.raises(UsageError) as refused:
        allocate(model, gptq, replace(options, **changed))
    assert says in str(refused.value)
    assert judged(0) == []
    allocate(model, gptq, options)


def test_another_recipe_is_other_settings(model: Path, gptq: Recipe, tmp_path: Path) -> None:
    options = replace(OPTIONS, state=tmp_path / ".q.measured")
    allocate(model, gptq, options)
    with pytest.raises(UsageError, match=r"recipe gptq\.damping was 0\.01 and is 0\.5"):
        allocate(model, gptq.updated({"gptq.damping": 0.5}), options)


@pytest.mark.parametrize("begun", ["before", "within"])
@pytest.mark.parametrize(
    ("error", "stays"),
    [
        (QuantizationError("NaN"), False),
        (UsageError("no"), True),
        (DiskError("full"), True),
        (KeyboardInterrupt(), True),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_the_same_command_would_meet_again_keeps_nothing(
    tmp_path: Path, error: BaseException, stays: bool, begun: str
) -> None:
    """But for what another command saved: this one may name another model by mistake."""
    kept = tmp_path / ".q.measured"
    if begun == "before":
        kept.write_text("measured", encoding="utf-8")

    def failing() -> None:
        kept.write_text("measured", encoding="utf-8")
        raise error

    with pytest.raises(type(error)), saved_beside(tmp_path / "q", resume=True, restart=False):
        failing()
    assert kept.exists() == (stays or begun == "before")


@pytest.mark.parametrize("command", ["allocate", "quantize"])
def test_an_interrupted_command_resumes(
    run: Run, model: Path, text: Path, judged: Any, command: str
) -> None:
    asked = (
        command, model, "-o", "out", "--target-bpw", 4.5,
        "--nsamples", 4, "--seqlen", 32, "--calibration", f"file:{text}",
    )  # fmt: skip
    judged(2)
    stopped = run(*asked)
    assert stopped.code == 130, stopped.said
    assert "measurements are saved in .out.measured; run the same command to resume" in stopped.err
    assert sorted(p.name for p in Path().iterdir() if "out" in p.name) == [".out.measured"]
    other = run(*asked, "--seed", 5)
    assert (other.code, "with other settings: recipe seed was 0 and is 5" in other.err) == (2, True)
    none = run(*asked, "--no-resume")
    assert (none.code, "leave out --no-resume to resume it" in none.err) == (2, True)
    rest = judged(None)
    done = run(*asked)
    assert done.code == 0, done.said
    assert "2 of 8 measurements were saved; resuming" in done.said
    assert len(rest) == 6
    assert not Path(".out.measured").exists()


def _allocate(model: Path, text: Path) -> tuple[object, ...]:
    few = ("--nsamples", 4, "--seqlen", 32, "--calibration", f"file:{text}")
    return ("allocate", model, "-o", "out", "--target-bpw", 4.5, *few)


def test_restart_measures_all_anew(run: Run, model: Path, text: Path, judged: Any) -> None:
    asked = _allocate(model, text)
    judged(2)
    assert run(*asked).code == 130
    every = judged(None)
    done = run(*asked, "--restart", "--seed", 5)
    assert done.code == 0, done.said
    assert len(every) == 8
    assert [p.name for p in Path().iterdir() if "out" in p.name] == ["out"]


def test_a_restart_that_is_refused_or_measures_nothing_loses_nothing(
    run: Run, model: Path, text: Path, judged: Any
) -> None:
    asked = _allocate(model, text)
    judged(2)
    assert run(*asked).code == 130
    kept = Path(".out.measured").read_bytes()
    judged(0)
    for more, code in (
        (("--target-bpw", 40), 2),
        (("--calibration", "file:none.txt"), 2),
        ((), 130),
        (("--no-resume",), 130),
    ):
        assert run(*asked, *more, "--restart").code == code
        assert Path(".out.measured").read_bytes() == kept
    judged(1)
    assert run(*asked, "--restart", "--seed", 5).code == 130
    assert len(Path(".out.measured").read_bytes()) < len(kept)


def test_a_destination_in_a_folder_that_is_yet_to_be_made(
    run: Run, model: Path, text: Path
) -> None:
    asked = ("--nsamples", 4, "--seqlen", 32, "--calibration", f"file:{text}")
    done = run("quantize", model, "-o", "new/folder/out", "--target-bpw", 4.5, *asked)
    assert done.code == 0, done.said
    assert sorted(p.name for p in Path("new/folder").iterdir()) == ["out", "out.quantize.log.jsonl"]


def test_no_resume_keeps_nothing(run: Run, model: Path, text: Path, judged: Any) -> None:
    judged(2)
    asked = ("--nsamples", 4, "--seqlen", 32, "--calibration", f"file:{text}", "--no-resume")
    stopped = run("quantize", model, "-o", "out", "--target-bpw", 4.5, *asked)
    assert (stopped.code, "no incomplete output remains" in stopped.err) == (130, True)
    assert not [p for p in Path().iterdir() if "out" in p.name]
