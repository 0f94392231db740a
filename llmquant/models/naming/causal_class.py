"""A causal class for the text part of a model that also sees or hears, where transformers has none:
its own class of that part under a head, as the whole model's class puts one over it.
"""

from __future__ import annotations

import inspect
import re
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

_HEAD = r"self\.lm_head\(.+\)"
_SCALED = r"logits / self\.config\.text_config\.logits_scaling"
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
    return _found[kind]


def _made(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    whole: Any = MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
    if whole is None:
        return None
    code = inspect.getsource(whole.forward)
    first, *more = re.findall(r"^ +logits = (.+)$", code, re.MULTILINE) or [""]
    scaled = len(more) == 1 and re.fullmatch(_SCALED, more[0])
    if not re.fullmatch(_HEAD, first) or (more and not scaled):
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
    return _class_over(part, config, head.bias is not None, bool(scaled))


def _text_part(model: PreTrainedModel, text: PreTrainedConfig) -> PreTrainedModel | None:
    """The module of the whole model that gives hidden states of text."""
    parts = (m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model)
    own = (m for m in parts if m.config.model_type == text.model_type)
    return next((m for m in own if any(isinstance(c, nn.ModuleList) for c in m.children())), None)


def _class_over(
    model: PreTrainedModel, config: PreTrainedConfig, biased: bool, scaled: bool
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
            "scaled": scaled,
        },
    )
    # How experts are stored is written for the whole model's type.
    stored = get_checkpoint_conversion_mapping(config.model_type) or []
    experts: list[Any] = [c for c in stored if isinstance(c, WeightConverter)]
    if experts and get_checkpoint_conversion_mapping(config.get_text_config().model_type) is None:
        register_checkpoint_conversion_mapping(name, experts, overwrite=True)
    result: type[PreTrainedModel] = kind
    return result


class _Headed:
    """What such a class does; it comes before transformers' class of models.

    Attributes:
        part: the text part's class.
        biased: the head has a bias.
        scaled: its output is divided by the config's ``logits_scaling``.
    """

    part: type[PreTrainedModel]
    biased: bool
    scaled: bool

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
        if self.scaled:
            logits = logits / self.config.logits_scaling
        return CausalLMOutputWithPast(logits=logits, past_key_values=found.past_key_values)
