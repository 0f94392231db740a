"""From a request to what the engine is given. Everything that can be refused is refused here, by
name, before any work."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from llmquant_serve.api.logprobs import Names
from llmquant_serve.api.requests import ChatRequest, CompletionRequest, ResponseFormat
from llmquant_serve.engines.base import Sampling
from llmquant_serve.errors import bad_request
from llmquant_serve.generation.detokenize import decode
from llmquant_serve.generation.token_names import IdNames
from llmquant_serve.service import Service

_COMPLETION_TOKENS = 16  # OpenAI's default
_ID_DIGITS = 10  # of a token id; Python refuses to read numbers of thousands
_QUOTED = 40


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence to generate."""

    index: int
    prompt: list[int]
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole request.

    Attributes:
        stops: stop strings.
        prompt_tokens: of every prompt once, as usage counts them.
        stream: the answer is sent in parts.
        usage_chunk: a stream ends with a part that holds the usage.
        keep_special: special tokens appear in the text.
        show_ids: the answer holds token ids too.
        names: of tokens, in log-probabilities.
        echoes: per choice, the text to repeat before the answer.
    """

    choices: list[Choice]
    stops: tuple[str, ...]
    prompt_tokens: int
    stream: bool
    usage_chunk: bool
    keep_special: bool
    show_ids: bool
    names: Names
    echoes: list[str] | None = None


async def plan_completion(service: Service, request: CompletionRequest) -> Plan:
    """The plan of a request.

    Raises:
        ApiError: the request has something that this server or its engine cannot do.
        TextError: the model cannot be given the prompt.
    """
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise bad_request(
            f"best_of is {request.best_of}; it must be equal to n ({request.n or 1}), or left out",
            "best_of",
        )
    prompts = await _prompts(service, request)
    echo = bool(request.echo)
    if request.max_tokens == 0 and not echo:
        raise bad_request(
            "max_tokens is 0, which needs echo: true to score the prompt", "max_tokens"
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
        place = "prompt" if len(prompts) == 1 else f"prompt.{j}"
        most = service.max_new_tokens(
            len(ids), request.max_tokens, _COMPLETION_TOKENS, "max_tokens", place
        )
        choices += [Choice(j * n + i, ids, _choice_sampling(base, i, most)) for i in range(n)]
    _check_supported(service, choices[0].sampling)
    if base.logprobs is not None:
        await service.text.name_tokens()
    echoes = None
    if echo:
        echoes = [text for text in _echoes(service, request, prompts) for _ in range(n)]
    return _plan(service, request, choices, sum(map(len, prompts)), echoes)


async def plan_chat(service: Service, request: ChatRequest) -> Plan:
    """The plan of a request.

    Raises:
        ApiError: the request has something that this server or its engine cannot do.
        TextError: the model cannot be given the prompt.
    """
    if request.top_logprobs and not request.logprobs:
        raise bad_request(
            f"top_logprobs is {request.top_logprobs}, which needs logprobs: true", "top_logprobs"
        )
    if (
        None not in (request.max_tokens, request.max_completion_tokens)
        and request.max_tokens != request.max_completion_tokens
    ):
        raise bad_request(
            f"max_tokens is {request.max_tokens} and max_completion_tokens is "
            f"{request.max_completion_tokens}; give one of them",
            "max_tokens",
        )
    n = request.n or 1
    service.gate.check(n, "n")
    ids = await service.text.encode_chat(request.messages)
    name = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
    requested = request.max_tokens or request.max_completion_tokens
    most = service.max_new_tokens(len(ids), requested, None, name, "messages")
    base = replace(
        _sampling(service, request),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )
    choices = [Choice(i, ids, _choice_sampling(base, i, most)) for i in range(n)]
    _check_supported(service, choices[0].sampling)
    if base.logprobs is not None:
        await service.text.name_tokens()
    return _plan(service, request, choices, len(ids), None)


async def _prompts(service: Service, request: CompletionRequest) -> list[list[int]]:
    """Token ids of every prompt, whichever of the four forms was sent."""
    special = request.add_special_tokens is not False
    return [
        await service.text.encode(p, "prompt", special=special)
        if isinstance(p, str)
        else service.text.checked(p, "prompt")
        for p in _prompt_list(request)
    ]


def _prompt_list(request: CompletionRequest) -> list[Any]:
    """The prompts as they were sent: each a text or a list of ids."""
    one = isinstance(request.prompt, str) or isinstance(request.prompt[0], int)
    return [request.prompt] if one else list(request.prompt)


def _echoes(service: Service, request: CompletionRequest, prompts: list[list[int]]) -> list[str]:
    """What echo repeats, per prompt: a text as it was sent, ids as their text."""
    keep = request.skip_special_tokens is False
    pairs = zip(_prompt_list(request), prompts, strict=True)
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


def _bias(service: Service, requested: dict[str, float]) -> dict[int, float]:
    """``logit_bias`` by token id; JSON's keys are strings."""
    bias = {}
    for key, value in requested.items():
        digits = key.isascii() and key.isdigit() and len(key) <= _ID_DIGITS
        if not (digits and int(key) < service.text.vocab):
            raise bad_request(
                f"logit_bias has the key {key[:_QUOTED]!r}; keys must be token ids from 0 to "
                f"{service.text.vocab - 1}",
                "logit_bias",
            )
        bias[int(key)] = value
    return bias


def _grammar(wanted: ResponseFormat | None) -> dict[str, Any] | None:
    """The JSON schema that the text must follow, if any."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return {"type": "object"}
    if wanted.json_schema is None:
        raise bad_request(
            "response_format of type json_schema needs json_schema", "response_format"
        )
    return wanted.json_schema.schema_


def _choice_sampling(base: Sampling, i: int, max_tokens: int) -> Sampling:
    """The sampling of choice ``i``: its seed is the request's plus i, and an impossible minimum is
    refused."""
    if base.min_tokens > max_tokens:
        raise bad_request(
            f"min_tokens is {base.min_tokens}, but at most {max_tokens} can be generated",
            "min_tokens",
        )
    seed = None if base.seed is None else _int64(base.seed + i)
    return replace(base, max_tokens=max_tokens, seed=seed)


def _int64(seed: int) -> int:
    """A seed beyond the last one starts again at the first, which engines can still take."""
    return (seed + 2**63) % 2**64 - 2**63


def _check_supported(service: Service, sampling: Sampling) -> None:
    """Refuse what the engine cannot honour."""
    refusal = service.engine.why_not(sampling)
    if refusal is not None:
        raise bad_request(
            f"{refusal.parameter}: {refusal.reason}", refusal.parameter, "unsupported_parameter"
        )


def _plan(
    service: Service,
    request: CompletionRequest | ChatRequest,
    choices: list[Choice],
    prompt_tokens: int,
    echoes: list[str] | None,
) -> Plan:
    stream = bool(request.stream)
    wanted = request.stream_options
    if wanted is not None and wanted.include_usage and not stream:
        raise bad_request(
            "stream_options.include_usage is true, which needs stream: true", "stream_options"
        )
    stop = request.stop
    return Plan(
        choices=choices,
        stops=() if stop is None else (stop,) if isinstance(stop, str) else tuple(stop),
        prompt_tokens=prompt_tokens,
        stream=stream,
        usage_chunk=stream and wanted is not None and bool(wanted.include_usage),
        keep_special=request.skip_special_tokens is False,
        show_ids=bool(request.return_token_ids),
        names=IdNames() if request.return_tokens_as_token_ids else service.text.names,
        echoes=echoes,
    )
