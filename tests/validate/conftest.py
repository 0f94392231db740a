"""A cache of models for these tests: a small random Llama with a chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from validate_kit import write_rows

TURN = {"role": "user", "content": "Who are you?"}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Rows of every kind, some of them in groups."""
    return write_rows(
        tmp_path / "prod.jsonl",
        {"id": "plain", "prompt": "Hello there"},
        {"id": "right", "prompt": "What is two and two?", "answer": "four", "group": "sums"},
        {"id": "choice", "prompt": "Red or blue?", "choices": ["red", "blue"], "answer": "blue"},
        {"id": "talk", "messages": [TURN, {"role": "assistant", "content": "A model."}]},
        {"id": "json", "prompt": "JSON, please.", "schema": {"type": "object"}, "group": "sums"},
    )


@pytest.fixture(scope="session")
def base_folder() -> Path:
    """A model without a chat template."""
    return Path(__file__).resolve().parents[1] / "golden" / "base"
