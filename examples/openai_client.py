"""Serve a quantized model on this machine and talk to it with the openai package.

    pip install 'llmquant[serve]' openai
    python examples/openai_client.py [MODEL]

MODEL is any folder that llmquant loads; without one the example model is quantized first (RTN, no
text needed). The server listens on 127.0.0.1, on a free port, and is ended when the script is done.
Took 27 seconds on two cores.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openai import OpenAI

import llmquant

TINY = Path(__file__).resolve().parent / "tiny-llama"


@contextmanager
def server(model: Path) -> Iterator[str]:
    """Run `llmquant serve`; gives the address of its API."""
    command = [sys.executable, "-m", "llmquant", "serve", str(model)]
    command += ["--name", "demo", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield address(process)
        finally:
            process.terminate()  # it finishes running answers first


def address(process: subprocess.Popen[str]) -> str:
    """Port 0 takes a free port; the server says which, once it listens."""
    assert process.stderr is not None
    printed = []
    for line in process.stderr:
        printed.append(line)
        if found := re.search(r"at (http://127\.0\.0\.1:\d+/v1)", line):
            return found.group(1)
    raise SystemExit("the server did not start:\n" + "".join(printed))


def talk(base_url: str) -> None:
    """A chat, a stream, and log-probabilities of a completion."""
    client = OpenAI(base_url=base_url, api_key="none")
    print("models:", [model.id for model in client.models.list()])

    answer = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Tell me about the river."}],
        max_tokens=24,
        temperature=0,
    )
    print("answer:", answer.choices[0].message.content)

    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "And about the town?"}],
        max_tokens=24,
        temperature=0.7,
        seed=1,
        stream=True,
    )
    print(
        "stream:", "".join(part.choices[0].delta.content or "" for part in stream if part.choices)
    )

    completion = client.completions.create(
        model="demo", prompt="The town of", max_tokens=1, logprobs=3
    )
    logprobs = completion.choices[0].logprobs
    assert logprobs is not None
    print("most likely next tokens:", (logprobs.top_logprobs or [{}])[0])


def main() -> None:
    """Quantize if need be, serve, talk."""
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 1:
            model = Path(sys.argv[1])
        else:
            recipe = llmquant.load_recipe("rtn-w4g128")
            model = llmquant.quantize(TINY, Path(scratch) / "demo", recipe).path
        with server(model) as base_url:
            talk(base_url)


if __name__ == "__main__":
    main()
