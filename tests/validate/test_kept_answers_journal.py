"""The journal: what is in it survives a kill at any byte, and it goes when the work is done."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from llmquant.errors import LlmquantError
from llmquant_eval.models.journal import opened


class StoppedError(Exception):
    """Ends a block early, as a failure does."""


def unfinished(path: Path, **values: object) -> int:
    """Add values and fail; how many there were before."""
    with contextlib.suppress(StoppedError), opened(path, restart=False) as journal:
        before = len(journal)
        for key, value in values.items():
            journal.add(key, value)
        raise StoppedError
    return before


def test_values_survive_a_cut_at_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    unfinished(path, one=[1, 0.1], two={"text": "é\nx"})
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        unfinished(path, three=3)
        with opened(path, restart=False) as journal:
            assert journal.get("three") == 3
            assert journal.get("one") in ([1, 0.1], None)
            assert journal.get("two") in ({"text": "é\nx"}, None)
            assert length < len(whole) - 1 or journal.get("two") is not None


def test_it_goes_when_the_work_is_done_or_nothing_is_in_it(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    unfinished(path)
    assert not path.exists()
    unfinished(path, one=1)
    assert unfinished(path) == 1
    with opened(path, restart=False):
        pass
    assert not path.exists()


def test_restart_forgets(tmp_path: Path) -> None:
    path = tmp_path / "a.journal"
    unfinished(path, one=1)
    with contextlib.suppress(StoppedError), opened(path, restart=True) as journal:
        assert journal.get("one") is None
        journal.add("two", 2)
        raise StoppedError
    assert unfinished(path) == 1


def test_a_folder_that_cannot_be_written_is_an_error_in_words(tmp_path: Path) -> None:
    with (
        pytest.raises(LlmquantError, match=r"cannot be written.*--output"),
        opened(tmp_path / "no" / "a", restart=False),
    ):
        pass
