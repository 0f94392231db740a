"""The ``onnx`` engine: a folder that ``llmquant export --to onnx`` wrote, run by onnxruntime-genai
in a process of its own environment."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

import llmquant
from llmquant.errors import UsageError
from llmquant_serve.engines.base import ModelInfo
from llmquant_serve.engines.jobs.engine import JobEngine
from llmquant_serve.engines.onnx.sequences import Sequences
from llmquant_serve.engines.options import ModelOptions


class OnnxEngine(JobEngine):
    """An engine in another process; see :class:`~llmquant_serve.engines.base.Engine`.

    Args:
        worker: the process; nothing else may use it afterwards.
        max_streams: sequences that are decoded in turn.
    """

    def __init__(self, info: ModelInfo, worker: llmquant.OnnxWorker, max_streams: int) -> None:
        super().__init__("onnx", info, Sequences(worker, max_streams))


def onnx_engine(
    options: ModelOptions, max_streams: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> OnnxEngine:
    """The engine of the command line's options.

    Raises:
        UsageError: an option that is not for it, or no environment with ONNX Runtime.
        CheckpointError: the folder is no export.
    """
    given = {"--dtype": options.dtype, "--device": options.device, "--kernel": options.kernel}
    if strange := [name for name, value in given.items() if value != "auto"]:
        raise UsageError(
            f"{strange[0]} is for the local engine; an ONNX export was made for one dtype and device"
        )
    path = llmquant.resolve(options.model)
    info = ModelInfo.of(
        llmquant.read_config(path),
        llmquant.read_generation_config(path),
        options.context,
        tokenizer,
    )
    return OnnxEngine(info, llmquant.OnnxWorker(path, options.threads), max_streams)
