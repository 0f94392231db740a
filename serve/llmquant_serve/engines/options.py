"""What an engine is built from."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What is served, and by what.

    Attributes:
        threads: of torch, for the local engine; None leaves what it has.
        vllm_url: a running vLLM; None starts one.
        vllm_python: the Python of the environment that has vLLM.
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
