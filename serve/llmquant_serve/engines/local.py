"""The ``local`` engine: a model loaded by ``llmquant.load`` in this process, packed if the folder
is, with continuous batching."""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llmquant.errors import ArchitectureError
from llmquant_serve.engines.base import ModelInfo
from llmquant_serve.engines.batcher import Batcher
from llmquant_serve.engines.jobs.engine import JobEngine
from llmquant_serve.engines.step_graph import recorder_for


class LocalEngine(JobEngine):
    """An engine in this process; see :class:`~llmquant_serve.engines.base.Engine`.

    Args:
        model: from ``llmquant.load``; nothing else may use it afterwards.
        max_streams: sequences decoded together.
        context: an upper limit on the model's context, to bound memory.

    Raises:
        ArchitectureError: the model keeps a state other than keys and values.
    """

    def __init__(
        self, model: PreTrainedModel, max_streams: int = 8, context: int | None = None
    ) -> None:
        _check_states(model)
        info = ModelInfo.of(model.config, model.generation_config, context)
        super().__init__("local", info, Batcher(model, max_streams, recorder_for(model)))


def _check_states(model: PreTrainedModel) -> None:
    """Rows join and move as keys and values per token, which recurrent states do not have."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers}
    batched = (DynamicLayer, DynamicSlidingWindowLayer)
    others = sorted(kind.__name__ for kind in kinds if kind not in batched)
    if others:
        raise ArchitectureError(
            f"{type(model).__name__} keeps states that the local engine cannot batch ({', '.join(others)}); use --engine vllm"
        )
