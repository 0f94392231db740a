"""What a rung keeps while it is made, and what of it a later run goes on from."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llmquant
from llmquant import Events, Recipe
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.auto.trials.rung import Trial


def _trial(folder: Path) -> Any:
    """Of which only what a rung is made with is there."""
    request = SimpleNamespace(engine="any", device="cpu", model="model", max_memory=None)
    work = SimpleNamespace(rung=lambda _: folder)
    screen = SimpleNamespace(note=lambda _: None)
    split = SimpleNamespace(heldout=SimpleNamespace(source="file:text"))
    return SimpleNamespace(request=request, work=work, screen=screen, split=split)


def test_an_allocation_is_kept_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beginning of a recipe is a recipe too, of another size."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    chosen = Recipe().updated({"weights.bits": 3})
    monkeypatch.setattr(llmquant, "allocate", lambda *_: SimpleNamespace(recipe=chosen))
    step: Any = SimpleNamespace(target=3.5, folder="mixed", recipe=Recipe())
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(LlmquantError, match="No space left"):
            Trial._recipe(_trial(tmp_path), step, Events())
    assert not list(tmp_path.iterdir())
    assert Trial._recipe(_trial(tmp_path), step, Events()) == chosen


def test_measurements_that_do_not_fit_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    chosen = Recipe().updated({"weights.bits": 3})

    def allocate(*arguments: Any) -> Any:
        asked.append(arguments[2])
        if len(asked) < 3:
            raise UsageError("threads was 1 and is 2")
        return SimpleNamespace(recipe=chosen)

    monkeypatch.setattr(llmquant, "allocate", allocate)
    step: Any = SimpleNamespace(target=3.5, folder="mixed", name="mixed", recipe=Recipe())
    with pytest.raises(UsageError, match="threads"):
        Trial._recipe(_trial(tmp_path), step, Events())
    state = asked[0].state
    state.write_text("measured", encoding="utf-8")
    assert Trial._recipe(_trial(tmp_path), step, Events()) == chosen
    assert [options.state for options in asked] == [state] * 3
    assert not state.exists()


@pytest.mark.parametrize("left", [".out.resume", "..out.start.resume", ".out.start", ".out.qat"])
def test_a_state_that_does_not_fit_is_started_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    asked = []

    def quantize(*arguments: Any) -> str:
        asked.append(arguments[3].restart)
        if not asked[-1]:
            raise UsageError("threads was 1 and is 2")
        return "made"

    monkeypatch.setattr(llmquant, "quantize", quantize)
    step: Any = SimpleNamespace(name="qat-w4g128")
    arguments = step, tmp_path / "out", Recipe(method="rtn"), Events()
    with pytest.raises(UsageError, match="threads"):
        Trial._quantized(_trial(tmp_path), *arguments)
    (tmp_path / left).mkdir()
    assert Trial._quantized(_trial(tmp_path), *arguments) == "made"
    assert asked == [False, False, True]
