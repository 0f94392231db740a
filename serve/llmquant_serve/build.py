"""From the command line's options to a service: which engine, which tokenizer, which name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmquant.errors import UsageError
from llmquant_serve.engines.options import ModelOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmquant_serve.drift.log import DriftLog
    from llmquant_serve.drift.options import DriftOptions
    from llmquant_serve.engines.base import Engine
    from llmquant_serve.service import Limits, Service


def build_engine(
    options: ModelOptions, max_streams: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Engine, str]:
    """The engine, not yet started, and how it computes: dtype, device, threads and kernels as a
    line, empty for an engine in another process.

    Args:
        max_streams: sequences decoded together.
        tokenizer: its end token ends answers too.

    Raises:
        LlmquantError: no such engine or model, or the engine cannot run it.
    """
    import llmquant

    if options.engine != "vllm" and (options.vllm_url or options.vllm_python or options.vllm_args):
        raise UsageError("--vllm-url, --vllm-python and --vllm-arg need --engine vllm")
    exported = options.engine == "local" and llmquant.is_onnx(llmquant.resolve(options.model))
    if options.engine == "onnx" or exported:
        from llmquant_serve.engines.onnx.engine import onnx_engine

        return onnx_engine(options, max_streams, tokenizer), ""
    if options.engine == "local":
        from llmquant_serve.engines.local import LocalEngine

        llmquant.set_threads(options.threads)
        device = llmquant.parse_device(options.device)
        chosen = llmquant.compute_dtype(options.model, options.dtype, device)
        model = llmquant.load(
            options.model, dtype=chosen.dtype, device=device, kernel=options.kernel
        )
        computing = llmquant.Computing.of(device, chosen).as_text(llmquant.describe(model).kernels)
        return LocalEngine(model, max_streams, options.context, tokenizer), computing
    if options.engine == "vllm":
        if options.threads is not None:
            raise UsageError(
                "--threads is for the local engine; for vLLM set the environment variables OMP_NUM_THREADS and VLLM_CPU_OMP_THREADS_BIND"
            )
        from llmquant_serve.engines.vllm import vllm_engine

        return vllm_engine(options, max_streams, tokenizer), ""
    raise UsageError(f"there is no engine {options.engine!r}; choose local, onnx or vllm")


def build_service(options: ModelOptions, limits: Limits) -> Service:
    """Engine, tokenizer and name of a folder or hub model.

    Raises:
        LlmquantError: as :func:`build_engine`, or a tokenizer that cannot be read.
    """
    from transformers.utils import logging as transformers_logging

    import llmquant
    from llmquant_serve.generation.text_model import TextModel
    from llmquant_serve.service import Service

    transformers_logging.disable_progress_bar()
    path = llmquant.resolve(options.model)
    text = TextModel(path, llmquant.read_config(path).get_text_config().vocab_size)
    engine, computing = build_engine(options, limits.max_streams, text.tokenizer)
    name = options.name or path.resolve().name
    return Service(engine, text, name, limits, computing=computing)


def watch_drift(
    service: Service, options: DriftOptions, log: DriftLog, original: Service | None
) -> None:
    """Observe the answers of a service.

    Args:
        original: scores a sample of them.

    Raises:
        UsageError: the profile, or the original, has other tokens than the service.
    """
    from llmquant import tokenizer_fingerprint
    from llmquant_serve.drift.original import Original
    from llmquant_serve.drift.recorder import Recorder

    profile = log.monitor.profile
    for each in (service, *([original] if original is not None and options.sample else [])):
        if tokenizer_fingerprint(each.text.tokenizer) != profile.tokenizer_sha256:
            raise UsageError(
                f"the drift profile was made with {profile.model}, whose tokenizer is another than {each.model}'s; "
                "make one with this model: llmquant validate MODEL --data FILE -o results.json --profile PROFILE"
            )
    scorer = None
    if original is not None and options.sample:
        scorer = Original(original.engine, options.sample)
    service.drift = Recorder(log, options.hooks, scorer)
