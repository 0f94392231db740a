"""From command-line options to a running service: which engine, which tokenizer, which name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from llmquant.errors import UsageError

if TYPE_CHECKING:
    from llmquant_serve.engine import Engine
    from llmquant_serve.service import Limits, Service

EngineName = Literal["local", "vllm"]


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What is served, and by what.

    Attributes:
        vllm_url: a running vLLM; None starts one.
        vllm_python: the Python of the environment that has vLLM.
        vllm_args: passed to vLLM's server as they are.
    """

    model: str
    engine: str = "local"
    name: str | None = None
    dtype: str = "auto"
    device: str = "cpu"
    kernel: str = "auto"
    context: int | None = None
    vllm_url: str | None = None
    vllm_python: str | None = None
    vllm_args: tuple[str, ...] = field(default_factory=tuple)


def build_engine(options: ModelOptions, max_streams: int) -> Engine:
    """The engine, not yet started.

    Raises:
        LlmquantError: no such engine or model, or the engine cannot run it.
    """
    import llmquant

    if options.engine == "local":
        if options.vllm_url or options.vllm_python or options.vllm_args:
            raise UsageError("--vllm-url, --vllm-python and --vllm-arg need --engine vllm")
        from llmquant_serve.local import LocalEngine

        model = llmquant.load(options.model, dtype=options.dtype, device=options.device, kernel=options.kernel)
        return LocalEngine(model, max_streams, options.context)
    if options.engine == "vllm":
        from llmquant_serve.vllm import vllm_engine

        return vllm_engine(options, max_streams)
    raise UsageError(f"there is no engine {options.engine!r}; there are local and vllm")


def build_service(options: ModelOptions, limits: Limits) -> Service:
    """Engine, tokenizer and name of a folder or hub model.

    Raises:
        LlmquantError: as :func:`build_engine`, or a tokenizer that cannot be read.
    """
    from transformers.utils import logging as transformers_logging

    import llmquant
    from llmquant_serve.service import Service
    from llmquant_serve.text import TextModel

    transformers_logging.disable_progress_bar()
    path = llmquant.resolve(options.model)
    engine = build_engine(options, limits.max_streams)
    return Service(engine, TextModel(path, engine.info.vocab), options.name or path.resolve().name, limits)
