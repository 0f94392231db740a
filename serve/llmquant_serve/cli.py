"""``llmquant serve`` and ``llmquant chat``. Registered through the entry-point group ``llmquant.commands``.

Importing this module must stay cheap, because every ``llmquant`` command does it: torch, FastAPI and Gradio are imported by the
commands when they run.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated

import typer

from llmquant.errors import LlmquantError


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("serve")(serve_command)


def serve_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub name, packed or dense.")],
    engine: Annotated[str, typer.Option(help="local (in this process) or vllm (a process or server of its own).")] = "local",
    host: Annotated[str, typer.Option(help="Address to listen on; loopback unless given.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None, typer.Option(help="Accepted API key; several times for several keys.", envvar="LLMQUANT_API_KEY")
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="A chat page at /ui.")] = False,
    name: Annotated[str | None, typer.Option(help="Name that clients use [default: the folder's].")] = None,
    dtype: Annotated[str, typer.Option(help="auto (bfloat16 on CPU), bfloat16, float16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda …")] = "cpu",
    kernel: Annotated[str, typer.Option(help="Kernel of packed layers: auto, or one by name.")] = "auto",
    context: Annotated[int | None, typer.Option(min=2, help="Fewer positions than the model has.")] = None,
    max_streams: Annotated[int, typer.Option(min=1, max=256, help="Sequences decoded together.")] = 8,
    max_queue: Annotated[int, typer.Option(min=0, help="Sequences that may wait; beyond: 429.")] = 64,
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="Longest prompt [default: the context].")] = None,
    max_output_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer [default: the context].")] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request body, in bytes.")] = 4 * 2**20,
    stall_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until a client that takes nothing is dropped.")] = 60.0,
    drain_timeout: Annotated[float, typer.Option(min=0.0, help="Seconds that a shutdown waits for running answers.")] = 30.0,
    cors_origin: Annotated[list[str] | None, typer.Option(help="Web origin that may call the API; several times.")] = None,
    vllm_url: Annotated[str | None, typer.Option(help="A running vLLM, http://HOST:PORT; none starts one.")] = None,
    vllm_python: Annotated[
        str | None, typer.Option(help="Python of the environment with vLLM.", envvar="LLMQUANT_VLLM_PYTHON")
    ] = None,
    vllm_arg: Annotated[
        list[str] | None, typer.Option(help="Argument for vLLM's server, as it is: --vllm-arg=--tensor-parallel-size=4.")
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
) -> None:
    """Serve MODEL over an OpenAI-compatible API."""
    _need("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if ui else []))
    from llmquant_serve.options import ModelOptions, build_service
    from llmquant_serve.run import Binding, bound_socket, run
    from llmquant_serve.service import Limits

    binding = Binding(host, port, tuple(api_key or ()), tuple(cors_origin or ()), ui, access_log)
    limits = Limits(
        max_streams=max_streams, max_queue=max_queue, max_prompt=max_prompt_tokens, max_output=max_output_tokens,
        max_body=max_body, stall_seconds=stall_timeout, drain_seconds=drain_timeout,
    )  # fmt: skip
    options = ModelOptions(
        model=model, engine=engine, name=name, dtype=dtype, device=device, kernel=kernel, context=context, vllm_url=vllm_url,
        vllm_python=vllm_python, vllm_args=tuple(vllm_arg or ()),
    )  # fmt: skip
    listening = bound_socket(binding)  # before the model: a port that is taken should not cost a load
    try:
        run(build_service(options, limits), binding, listening)
    finally:
        listening.close()


def _need(*modules: str) -> None:
    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        raise LlmquantError(f"serving needs {', '.join(missing)}: install it with pip install 'llmquant[serve]'")
