"""The model that also sees or hears, as transformers has it: what of it is not its text part, and
what it does to the logits of that.
"""

from __future__ import annotations

import inspect
from typing import Any

from accelerate import init_empty_weights
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from llmquant.checkpoint.companions.confusion import CONFUSED

# What causal classes may do to their logits, by the config's key, and the value at which they do
# nothing.
_LOGITS: dict[str, float | None] = {
    "final_logit_softcapping": None,
    "lm_head_multiplier": 1.0,
    "logit_scale": 1.0,
    "logits_scaling": 1.0,
}


def own_logits(config: PreTrainedConfig, text: PreTrainedConfig) -> dict[str, float | None]:
    """Values with which the text part's causal class gives the logits of the whole model, for keys
    that the whole model's class does not look at.

    Args:
        config: of the whole model.
        text: of its text part.
    """
    kind = _class_of(config)
    if kind is None:
        return {}
    code = inspect.getsource(kind.forward)
    return {k: v for k, v in _LOGITS.items() if hasattr(text, k) and k not in code}


def linears_beside(config: PreTrainedConfig) -> tuple[str, ...]:
    """transformers' names of the linears outside the text part; none where its class is not known
    or cannot be built here."""
    kind = _class_of(config)
    if kind is None:
        return ()
    try:
        with init_empty_weights(include_buffers=False):
            whole: PreTrainedModel = kind._from_config(config)
    except CONFUSED:  # a package for the eye that is not installed
        return ()
    own = config.get_text_config().model_type
    parts = tuple(
        f"{name}."
        for name, module in whole.named_modules()
        if name and isinstance(module, PreTrainedModel) and module.config.model_type == own
    )
    head = whole.get_output_embeddings()
    found = {n: m for n, m in whole.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return tuple(n for n in found if not n.startswith(parts)) if parts else ()


def _class_of(config: PreTrainedConfig) -> Any:
    """transformers' class of the whole model, None where it has none."""
    return MODEL_FOR_MULTIMODAL_LM_MAPPING.get(type(config), None)
