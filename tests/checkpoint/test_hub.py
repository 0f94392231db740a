"""From what a user writes to a folder: paths first, then hub names, and clear words where neither
is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from llmquant.checkpoint.hub import resolve
from llmquant.errors import CheckpointError, UsageError


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve(tmp_path) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert resolve("~/m") == tmp_path / "m"


@pytest.mark.parametrize(
    "name",
    [
        "bad name!",
        "a/b/c",
        "/no/such/folder",
        "~nobody-of-that-name/m",
        "x" * 5000,
        "",
        "../m",
        "org/",
    ],
    ids=[
        "spaces",
        "two slashes",
        "absolute",
        "nobody's home",
        "too long",
        "empty",
        "parent",
        "half",
    ],
)
def test_what_is_neither_folder_nor_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # beside a clone there may well be an m
    with pytest.raises(UsageError, match="is neither a folder nor a hub name like org/model"):
        resolve(name)


def test_a_file_is_not_its_folder(model: Path) -> None:
    with pytest.raises(UsageError, match="is a file; give the model folder that holds it"):
        resolve(model / "config.json")


FAILURES = [
    (LocalEntryNotFoundError("x"), "not in the local cache, and the hub cannot be reached"),
    (OSError("the cable is cut\nand more"), "cannot be fetched from the hub: the cable is cut$"),
    (ValueError(""), "cannot be fetched from the hub: ValueError$"),
]


@pytest.mark.parametrize(("failure", "words"), FAILURES, ids=["offline", "network", "wordless"])
def test_a_failed_fetch_says_why(
    monkeypatch: pytest.MonkeyPatch, failure: Exception, words: str
) -> None:
    def snapshot_download(repo: str, **options: Any) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(CheckpointError, match=words):
        resolve("org/model")
