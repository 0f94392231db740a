"""The chat in a terminal says why there is no reply, whichever layer refused it."""

from __future__ import annotations

import asyncio

import pytest
from serving import NAME, TINY

from llmquant_serve.cli.terminal import Terminal
from llmquant_serve.engines.base import EngineError, Sampling
from llmquant_serve.engines.local import LocalEngine
from llmquant_serve.generation.text_model import TextModel
from llmquant_serve.service import Limits, Service


class Broken(LocalEngine):
    """Fails at every request."""

    async def generate(self, prompt, sampling):
        raise EngineError("the engine is broken")
        yield


def without_template(service):
    service.text.tokenizer.chat_template = None


def with_small_limit(service):
    service.limits = Limits(max_prompt=2)


def unchanged(service):
    """The engine alone fails."""


@pytest.mark.parametrize(
    ("change", "line"),
    [
        pytest.param(without_template, "error: this model has no chat template", id="no template"),
        pytest.param(with_small_limit, "error: the prompt has", id="too long"),
        pytest.param(unchanged, "error: the engine is broken", id="engine"),
    ],
)
def test_errors_are_lines_on_stderr(model, capsys, change, line):
    service = Service(Broken(model), TextModel(TINY, 4096), NAME)
    change(service)
    assert asyncio.run(Terminal(service, Sampling(), "")._handle("Hello."))
    printed = capsys.readouterr()
    assert printed.out == ""  # and no speed of a reply that there is not
    assert printed.err.startswith(line)
    assert printed.err.count("\n") == 1
