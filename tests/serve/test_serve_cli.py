"""The commands as processes: start, announce, answer, end by a signal; misuse before any work; the
chat over a pipe."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import typer
from children import ignoring_interrupts
from serving import TINY
from typer.testing import CliRunner

from llmquant.errors import CheckpointError, UnfitModelError, UsageError
from llmquant_serve.cli import register

ROOT = Path(__file__).parents[2]
COMMAND = [
    sys.executable,
    "-c",
    "import typer; from llmquant_serve.cli import register; a = typer.Typer(); register(a); a()",
]


def environment():
    paths = [ROOT, ROOT / "eval", ROOT / "serve"]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "PYTHONWARNINGS": "default",
    }


def call(*arguments):
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_serve_from_start_to_sigterm(packed):
    """In a shell's background, where a Ctrl-C is meant for another command. A stream that runs when
    SIGTERM comes is still sent to its end."""
    command = [*COMMAND, "serve", str(packed), "--port", "0", "--name", "tiny", "--device", "cpu"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        ignoring_interrupts(command), env=environment(), stderr=pipe, text=True
    ) as process:
        try:
            lines = []
            while not (
                address := re.search(
                    r"tiny at (http://127\.0\.0\.1:\d+)/v1, engine local",
                    lines[-1] if lines else "",
                )
            ):
                lines.append(process.stderr.readline())
                assert lines[-1], "".join(lines)
            with httpx.Client(base_url=address[1], timeout=60) as client:
                assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
                process.send_signal(signal.SIGINT)
                body = {"model": "tiny", "prompt": "The", "max_tokens": 3}
                assert (
                    client.post("/v1/completions", json=body).json()["usage"]["completion_tokens"]
                    <= 3
                )
                body |= {"max_tokens": 600, "ignore_eos": True, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as answer:
                    lines = filter(None, answer.iter_lines())
                    assert next(lines).startswith("data: {")
                    process.send_signal(signal.SIGTERM)
                    assert list(lines)[-1] == "data: [DONE]"
            rest = process.stderr.read()
            assert process.wait(30) == 0, rest
            assert "Traceback" not in rest
            assert re.search(
                r"computing in \w+ on cpu, \d+ threads?, kernel \w+ for \d+ linears; \w+ because ",
                rest,
            ), rest
        finally:
            process.kill()


def test_chat_over_a_pipe(packed):
    command = [
        *COMMAND,
        "chat",
        str(packed),
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
        "--system",
        "Be brief.",
    ]
    asked = "Tell me about rivers.\n/retry\n/nonsense\n\n/reset\n/system\nTell me about rivers.\n/exit\nnever read\n"
    ran = subprocess.run(
        command,
        env=environment(),
        input=asked,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert "computing in " in ran.stderr
    first, again, bare = ran.stdout.rstrip("\n").split("\n")[:3]
    assert first == again != ""
    assert bare
    assert ran.stderr.count("tokens/s") == 3
    assert ran.stderr.count("/retry asks again") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            ["serve", "MODEL", "--engine", "tgi"], "choose local, onnx or vllm", id="no such engine"
        ),
        pytest.param(
            ["serve", "MODEL", "--vllm-url", "http://x"],
            "--engine vllm",
            id="vLLM's option for local",
        ),
        pytest.param(
            ["serve", "MODEL", "--reference", "MODEL"], "--ui", id="reference without a page"
        ),
        pytest.param(["serve", "MODEL", "--api-key", " "], "API key", id="an empty key"),
        pytest.param(
            ["serve", "MODEL", "--host", "no.such.host.invalid"], "--host", id="no such host"
        ),
        pytest.param(
            ["chat", "MODEL", "--reference", "MODEL"], "--web", id="reference in a terminal"
        ),
        pytest.param(["chat", "MODEL", "--port", "0"], "--web", id="port in a terminal"),
    ],
)
def test_misuse(packed, arguments, message):
    result = call(
        *[packed if a == "MODEL" else a for a in arguments],
        *(["--port", "0"] if arguments[0] == "serve" else []),
    )
    assert isinstance(result.exception, UsageError)
    assert message in str(result.exception)


def test_a_port_that_is_taken(packed):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = call("serve", packed, "--port", taken.getsockname()[1])
    assert isinstance(result.exception, UsageError)
    assert "choose another with --port" in str(result.exception)


def test_a_folder_without_a_model(tmp_path):
    assert isinstance(call("serve", tmp_path, "--port", "0").exception, CheckpointError)


def test_nothing_of_vllm_is_imported():
    """Neither by the engine that talks to it nor by anything else of the package."""
    files = (ROOT / "serve" / "llmquant_serve").rglob("*.py")
    assert not [
        f.name
        for f in files
        if re.search(r"^\s*(import|from) vllm\b", f.read_text(encoding="utf-8"), re.MULTILINE)
    ]


@pytest.mark.parametrize("more", [(), ("--web", "--port", "0")], ids=["terminal", "page"])
def test_a_model_without_a_chat_template_cannot_chat(tmp_path, more):
    base = shutil.copytree(TINY, tmp_path / "base")
    (base / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    result = call("chat", base, *more)
    assert isinstance(result.exception, UnfitModelError)
    assert "base has no chat template, so it is no chat model" in str(result.exception)


def test_a_page_of_serve_and_of_chat_begin_alike():
    """The options' defaults are those of a page without options."""
    from llmquant_serve.chat.opening import Opening
    from llmquant_serve.cli.chat import chat_command

    given = {n: p.default for n, p in inspect.signature(chat_command).parameters.items()}
    sampling = Opening().sampling
    assert (given["system"], given["max_new_tokens"]) == (Opening().system, sampling.max_tokens)
    for name in ("temperature", "top_p", "top_k", "seed"):
        assert given[name] == getattr(sampling, name), name
