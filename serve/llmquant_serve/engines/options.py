"""The options of the command line that choose a model and its engine."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The model that is served, and the engine that runs it.

    Attributes:
        model: folder or hub name.
        engine: ``local`` (for an ONNX export the same as ``onnx``), ``onnx`` or ``vllm``.
        name: the model's name in the API; None takes the folder's.
        threads: of torch, for the local engine; None leaves torch's own number.
        context: an upper limit on the model's context; None sets none.
        vllm_url: a running vLLM; None starts one.
        vllm_python: the Python of the environment that has vLLM; None: this one.
        vllm_args: passed to vLLM's server as they are.
    """

    model: str
    engine: str = "local"
    name: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    kernel: str = "auto"
    threads: int | None = None
    context: int | None = None
    vllm_url: str | None = None
    vllm_python: str | None = None
    vllm_args: tuple[str, ...] = field(default_factory=tuple)
