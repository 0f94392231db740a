"""The ``vllm`` engine: vLLM over HTTP, as a child process or at a given URL. For models that
outgrow this process or machine.

Text stays on our side: vLLM gets token ids and returns token ids (``return_token_ids``), with
log-probabilities by id (``return_tokens_as_token_ids``), so both engines give the layers above
exactly the same things. Every sampling parameter is sent explicitly, because vLLM takes missing
ones from the model's generation config. Log-probabilities are vLLM's raw ones, as ours are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

import llmquant
from llmquant import read_config, read_generation_config
from llmquant.errors import UsageError
from llmquant_serve.engines.base import (
    EngineError,
    Health,
    Load,
    ModelInfo,
    Refusal,
    Sampling,
    Step,
    StoppedError,
)
from llmquant_serve.engines.options import ModelOptions
from llmquant_serve.engines.vllm_messages import (
    check_status,
    finish_reason,
    request_body,
    scored_steps,
    tokens,
)
from llmquant_serve.engines.vllm_process import ChildOptions, VllmChild

_NAME = "served"
_TIMEOUT = httpx.Timeout(None, connect=10.0)
_POLL_SECONDS = 2.0


class VllmEngine:
    """An engine in another process; see :class:`~llmquant_serve.engines.base.Engine`.

    Args:
        info: of the model folder; its context becomes vLLM's if that is shorter.
        child: a vLLM that this engine starts; None uses the one at ``url``.
        key: API key of the vLLM at ``url``.
        model: vLLM's name for the model; None takes the first that it serves.
    """

    name = "vllm"

    def __init__(
        self,
        info: ModelInfo,
        child: VllmChild | None,
        url: str | None,
        key: str | None,
        model: str | None,
    ) -> None:
        self.info = info
        self._child, self._url, self._key, self._model = child, url, key, model
        self._running = 0
        self._closed = False
        self._state = Health(False, "vLLM is not connected yet")
        self._watcher: asyncio.Task[None] | None = None
        self._client: httpx.AsyncClient | None = None

    def why_not(self, sampling: Sampling) -> Refusal | None:
        return None

    def health(self) -> Health:
        if self._child is None:
            return self._state
        if not self._child.ready:
            return Health(False, self._child.detail, self._child.restarts)
        return Health(self._state.ok, self._state.detail, self._child.restarts)

    def load(self) -> Load:
        return Load(running=self._running)

    async def start(self) -> None:
        self._client = httpx.AsyncClient(
            timeout=_TIMEOUT, limits=httpx.Limits(max_connections=None), trust_env=False
        )
        if self._child is not None:
            await self._child.start()
        self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        self._closed = True
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        if self._child is not None:
            await self._child.close()
        if self._client is not None:
            await self._client.aclose()

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[Step, None]:
        """Yield steps; see :class:`~llmquant_serve.engines.base.Engine`. Closing it closes the
        connection, and vLLM then aborts the request.

        Raises:
            RefusedError: vLLM does not take the request.
            EngineError: vLLM failed or cannot be reached.
        """
        body = request_body(prompt, sampling) | {"model": self._model}
        self._running += 1
        try:
            if sampling.prompt_logprobs is not None:
                for step in scored_steps(await self._post(body), prompt, sampling):
                    yield step
                return
            async with contextlib.aclosing(self._stream(body)) as steps:
                async for step in steps:
                    yield step
        except httpx.HTTPError as e:
            if self._closed:
                raise StoppedError("the engine is shutting down") from e
            raise EngineError(f"the connection to vLLM broke: {type(e).__name__}: {e}") from e
        finally:
            self._running -= 1

    async def _post(self, body: Mapping[str, Any]) -> dict[str, Any]:
        assert self._client is not None
        answer = await self._client.post(
            f"{self._address}/v1/completions", json=body, headers=self._headers
        )
        check_status(answer.status_code, answer.text)
        whole: dict[str, Any] = answer.json()
        return whole

    async def _stream(self, body: Mapping[str, Any]) -> AsyncGenerator[Step, None]:
        assert self._client is not None
        url, streamed = f"{self._address}/v1/completions", {**body, "stream": True}
        request = self._client.stream("POST", url, json=streamed, headers=self._headers)
        async with request as answer:
            if answer.status_code != 200:
                check_status(answer.status_code, (await answer.aread()).decode(errors="replace"))
            async for line in answer.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                part = json.loads(line.removeprefix("data: "))
                if "error" in part:
                    raise EngineError(f"vLLM: {part['error'].get('message', part['error'])}")
                for choice in part["choices"]:
                    step = Step(tokens(choice), finish_reason(choice.get("finish_reason")))
                    yield step
                    if step.finish is not None:
                        return
        raise EngineError("vLLM closed the connection before the answer was complete")

    @property
    def _address(self) -> str:
        return self._child.url if self._child is not None else self._url or ""

    @property
    def _headers(self) -> dict[str, str]:
        key = self._child.key if self._child is not None else self._key
        return {"Authorization": f"Bearer {key}"} if key else {}

    async def _watch(self) -> None:
        """Poll vLLM, more often while it does not answer."""
        while True:
            if self._child is None or self._child.ready:
                self._state = await self._poll()
            await asyncio.sleep(_POLL_SECONDS if self._state.ok else _POLL_SECONDS / 4)

    async def _poll(self) -> Health:
        """Read vLLM's list of models: whether it answers, its name for the model, its context."""
        assert self._client is not None
        try:
            answer = await self._client.get(
                f"{self._address}/v1/models", headers=self._headers, timeout=10
            )
            answer.raise_for_status()
            cards = answer.json()["data"]
        except (httpx.HTTPError, ValueError, KeyError) as e:
            return Health(
                False, f"vLLM at {self._address} does not answer: {type(e).__name__}: {e}"
            )
        matching = [c for c in cards if self._model is None or c["id"] == self._model]
        if not matching:
            return Health(False, f"vLLM at {self._address} does not serve {self._model}")
        self._model = matching[0]["id"]
        length = matching[0].get("max_model_len")
        if isinstance(length, int):
            self.info = ModelInfo(min(length, self.info.context), self.info.vocab, self.info.eos)
        return Health(True)


def vllm_engine(
    options: ModelOptions, max_streams: int, tokenizer: PreTrainedTokenizerBase | None = None
) -> VllmEngine:
    """The engine of the command line's options.

    Raises:
        UsageError: neither a URL nor a Python with vLLM is given, and vLLM is not installed here.
        CheckpointError: the model's config cannot be read.
    """
    path = llmquant.resolve(options.model)
    info = ModelInfo.of(read_config(path), read_generation_config(path), options.context, tokenizer)
    if options.vllm_url:
        if options.vllm_args or not options.vllm_url.startswith(("http://", "https://")):
            raise UsageError(
                "--vllm-url must be the address of a running vLLM, http://HOST:PORT, and cannot be "
                "combined with --vllm-arg"
            )
        url = options.vllm_url.rstrip("/").removesuffix("/v1")
        return VllmEngine(info, None, url, os.environ.get("VLLM_API_KEY"), None)
    # A folder named vllm on the path is found too, but has no origin.
    here = getattr(find_spec("vllm"), "origin", None)
    python = options.vllm_python or (sys.executable if here else None)
    if not python:
        raise UsageError(
            "--engine vllm needs vLLM: pip install 'llmquant[vllm]', or name another environment's "
            "Python with --vllm-python, or a running vLLM with --vllm-url"
        )
    arguments = ["--max-num-seqs", str(max_streams)]
    if options.dtype != "auto":
        arguments += ["--dtype", llmquant.parse_dtype(options.dtype).name]
    if options.context is not None:
        arguments += ["--max-model-len", str(options.context)]
    arguments += options.vllm_args  # last, so that they win
    child = VllmChild(ChildOptions(Path(python), path, _NAME, tuple(arguments)))
    return VllmEngine(info, child, None, None, _NAME)
