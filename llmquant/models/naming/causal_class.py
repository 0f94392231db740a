"""A causal class for the text part of a model that also sees or hears, where transformers has none:
its own class of that part under a head, as the whole model's class puts one over it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from llmquant.checkpoint.companions.confusion import CONFUSED

_PLACES = ("model.layers.0.x", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_HEAD = r"self\.lm_head\(.+\)"
_STEP = re.compile(r"logits (?P<how>[*/]) self\.(?:config\.text_config\.)?(?P<key>\w+)")
_TANH = "torch.tanh(logits)"
_reading: dict[tuple[type[PreTrainedModel], str], type[PreTrainedModel]] = {}
_found: dict[tuple[type[PreTrainedConfig], str], type[PreTrainedModel] | None] = {}


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """A causal language model of the text part's config; None where transformers does not have the
    whole model, cannot build it here, or does more to its logits than is done here.

    Args:
        config: of the model that has the text model as a part.
    """
    kind = (type(config), config.get_text_config().model_type)
    if kind not in _found:
        _found[kind] = _made(config)
    found: Any = _found[kind]
    text = config.get_text_config()
    # A step whose number is None is one that the whole leaves out.
    unclear = found is not None and any(getattr(text, k, 1) is None for _, k in found.steps)
    return None if unclear else found


def _made(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    whole: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    if whole is None:
        return None
    code = inspect.getsource(whole.forward)
    first, *more = re.findall(r"^ +logits = (.+)$", code, re.MULTILINE) or [""]
    steps = tuple(step for line in more if (step := _step(line)) is not None)
    if not re.fullmatch(_HEAD, first) or len(steps) < len(more):
        return None
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = whole._from_config(config)
    except CONFUSED:  # a package for the eye that is not installed
        return None
    part = _text_part(model, config.get_text_config())
    head = model.get_output_embeddings()
    if part is None or not isinstance(head, nn.Linear):
        return None
    text = config.get_text_config()
    if any(getattr(model, key, None) != getattr(text, key, None) for key in _own(steps, code)):
        return None
    return _class_over(part, config, head.bias is not None, steps)


def _step(line: str) -> tuple[str, str] | None:
    """What a line does to the logits: ``*`` or ``/`` and the number's name, or ``tanh``."""
    if line == _TANH:
        return ("tanh", "")
    found = _STEP.fullmatch(line)
    return (found["how"], found["key"]) if found else None


def _own(steps: Iterable[tuple[str, str]], code: str) -> list[str]:
    """Numbers that the whole model keeps itself; its text config must have them too."""
    return [key for _, key in steps if key and re.search(rf"self\.{key}\b", code)]


def _text_part(model: PreTrainedModel, text: PreTrainedConfig) -> PreTrainedModel | None:
    """The module of the whole model that gives hidden states of text."""
    parts = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model)
    own = (m for m in parts if m.config.model_type == text.model_type)
    return next((m for m in own if any(isinstance(c, nn.ModuleList) for c in m.children())), None)


def _class_over(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    biased: bool,
    steps: tuple[tuple[str, str], ...],
) -> type[PreTrainedModel]:
    part = type(model)
    name = f"{part.__name__}ForCausalLM"
    own = model.get_input_embeddings()
    embeddings = next(n for n, m in model.named_modules() if m is own)
    kind: Any = type(
        name,
        (_Headed, part.__bases__[0], GenerationMixin),
        {
            "config_class": type(config.get_text_config()),
            "base_model_prefix": "model",
            "_tied_weights_keys": {"lm_head.weight": f"model.{embeddings}.weight"},
            "__module__": part.__module__,
            "part": part,
            "biased": biased,
            "steps": steps,
        },
    )
    result: type[PreTrainedModel] = kind
    return result


def reading_as(
    kind: type[PreTrainedModel], config: PreTrainedConfig, names: Iterable[str]
) -> type[PreTrainedModel]:
    """The class with transformers' conversions of what is inside the text part, where these are
    written for the whole model's type alone; else the class itself.

    Args:
        kind: a causal language model.
        config: of the model that has the text model as a part.
        names: a checkpoint's tensors as the text model calls them. Conversions that none of them
            calls for are left out, since turned round they may be about any name.
    """
    if get_checkpoint_conversion_mapping(config.get_text_config().model_type) is not None:
        return kind
    inside = _called_for(get_checkpoint_conversion_mapping(config.model_type) or [], names)
    if not inside:
        return kind
    patterns = repr([(type(c).__name__, c.source_patterns, c.target_patterns) for c in inside])
    known = (kind, patterns)
    if known not in _reading:
        # transformers looks conversions up by the class's name.
        name = f"{kind.__name__}In{type(config).__name__.removesuffix('Config')}{len(_reading)}"
        register_checkpoint_conversion_mapping(name, inside)
        _reading[known] = type(name, (kind,), {"__module__": kind.__module__})
    return _reading[known]


def _called_for(conversions: Iterable[Any], names: Iterable[str]) -> list[Any]:
    """Those that tensors of these names are renamed or put together by, but not what tells where
    the text part is in the whole."""
    alike = {re.sub(r"\.\d+(?=\.)", ".0", name) for name in names}
    # A packed module's tensors have names that no conversion knows.
    current = alike | {f"{name.rpartition('.')[0]}.weight" for name in alike}
    found = []
    for conversion in conversions:
        renamed = {n: conversion.rename_source_key(n) for n in (*_PLACES, *current)}
        if any(renamed[n][1] for n in _PLACES) or not any(renamed[n][1] for n in current):
            continue
        found.append(conversion)
        if not isinstance(conversion, WeightConverter):
            current = {renamed[n][0] for n in current}
    return found


class _Headed:
    """What such a class does; it comes before transformers' class of models.

    Attributes:
        part: the text part's class.
        biased: the head has a bias.
        steps: what is done to its output, one after the other: ``*`` or ``/`` and a key of the
            config, or ``tanh``.
    """

    part: type[PreTrainedModel]
    biased: bool
    steps: tuple[tuple[str, str], ...]

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        self.model: Any = self.part(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=self.biased)
        self.config = config
        self.post_init()  # type: ignore[attr-defined]

    def forward(
        self,
        input_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **inputs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``[batch, tokens, vocabulary]``, of the last ``logits_to_keep`` tokens or of those
        at these places, and the text model's states."""
        found = self.model(input_ids=input_ids, **inputs)
        last = isinstance(logits_to_keep, int)
        kept: Any = slice(-logits_to_keep, None) if last else logits_to_keep
        logits = self.lm_head(found.last_hidden_state[:, kept])
        for how, key in self.steps:
            if how == "tanh":
                logits = logits.tanh()
            else:
                number = getattr(self.config, key)
                logits = logits * number if how == "*" else logits / number
        return CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)
