"""``llmquant chat``: a conversation with a model, in the terminal or on a page."""

from __future__ import annotations

import asyncio
import shlex

from llmquant.cli.options import DeviceOption, DtypeOption, KernelOption, ThreadsOption
from llmquant.errors import UnfitModelError, UsageError
from llmquant_serve.cli import options as o
from llmquant_serve.cli.launch import launch, require

_PORT = 7860  # of the chat page, as Gradio's own


def chat_command(
    model: o.ModelArgument,
    web: o.WebOption = False,
    port: o.PagePortOption = None,
    reference: o.ReferenceOption = None,
    system: o.SystemOption = "",
    max_new_tokens: o.MaxNewTokensOption = 512,
    temperature: o.TemperatureOption = 0.7,
    top_p: o.TopPOption = 0.95,
    top_k: o.TopKOption = 0,
    seed: o.SeedOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Chat with MODEL in the terminal or on a page."""
    require("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if web else []))
    from llmquant_serve.build import build_service
    from llmquant_serve.chat.opening import Opening
    from llmquant_serve.cli.terminal import Terminal
    from llmquant_serve.engines.base import Sampling
    from llmquant_serve.engines.options import ModelOptions
    from llmquant_serve.server import Binding
    from llmquant_serve.service import Limits

    _check_chats(model)
    served = ModelOptions(model=model, dtype=dtype, device=device, kernel=kernel, threads=threads)
    sampling = Sampling(
        max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed
    )
    if web:
        binding = Binding("127.0.0.1", _PORT if port is None else port, ui=True)
        launch(served, Limits(), binding, reference, opening=Opening(system, sampling))
        return
    for name, given in (("--reference", reference), ("--port", port)):
        if given is not None:
            raise UsageError(f"{name} is for the chat page; add --web")
    asyncio.run(Terminal(build_service(served, Limits(max_streams=1)), sampling, system).run())


def _check_chats(model: str) -> None:
    """Raises UnfitModelError, before anything is loaded, for a model without a chat template."""
    import llmquant

    folder = llmquant.resolve(model)
    llmquant.read_config(folder)  # before the tokenizer, which would take the blame
    if not llmquant.load_tokenizer(folder).chat_template:
        raise UnfitModelError(
            f"{folder.name} has no chat template, so it is no chat model; continue texts with "
            f"llmquant generate {shlex.quote(model)} --raw TEXT, or serve it for /v1/completions"
        )
