"""Requests of three kinds, from one forward pass of tiny-llama over each text."""

from __future__ import annotations

from typing import Any

import pytest
from streams import TINY, damaged, encyclopedia, requests, source_code
from transformers import AutoTokenizer

import llmquant
from llmquant.drift.observation import DriftObservation

COUNT, SHIFTED = 500, 200
Pool = list[DriftObservation]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def pools(tokenizer: Any) -> dict[str, Pool]:
    """``same``: an encyclopedia; ``domain``: source code; ``damaged``: the encyclopedia, and scales
    of the model are wrong."""
    model = llmquant.load(TINY, dtype="float32")
    text, code = encyclopedia(), source_code()
    same = requests(model, tokenizer, text, COUNT)
    domain = requests(model, tokenizer, code, SHIFTED)
    return {
        "same": same,
        "domain": domain,
        "damaged": requests(damaged(model), tokenizer, text, SHIFTED),
    }
