"""The ``local`` engine: a model loaded by ``llmquant.load`` in this process, packed if the folder
is, with continuous batching, or sequences in turn where states cannot be batched."""

from __future__ import annotations

import logging

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

import llmquant
from llmquant.errors import ArchitectureError
from llmquant_serve.engines.base import ModelInfo
from llmquant_serve.engines.batching.batcher import Batcher
from llmquant_serve.engines.batching.step_graph import recorder_for
from llmquant_serve.engines.batching.turns import TurnBatcher, apart, carries
from llmquant_serve.engines.jobs.engine import JobEngine

_LOG = logging.getLogger(__name__)


class LocalEngine(JobEngine):
    """An engine in this process; see :class:`~llmquant_serve.engines.base.Engine`.

    Args:
        model: from ``llmquant.load``; nothing else may use it afterwards.
        max_streams: sequences decoded together.
        context: an upper limit on the model's context, to bound memory.
        tokenizer: its end token ends answers too.

    Raises:
        ArchitectureError: the model keeps states that cannot be carried from token to token.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        max_streams: int = 8,
        context: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        info = ModelInfo.of(model.config, model.generation_config, context, tokenizer)
        super().__init__("local", info, _batcher(model, max_streams, info.context))


def _batcher(model: PreTrainedModel, max_streams: int, context: int) -> Batcher:
    """Rows join and move as keys and values per token; sequences with other states take turns, and
    those of a model that computes something else side by side."""
    switch = llmquant.longrope_switch(model.config)
    switch = None if switch is None or context <= switch else switch
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    others = sorted(k.__name__ for k in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
    alone = apart(model) if not others else f"it keeps other states: {', '.join(others)}"
    if alone is None:
        if switch is None:
            return Batcher(model, max_streams, recorder_for(model))
        _LOG.warning(
            "sequences take turns: behind %d tokens this model's positions have other frequencies "
            "(longrope); with --context %d they are batched",
            switch,
            switch,
        )
        return TurnBatcher(model, max_streams, switch)
    why = carries(model)
    if why is not None:
        raise ArchitectureError(
            f"{type(model).__name__} cannot be served by the local engine, neither several sequences at once ({alone}) nor in turn: "
            f"{why}; use --engine vllm"
        )
    if not others:
        _LOG.warning("sequences take turns: %s", alone)
    return TurnBatcher(model, max_streams, switch)
