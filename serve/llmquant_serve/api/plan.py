"""From a request to what the engine is asked for; everything that can be refused is refused here,
by name, before work begins."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llmquant_serve.api.requests import ChatRequest, CompletionRequest, ResponseFormat
from llmquant_serve.engines.base import Sampling
from llmquant_serve.errors import bad_request
from llmquant_serve.generation.detokenize import decode
from llmquant_serve.service import Service

_COMPLETION_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence to write."""

    index: int
    prompt: list[int]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole request.

    Attributes:
        prompt_tokens: of every prompt once, as usage counts them.
        echoes: per prompt, the text to repeat before the answer.
    """

    choices: list[Choice]
    stops: tuple[str, ...]
    prompt_tokens: int
    stream: bool
    usage_chunk: bool
    keep_special: bool
    show_ids: bool
    echoes: list[str] | None = None


async def plan_completion(service: Service, request: CompletionRequest) -> Plan:
    """Raises:
    ApiError: see the module text.
    """
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise bad_request("best_of other than n is not supported", "best_of")
    prompts = await _prompts(service, request)
    echo = bool(request.echo)
    if request.max_tokens == 0 and not echo:
        raise bad_request(
            "max_tokens is 0, which only makes sense together with echo", "max_tokens"
        )
    base = _sampling(service, request)
    base = replace(
        base, logprobs=request.logprobs, prompt_logprobs=request.logprobs if echo else None
    )
    if request.max_tokens == 0 and base.prompt_logprobs is None:
        base = replace(base, prompt_logprobs=0)
    n = request.n or 1
    service.gate.check(n * len(prompts), "n")
    choices = []
    for j, ids in enumerate(prompts):
        room = service.room(len(ids), request.max_tokens, _COMPLETION_TOKENS, "max_tokens")
        choices += [Choice(j * n + i, ids, _nth(base, i, room)) for i in range(n)]
    _ask(service, choices[0].sampling)
    echoes = (
        [text for text in _texts(service, request, prompts) for _ in range(n)] if echo else None
    )
    return _plan(request, choices, sum(map(len, prompts)), echoes)


async def plan_chat(service: Service, request: ChatRequest) -> Plan:
    """Raises:
    ApiError: see the module text.
    """
    if request.top_logprobs is not None and not request.logprobs:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    if (
        None not in (request.max_tokens, request.max_completion_tokens)
        and request.max_tokens != request.max_completion_tokens
    ):
        raise bad_request("max_tokens and max_completion_tokens differ; give one", "max_tokens")
    n = request.n or 1
    service.gate.check(n, "n")
    ids = await service.text.encode_chat(request.messages)
    name = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
    room = service.room(len(ids), request.max_tokens or request.max_completion_tokens, None, name)
    base = replace(
        _sampling(service, request),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    choices = [Choice(i, ids, _nth(base, i, room)) for i in range(n)]
    _ask(service, choices[0].sampling)
    return _plan(request, choices, len(ids), None)


async def _prompts(service: Service, request: CompletionRequest) -> list[list[int]]:
    """Token ids of every prompt, whichever of the four forms was sent."""
    special = request.add_special_tokens is not False
    return [
        await service.text.encode(p, "prompt", special=special)
        if isinstance(p, str)
        else service.text.checked(p, "prompt")
        for p in _given(request)
    ]


def _given(request: CompletionRequest) -> list[Any]:
    one = isinstance(request.prompt, str) or isinstance(request.prompt[0], int)
    return [request.prompt] if one else list(request.prompt)


def _texts(service: Service, request: CompletionRequest, prompts: list[list[int]]) -> list[str]:
    """What echo repeats: a text as it was sent, ids as they read."""
    keep = request.skip_special_tokens is False
    pairs = zip(_given(request), prompts, strict=True)
    return [
        p if isinstance(p, str) else decode(service.text.tokenizer, ids, keep_special=keep)
        for p, ids in pairs
    ]


def _sampling(service: Service, request: CompletionRequest | ChatRequest) -> Sampling:
    stop_ids = tuple(request.stop_token_ids or ())
    if stop_ids:
        service.text.checked(stop_ids, "stop_token_ids")
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        seed=request.seed,
        min_tokens=request.min_tokens or 0,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        repetition_penalty=request.repetition_penalty or 1.0,
        logit_bias=_bias(service, request.logit_bias or {}),
        stop_ids=stop_ids,
        ignore_eos=bool(request.ignore_eos),
        grammar=_grammar(request.response_format),
    )


def _bias(service: Service, given: dict[str, float]) -> dict[int, float]:
    found = {}
    for key, value in given.items():
        if not (key.isascii() and key.isdigit() and int(key) < service.text.vocab):
            raise bad_request(f"{key!r} is not a token id below {service.text.vocab}", "logit_bias")
        found[int(key)] = value
    return found


def _grammar(asked: ResponseFormat | None) -> dict[str, Any] | None:
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return {"type": "object"}
    if asked.json_schema is None:
        raise bad_request(
            "response_format of type json_schema needs json_schema", "response_format"
        )
    return asked.json_schema.schema_


def _nth(base: Sampling, i: int, room: int) -> Sampling:
    """The sampling of choice ``i``: its seed is the request's plus i, and an impossible minimum is
    refused."""
    if base.min_tokens > room:
        raise bad_request(
            f"min_tokens is {base.min_tokens}, but at most {room} can be generated", "min_tokens"
        )
    return replace(base, max_tokens=room, seed=None if base.seed is None else base.seed + i)


def _ask(service: Service, sampling: Sampling) -> None:
    refusal = service.engine.why_not(sampling)
    if refusal is not None:
        raise bad_request(
            f"{refusal.parameter}: {refusal.reason}", refusal.parameter, "unsupported_parameter"
        )


def _plan(
    request: CompletionRequest | ChatRequest,
    choices: list[Choice],
    prompt_tokens: int,
    echoes: list[str] | None,
) -> Plan:
    stream = bool(request.stream)
    if request.stream_options is not None and not stream:
        raise bad_request("stream_options needs stream: true", "stream_options")
    stop = request.stop
    return Plan(
        choices=choices,
        stops=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        prompt_tokens=prompt_tokens,
        stream=stream,
        usage_chunk=request.stream_options is not None and request.stream_options.include_usage,
        keep_special=request.skip_special_tokens is False,
        show_ids=bool(request.return_token_ids),
        echoes=echoes,
    )
