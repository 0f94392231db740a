"""``llmquant serve`` and ``llmquant chat``. Registered through the entry-point group
``llmquant.commands``.

Importing this module must stay cheap, because every ``llmquant`` command does it: torch, FastAPI
and Gradio are imported by the commands when they run.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from llmquant.cli.options import DeviceOption, DtypeOption, KernelOption, ThreadsOption
from llmquant.errors import LlmquantError, UsageError

if TYPE_CHECKING:
    from socket import socket

    from llmquant_serve.engines.options import ModelOptions
    from llmquant_serve.server import Binding
    from llmquant_serve.service import Limits


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("serve")(serve_command)
    app.command("chat")(chat_command)


def serve_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub name, packed or dense.")],
    engine: Annotated[
        str, typer.Option(help="local (in this process) or vllm (a process or server of its own).")
    ] = "local",
    host: Annotated[
        str, typer.Option(help="Address to listen on; loopback unless given.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Accepted API key; several times for several keys.", envvar="LLMQUANT_API_KEY"
        ),
    ] = None,
    ui: Annotated[bool, typer.Option("--ui", help="A chat page at /ui.")] = False,
    reference: Annotated[
        str | None, typer.Option(help="The original model, for A/B on the chat page.")
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name that clients use [default: the folder's].")
    ] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="Fewer positions than the model has.")
    ] = None,
    max_streams: Annotated[
        int, typer.Option(min=1, max=256, help="Sequences decoded together.")
    ] = 8,
    max_queue: Annotated[
        int, typer.Option(min=0, help="Sequences that may wait; beyond: 429.")
    ] = 64,
    max_prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest prompt [default: the context].")
    ] = None,
    max_output_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer [default: the context].")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Largest request body, in bytes.")] = 4
    * 2**20,
    stall_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until a client that takes nothing is dropped.")
    ] = 60.0,
    drain_timeout: Annotated[
        float, typer.Option(min=0.0, help="Seconds that a shutdown waits for running answers.")
    ] = 30.0,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Web origin that may call the API; several times.")
    ] = None,
    vllm_url: Annotated[
        str | None, typer.Option(help="A running vLLM, http://HOST:PORT; none starts one.")
    ] = None,
    vllm_python: Annotated[
        str | None,
        typer.Option(help="Python of the environment with vLLM.", envvar="LLMQUANT_VLLM_PYTHON"),
    ] = None,
    vllm_arg: Annotated[
        list[str] | None,
        typer.Option(
            help="Argument for vLLM's server, as it is: --vllm-arg=--tensor-parallel-size=4."
        ),
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="Log every request.")] = False,
) -> None:
    """Serve MODEL over an OpenAI-compatible API."""
    _need("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if ui else []))
    from llmquant_serve.engines.options import ModelOptions
    from llmquant_serve.server import Binding, bound_socket
    from llmquant_serve.service import Limits

    if reference is not None and not ui:
        raise UsageError("--reference is for the chat page; add --ui")
    binding = Binding(host, port, tuple(api_key or ()), tuple(cors_origin or ()), ui, access_log)
    limits = Limits(
        max_streams=max_streams,
        max_queue=max_queue,
        max_prompt=max_prompt_tokens,
        max_output=max_output_tokens,
        max_body=max_body,
        stall_seconds=stall_timeout,
        drain_seconds=drain_timeout,
    )
    options = ModelOptions(
        model=model,
        engine=engine,
        name=name,
        dtype=dtype,
        device=device,
        kernel=kernel,
        threads=threads,
        context=context,
        vllm_url=vllm_url,
        vllm_python=vllm_python,
        vllm_args=tuple(vllm_arg or ()),
    )
    listening = bound_socket(
        binding
    )  # before the model: a port that is taken should not cost a load
    try:
        _serve(options, limits, binding, listening, reference)
    finally:
        listening.close()


def chat_command(
    model: Annotated[str, typer.Argument(help="Model folder or hub name, packed or dense.")],
    web: Annotated[
        bool, typer.Option("--web", help="A chat page instead of the terminal.")
    ] = False,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Of the page; 0 takes a free one.")
    ] = 7860,
    reference: Annotated[
        str | None, typer.Option(help="The original model, for A/B on the page.")
    ] = None,
    system: Annotated[str, typer.Option(help="System prompt.")] = "",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of a reply.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0, help="0: greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus, when sampling.")] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="0: all.")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the sampling.")] = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Talk to MODEL, in the terminal or on a page."""
    _need("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if web else []))
    from llmquant_serve.build import build_service
    from llmquant_serve.engines.options import ModelOptions
    from llmquant_serve.service import Limits

    options = ModelOptions(model=model, dtype=dtype, device=device, kernel=kernel, threads=threads)
    if web:
        from llmquant_serve.server import Binding, bound_socket

        binding = Binding("127.0.0.1", port, ui=True)
        with bound_socket(binding) as listening:
            _serve(options, Limits(), binding, listening, reference)
        return
    if reference is not None:
        raise UsageError("--reference is for the page; add --web")
    import asyncio

    from llmquant_serve.chat.terminal import Terminal
    from llmquant_serve.engines.base import Sampling

    sampling = Sampling(
        max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    asyncio.run(Terminal(build_service(options, Limits(max_streams=1)), sampling, system).run())


def _serve(
    options: ModelOptions,
    limits: Limits,
    binding: Binding,
    listening: socket,
    reference: str | None,
) -> None:
    import llmquant
    from llmquant_serve.build import build_service
    from llmquant_serve.engines.options import ModelOptions
    from llmquant_serve.server import run
    from llmquant_serve.service import Limits

    original = None
    if reference is not None:
        beside = ModelOptions(
            model=reference, dtype=options.dtype, device=options.device, context=options.context
        )
        original = build_service(beside, Limits(max_streams=2))
    run(
        build_service(options, limits),
        binding,
        listening,
        original,
        llmquant.resolve(options.model),
    )


def _need(*modules: str) -> None:
    missing = [m for m in modules if find_spec(m) is None]
    if missing:
        raise LlmquantError(
            f"serving needs {', '.join(missing)}: install it with pip install 'llmquant[serve]'"
        )
