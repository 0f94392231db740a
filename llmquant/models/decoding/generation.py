"""What ends an answer, and transformers' settings for an answer as it was asked for.

A folder's ``generation_config.json`` often lacks the token that ends a turn of its chats, and the
tokenizer has it; or the other way round. So both count, as in vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

from llmquant.checkpoint.companions.confusion import first_line
from llmquant.errors import ArchitectureError, LlmquantError


def end_tokens(
    config: PreTrainedConfig,
    generation_config: GenerationConfig | None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> frozenset[int]:
    """Tokens that end an answer: those of the generation config, or where it has none of the
    config, and the tokenizer's own."""
    ids = _ids(generation_config) or _ids(config.get_text_config())
    return ids if tokenizer is None else ids | _ids(tokenizer)


def plain_generation(
    max_new_tokens: int,
    temperature: float,
    ends: Iterable[int],
    tokenizer: PreTrainedTokenizerBase,
    top_p: float = 1.0,
) -> GenerationConfig:
    """Settings without the penalties and filters of the folder's own.

    Args:
        temperature: 0 is greedy.
        ends: tokens that end an answer; shorter answers of a batch are padded with the tokenizer's
            padding, or with one of these.
    """
    stops, drawn = sorted(ends), temperature > 0
    pad = tokenizer.pad_token_id
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=drawn,
        temperature=temperature if drawn else None,
        top_p=top_p if drawn else None,
        top_k=0 if drawn else None,  # None is 50 there
        eos_token_id=stops or None,
        pad_token_id=pad if pad is not None else min(stops, default=0),
    )


def generate_tokens(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """What ``model.generate`` gives for prompts ``[rows, tokens]``: those, and the new tokens.

    Raises:
        ArchitectureError: transformers' own code for the model type fails at it, as that of
            RecurrentGemma and xLSTM does.
    """
    try:
        result: Tensor = model.generate(ids, **options)
    except (LlmquantError, UnicodeError):  # a streamer's, where the screen cannot show a text
        raise
    except (AttributeError, LookupError, NotImplementedError, TypeError, ValueError) as e:
        raise ArchitectureError(
            f"transformers cannot generate with a model of type {model.config.model_type!r}: {first_line(e)}"
        ) from e
    return result


def _ids(has_eos: Any) -> frozenset[int]:
    value = getattr(has_eos, "eos_token_id", None)
    return frozenset([value] if isinstance(value, int) else value or ())
