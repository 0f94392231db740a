"""What the serving tests of this folder share: tiny-llama in float32, and a server of it with the
defaults. What other modules of this folder call ``model`` is a folder."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from serving import TINY, Server, served
from transformers import PreTrainedModel

import llmquant


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    return llmquant.load(TINY, dtype="float32")


@pytest.fixture(scope="module")
def server(llama: PreTrainedModel) -> Iterator[Server]:
    with served(llama) as live:
        yield live


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with server.client as http:
        yield http
