"""``llmquant serve``: a model behind an OpenAI-compatible API, with a chat page if wanted."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from llmquant.cli.options import DeviceOption, DtypeOption, KernelOption, ThreadsOption
from llmquant.errors import UsageError
from llmquant_serve.cli import options as o
from llmquant_serve.cli.launch import launch, require

if TYPE_CHECKING:
    from llmquant_serve.drift.options import DriftOptions


def serve_command(
    model: o.ModelArgument,
    engine: o.EngineOption = "local",
    host: o.HostOption = "127.0.0.1",
    port: o.PortOption = 8000,
    api_key: o.ApiKeyOption = None,
    ui: o.UiOption = False,
    reference: o.ServeReferenceOption = None,
    name: o.NameOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    kernel: KernelOption = "auto",
    threads: ThreadsOption = None,
    context: o.ContextOption = None,
    max_streams: o.MaxStreamsOption = 8,
    max_queue: o.MaxQueueOption = 64,
    max_prompt_tokens: o.MaxPromptOption = None,
    max_output_tokens: o.MaxOutputOption = None,
    max_body: o.MaxBodyOption = 4 * 2**20,
    stall_timeout: o.StallTimeoutOption = 60.0,
    drain_timeout: o.DrainTimeoutOption = 30.0,
    sse_keep_alive: o.SseKeepAliveOption = 10.0,
    cors_origin: o.CorsOriginOption = None,
    root_path: o.RootPathOption = "",
    trusted_proxy: o.TrustedProxyOption = None,
    vllm_url: o.VllmUrlOption = None,
    vllm_python: o.VllmPythonOption = None,
    vllm_arg: o.VllmArgOption = None,
    access_log: o.AccessLogOption = False,
    drift: o.DriftOption = None,
    drift_log: o.DriftLogOption = None,
    drift_alpha: o.DriftAlphaOption = None,
    drift_sample: o.DriftSampleOption = 0.0,
    on_drift: o.OnDriftOption = None,
    drift_webhook: o.DriftWebhookOption = None,
) -> None:
    """Serve MODEL over an OpenAI-compatible API."""
    require("fastapi", "uvicorn", "prometheus_client", *(["gradio"] if ui else []))
    from llmquant_serve.api.transport.addresses import THIS_MACHINE
    from llmquant_serve.engines.options import ModelOptions
    from llmquant_serve.server import Binding
    from llmquant_serve.service import Limits

    _check_reference(reference, ui, drift_sample)
    watching = _drift(drift, drift_log, drift_alpha, drift_sample, on_drift, drift_webhook)
    served = ModelOptions(
        model=model, engine=engine, name=name, dtype=dtype, device=device, kernel=kernel,
        threads=threads, context=context, vllm_url=vllm_url, vllm_python=vllm_python,
        vllm_args=tuple(vllm_arg or ()),
    )  # fmt: skip
    limits = Limits(
        max_streams=max_streams, max_queue=max_queue, max_prompt=max_prompt_tokens,
        max_output=max_output_tokens, max_body=max_body, stall_seconds=stall_timeout,
        drain_seconds=drain_timeout, keep_alive_seconds=sse_keep_alive,
    )  # fmt: skip
    binding = Binding(
        host, port, _keys(api_key), tuple(cors_origin or ()), ui, access_log, root_path.rstrip("/"),
        tuple(trusted_proxy or THIS_MACHINE),
    )  # fmt: skip
    launch(served, limits, binding, reference, watching)


def _check_reference(reference: str | None, ui: bool, sample: float) -> None:
    """Raises UsageError where the original is given for nothing, or is missing."""
    if reference is not None and not ui and not sample:
        raise UsageError(
            "--reference is for the chat page and for --drift-sample; add --ui, or --drift with --drift-sample"
        )
    if sample and reference is None:
        raise UsageError("--drift-sample needs the original; add --reference MODEL")


def _drift(
    profile: Path | None,
    log: Path | None,
    alpha: float | None,
    sample: float,
    command: str | None,
    webhook: str | None,
) -> DriftOptions | None:
    """What is to be done about drift.

    Raises:
        UsageError: an option that needs --drift, or cannot be right.
    """
    from llmquant import DriftMonitor
    from llmquant_serve.drift.hooks import Hooks
    from llmquant_serve.drift.options import DriftOptions

    given = {
        "--drift-log": log,
        "--drift-alpha": alpha,
        "--drift-sample": sample or None,
        "--on-drift": command,
        "--drift-webhook": webhook,
    }
    if profile is None:
        if lonely := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{lonely[0]} needs a profile; add --drift PROFILE")
        return None
    chosen = DriftMonitor.ALPHA if alpha is None else alpha
    return DriftOptions(profile, log, chosen, Hooks.of(command, webhook), sample)


def _keys(given: list[str] | None) -> tuple[str, ...]:
    """The API keys. A variable that is set to nothing, as by a template with a missing secret, was
    meant to hold one.

    Raises:
        UsageError: LLMQUANT_API_KEY is set and empty.
    """
    if not given and os.environ.get(o.API_KEY_VARIABLE) is not None:
        raise UsageError(
            f"{o.API_KEY_VARIABLE} is set but empty; set a key, or unset it to serve without one"
        )
    return tuple(given or ())
