"""VllmChild: vLLM's own server as a supervised child process. It is started, watched, restarted
after a crash with growing pauses, and stopped when this process stops.

vLLM lives in an environment of its own; nothing of it is imported here. The child listens on a free
loopback port and requires a random key, so that only this process talks to it. It writes to our
stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx

from llmquant.errors import UsageError

_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 60.0
_POLL_SECONDS = 0.5
_STOP_SECONDS = 20.0
_SETTLED_SECONDS = 60.0  # a child that lived for so long is restarted after the first pause


@dataclass(frozen=True, slots=True)
class ChildOptions:
    """How to start vLLM.

    Attributes:
        python: of the environment that has vLLM.
        arguments: for its server, as they are: ``--tensor-parallel-size=4``,
            ``--distributed-executor-backend=ray`` …
    """

    python: Path
    model: Path
    served_name: str
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.python.is_file():
            raise UsageError(
                f"there is no Python at {self.python}; give the one of an environment with vLLM to --vllm-python"
            )

    def command(self, port: int) -> list[str]:
        """The command line that starts vLLM's server on ``port``."""
        return [
            str(self.python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(self.model),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--served-model-name",
            self.served_name,
            *self.arguments,
        ]


class VllmChild:
    """vLLM's server and the task that supervises it.

    Attributes:
        key: the API key that the child requires.
        url: where the current child listens.
        ready: it answers.
        detail: what it is doing, or how it ended.
        restarts: how often it was restarted.
    """

    def __init__(self, options: ChildOptions) -> None:
        self._options = options
        self.key = secrets.token_urlsafe(32)
        self.url, self.ready, self.detail, self.restarts = "", False, "not started", 0
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start the child; returns at once, and ``ready`` becomes true later."""
        self._task = asyncio.create_task(self._supervise())

    async def close(self) -> None:
        """Stop the child, by SIGKILL if SIGTERM does not suffice."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        await self._stop()

    async def _supervise(self) -> None:
        pause, loop = _FIRST_PAUSE, asyncio.get_running_loop()
        while True:
            start = loop.time()
            await self._spawn()
            assert self._process is not None
            watching = asyncio.create_task(self._until_ready())
            code = await self._process.wait()
            watching.cancel()
            self.ready = False
            _signal_group(self._process.pid, signal.SIGKILL)  # workers that outlived their parent
            pause = _FIRST_PAUSE if loop.time() - start > _SETTLED_SECONDS else pause
            self.detail = f"vLLM exited with code {code}; it will be restarted in {pause:.0f} s"
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            self.restarts += 1

    async def _spawn(self) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.url, self.detail = f"http://127.0.0.1:{port}", "vLLM is starting"
        self._process = await asyncio.create_subprocess_exec(
            *self._options.command(port),
            env=_environment(self.key),
            stdin=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

    async def _until_ready(self) -> None:
        async with httpx.AsyncClient(base_url=self.url, timeout=2) as client:
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get("/health")).status_code == 200:
                        break
                await asyncio.sleep(_POLL_SECONDS)
        self.ready, self.detail = True, ""

    async def _stop(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        _signal_group(process.pid, signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), _STOP_SECONDS)
        except TimeoutError:
            _signal_group(process.pid, signal.SIGKILL)
            await process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    """Signal all processes of the child, which has a session of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _environment(key: str) -> Mapping[str, str]:
    """Our environment without what belongs to our Python, with the key, and without telemetry."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in ("PYTHONPATH", "OMP_NUM_THREADS", "VIRTUAL_ENV")
    }
    return kept | {"VLLM_API_KEY": key, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
