"""What requests may contain. A parameter that is not listed is an error that names it, never
ignored.

The names and meanings are OpenAI's; ``top_k``, ``min_p``, ``repetition_penalty``, ``min_tokens``,
``ignore_eos``, ``stop_token_ids``, ``skip_special_tokens``, ``return_token_ids`` and
``return_tokens_as_token_ids`` are vLLM's extensions, spelled as there. Null and empty values are
absent, known or not. What is listed for the sake of clients that send it with its neutral value
(``best_of: 1``, ``store: false``, ``tool_choice: "auto"`` …) is refused with any other.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from llmquant_serve.generation.messages import Message, Strict

MAX_STOPS = 16
MAX_PROMPTS = 128
_INT64 = 2**63
_STOP_LENGTH = 1000

Stop = Annotated[str, Field(max_length=_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Ids = Annotated[list[TokenId], Field(min_length=1)]


class StreamOptions(Strict):
    include_usage: bool | None = None
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


# Parameters of OpenAI's that ask for something this server does not have.
UNSUPPORTED = {
    "audio": "sound",
    "functions": "tools",
    "moderation": "moderation",
    "prediction": "predicted outputs",
    "reasoning_effort": "a switch for reasoning",
    "suffix": "infilling",
    "tools": "tools",
    "tool_calls": "tools",
    "function_call": "tools",
    "tool_call_id": "tools",
    "web_search_options": "web search",
    "refusal": "refusals in a conversation",
    "annotations": "annotations in a conversation",
    "reasoning_content": "reasoning in a conversation",
    "image_url": "images",
    "input_audio": "sound",
    "file": "files",
}


class JsonSchema(Strict):
    name: str = "schema"
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema", default_factory=dict)
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class _Common(Strict):
    """What both kinds of completion share."""

    model: str | None = Field(default=None, max_length=1000)
    n: int | None = Field(default=None, ge=1, le=128)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = Field(
        default=None,
        description=f"a text of at most {_STOP_LENGTH} characters or a list of at most {MAX_STOPS} of them",
    )
    seed: int | None = Field(default=None, ge=-_INT64, lt=_INT64)
    temperature: float | None = Field(default=None, ge=0.0, le=2.0)
    top_p: float | None = Field(default=None, ge=0.0, le=1.0)
    frequency_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    presence_penalty: float | None = Field(default=None, ge=-2.0, le=2.0)
    logit_bias: dict[str, Annotated[float, Field(ge=-100.0, le=100.0)]] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    # vLLM's extensions
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0.0, le=1.0)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10.0)
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    skip_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stops_with_text(cls, value: Any) -> Any:
        return [s for s in value if s not in ("", None)] if isinstance(value, list) else value

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _biases_with_value(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: v for k, v in value.items() if v is not None}


class CompletionRequest(_Common):
    """``POST /v1/completions``."""

    required = frozenset({"prompt"})
    neutral: ClassVar = {"logprobs": (False,)}
    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(
        description=f"a text or a list of token ids, or a list of 1 to {MAX_PROMPTS} of either"
    )
    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    add_special_tokens: bool | None = None
    best_of: int | None = None


class ChatRequest(_Common):
    """``POST /v1/chat/completions``."""

    required = frozenset({"messages"})
    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    # Nothing of these changes an answer of this server.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    parallel_tool_calls: bool | None = None
    # And with other values these would.
    modalities: list[Literal["text"]] | None = None
    function_call: Literal["none", "auto"] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    verbosity: Literal["medium"] | None = None


class TokenizeRequest(Strict):
    """``POST /tokenize``: of a text, or of messages through the chat template."""

    required = frozenset({"prompt"})
    neutral: ClassVar = {"prompt": (None,)}
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(Strict):
    """``POST /detokenize``."""

    required = frozenset({"tokens"})
    model: str | None = None
    tokens: list[TokenId]


# What each route reads.
BODIES: dict[str, type[Strict]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
