"""The options of both commands, each written once. Their defaults are in the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmquant.cli.options import from_home

ModelArgument = Annotated[
    str, typer.Argument(help="Model folder or hub name, quantized or not.", metavar="MODEL")
]

# The model and what runs it.
EngineOption = Annotated[
    str,
    typer.Option(
        "--engine",
        help="local runs the model in this process; onnx an ONNX export; vllm needs a vLLM of its own.",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", help="Model name in the API [default: the folder's name]."),
]
ContextOption = Annotated[
    int | None,
    typer.Option(
        "--context", min=2, help="Context length in tokens, to save memory [default: the model's]."
    ),
]
VllmUrlOption = Annotated[
    str | None,
    typer.Option("--vllm-url", help="Use the vLLM that runs at http://HOST:PORT."),
]
VllmPythonOption = Annotated[
    str | None,
    typer.Option(
        "--vllm-python",
        help="Start vLLM with this Python, from the environment that has it [default: this one].",
        envvar="LLMQUANT_VLLM_PYTHON",
    ),
]
VllmArgOption = Annotated[
    list[str] | None,
    typer.Option(
        "--vllm-arg",
        help="Pass an argument to vLLM: --vllm-arg=--tensor-parallel-size=4 (repeatable).",
    ),
]

# Where the server listens and for whom.
API_KEY_VARIABLE = "LLMQUANT_API_KEY"
HostOption = Annotated[
    str,
    typer.Option("--host", help="Address to listen on; the default is for this machine only."),
]
PortOption = Annotated[
    int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 takes a free one.")
]
ApiKeyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--api-key",
        help="API key that clients must send (repeatable) [default: none needed].",
        envvar=API_KEY_VARIABLE,
    ),
]
CorsOriginOption = Annotated[
    list[str] | None,
    typer.Option("--cors-origin", help="Web origin whose pages may call the API (repeatable)."),
]
RootPathOption = Annotated[
    str,
    typer.Option(
        "--root-path", help="Prefix under which a reverse proxy serves this server, like /llm."
    ),
]
TrustedProxyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--trusted-proxy",
        help="Address or network of a reverse proxy whose X-Forwarded headers are believed "
        "(repeatable) [default: this machine].",
    ),
]
AccessLogOption = Annotated[bool, typer.Option("--access-log", help="Log every request.")]

# The chat page.
UiOption = Annotated[bool, typer.Option("--ui", help="Serve a chat page at /ui.")]
ReferenceOption = Annotated[
    str | None,
    typer.Option("--reference", help="The original model, to compare with on the chat page."),
]
ServeReferenceOption = Annotated[
    str | None,
    typer.Option(
        "--reference",
        help="The original model, to compare with on the chat page or by --drift-sample.",
    ),
]

# Drift.
DriftOption = Annotated[
    Path | None,
    typer.Option(
        "--drift",
        help="Compare prompts and answers with this profile (llmquant validate --profile), and raise alarms.",
        metavar="PROFILE",
        callback=from_home,
    ),
]
DriftLogOption = Annotated[
    Path | None,
    typer.Option(
        "--drift-log",
        help="What is compared, a line for each request, no text; a restart continues it "
        "[default: PROFILE's name with .log.jsonl].",
        metavar="FILE",
        callback=from_home,
    ),
]
DriftAlphaOption = Annotated[
    float | None,
    typer.Option(
        "--drift-alpha",
        help="Probability of any false alarm, however long one watches [default: 0.01].",
    ),
]
DriftSampleOption = Annotated[
    float,
    typer.Option(
        "--drift-sample",
        min=0.0,
        max=1.0,
        help="Fraction of the answers that the original (--reference) scores too, in the background.",
    ),
]
OnDriftOption = Annotated[
    str | None,
    typer.Option(
        "--on-drift",
        help="Program to run once for each alarm, with its arguments; it gets JSON on stdin. No shell.",
        metavar="COMMAND",
    ),
]
DriftWebhookOption = Annotated[
    str | None,
    typer.Option(
        "--drift-webhook", help="Address that each alarm is sent to, as JSON.", metavar="URL"
    ),
]

# Bounds.
DAY = 86400.0  # of seconds
MaxStreamsOption = Annotated[
    int,
    typer.Option("--max-streams", min=1, max=256, help="Sequences that are decoded together."),
]
MaxQueueOption = Annotated[
    int,
    typer.Option(
        "--max-queue", min=0, help="Sequences that may wait; beyond that, requests get a 429."
    ),
]
MaxPromptOption = Annotated[
    int | None,
    typer.Option(
        "--max-prompt-tokens", min=1, help="Longest prompt, in tokens [default: the context]."
    ),
]
MaxOutputOption = Annotated[
    int | None,
    typer.Option(
        "--max-output-tokens", min=1, help="Longest answer, in tokens [default: the context]."
    ),
]
MaxBodyOption = Annotated[
    int, typer.Option("--max-body", min=1024, help="Largest request body, in bytes.")
]
StallTimeoutOption = Annotated[
    float,
    typer.Option(
        "--stall-timeout",
        min=0.1,
        max=DAY,
        help="Seconds after which a client that reads nothing is disconnected.",
    ),
]
SseKeepAliveOption = Annotated[
    float,
    typer.Option(
        "--sse-keep-alive",
        min=0.0,
        max=DAY,
        help="Seconds after which a stream with nothing to send sends a comment; 0: never.",
    ),
]
DrainTimeoutOption = Annotated[
    float,
    typer.Option(
        "--drain-timeout",
        min=0.0,
        max=DAY,
        help="Seconds that a shutdown waits for running answers.",
    ),
]

# A conversation.
WebOption = Annotated[
    bool, typer.Option("--web", help="Serve a chat page instead of chatting in the terminal.")
]
PagePortOption = Annotated[
    int | None,
    typer.Option(
        "--port",
        min=0,
        max=65535,
        help="Port of the chat page; 0 takes a free one [default: 7860].",
    ),
]
SystemOption = Annotated[str, typer.Option("--system", help="System prompt.")]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest reply, in tokens.")
]
TemperatureOption = Annotated[
    float,
    typer.Option("--temperature", min=0.0, max=2.0, help="Sampling temperature; 0 is greedy."),
]
TopPOption = Annotated[
    float,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        help="Sample from the most likely tokens that have this probability together.",
    ),
]
TopKOption = Annotated[
    int, typer.Option("--top-k", min=0, help="Sample from this many most likely tokens; 0: all.")
]
SeedOption = Annotated[
    int | None, typer.Option("--seed", min=0, help="Seed of the sampling [default: random].")
]
