"""What the serving tests share: tiny-llama packed, and a live server of it on a free port of the
loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import NAME, TEXTS, TINY, MakeServer, Server, running
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import llmquant
from llmquant_serve.engines.local import LocalEngine
from llmquant_serve.generation.text_model import TextModel
from llmquant_serve.service import Limits, Service


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-llama by round-to-nearest, W4 g128; read-only."""
    recipe = llmquant.Recipe.model_validate({"method": "rtn", "scales": {"steps": 0}})
    return llmquant.quantize(TINY, tmp_path_factory.mktemp("served") / NAME, recipe).path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="session")
def model(packed: Path) -> PreTrainedModel:
    """For engines and for the answers they must give: one at a time, since a forward pass keeps no
    state.

    In float32, which every processor is fast in; without bf16 instructions, bf16 takes many times
    as long.
    """
    return llmquant.load(packed, dtype="float32")


@pytest.fixture(scope="session")
def wide() -> PreTrainedModel:
    """Unquantized, in float32: rounding in a batch is then too small to change a token of these
    texts."""
    return llmquant.load(TINY, dtype="float32")


@pytest.fixture(scope="session")
def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [tokenizer.encode(text) for text in TEXTS]


@pytest.fixture(scope="session")
def make_server(model: PreTrainedModel) -> MakeServer:
    """``make_server(limits=…, keys=…)``: a server of its own for one test."""

    def make(limits: Limits | None = None, **options: Any) -> AbstractContextManager[Server]:
        limits = limits or Limits()
        engine = LocalEngine(model, limits.max_streams)
        return running(Service(engine, TextModel(TINY, engine.info.vocab), NAME, limits), **options)

    return make


@pytest.fixture(scope="session")
def server(make_server: MakeServer) -> Iterator[Server]:
    with make_server() as live:
        yield live


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client as http:
        yield http
