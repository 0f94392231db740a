"""Where a file of results goes: refused before any work, and written whole."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from llmquant.errors import UsageError
from llmquant_eval.report.files import check_file, replace_file


def test_a_pipe_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """As ``-o /dev/stdout``: a rename would put a file in its place."""
    pipe, got = tmp_path / "pipe", list[str]()
    os.mkfifo(pipe)
    check_file(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    replace_file(pipe, "{}\n")
    reader.join(timeout=10)
    assert got == ["{}\n"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_a_folder_without_permission_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UsageError, match=f"no permission to write in {tmp_path}"):
        check_file(tmp_path / "results.json")


@pytest.mark.parametrize("command", ["eval --text file:gone", "bench", "compare"])
def test_a_folder_is_no_file(run, command: str, tmp_path: Path) -> None:
    """Before a model or results are looked for."""
    done = run(*command.split(), "gone", "gone2", "-o", tmp_path)
    assert (done.code, f"{tmp_path} is a folder; give a file" in done.said) == (2, True)
