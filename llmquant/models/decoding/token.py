"""One token of one sequence, from its number to its logits, without transformers' code in between.

What a model's own ``forward`` does around its blocks costs a small model a fifth of a token's time:
wrappers that look for hooks and settings, a mask that comes out as None, angles computed anew, a
module call for each block. :class:`TokenForward` stands in for ``forward`` and does what is left:
embedding, blocks (:class:`~llmquant.models.decoding.steps.Run`), norm, head. Everything else, and
everything that it does not know, goes to the model's own code. It is tried before it is trusted: it
must give the very same logits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

from llmquant.kernels.cpu import eager
from llmquant.models.decoding.steps import Run

# Arguments that say nothing about one token behind a cache but what is looked at here. Others must
# be None or False.
_KNOWN = {
    "input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep",
    "return_dict",
}  # fmt: skip
# Kinds of rotary embedding whose angles depend on the position alone.
_FIXED = {"default", "linear", "llama3", "yarn"}
_FIRST_ANGLES = 256  # positions


class Angles:
    """Cosines and sines by position, as a model's rotary embedding computes them.

    Args:
        rotary: the module; called with hidden states, for their dtype, and positions ``[1, n]``.
    """

    def __init__(self, rotary: nn.Module) -> None:
        self._rotary = rotary
        self._made_from: tuple[object, torch.dtype] | None = None
        self._kept: tuple[Tensor, Tensor] | None = None

    def at(self, position: int, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Of one position: two tensors ``[1, 1, head_dim]`` of the dtype of ``hidden``."""
        made_from = getattr(self._rotary, "inv_freq", None), hidden.dtype
        if self._made_from is None or any(
            a is not b for a, b in zip(made_from, self._made_from, strict=True)
        ):
            self._made_from, self._kept = made_from, None
        if self._kept is None or position >= self._kept[0].shape[1]:
            count = _FIRST_ANGLES
            while count <= position:
                count *= 2
            self._kept = self._rotary(hidden, position_ids=torch.arange(count)[None])
        cos, sin = self._kept
        return cos[:, position : position + 1], sin[:, position : position + 1]


class TokenForward:
    """A model's ``forward``: its own for everything but one more token of one sequence.

    Args:
        plain: the model's own ``forward``, a bound method.
        run: of its blocks.

    Raises:
        AttributeError: the model has no rotary embedding of this name.
    """

    def __init__(self, plain: Any, run: Run) -> None:
        self.plain, self.run = plain, run
        self.__signature__ = inspect.signature(plain)  # `generate` asks which arguments there are
        self._base: Any = plain.__self__.base_model
        self._angles = Angles(self._base.rotary_emb)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        logits = None if len(args) > 1 else self._logits(args[0] if args else None, kwargs)
        if logits is None:
            return self.plain(*args, **kwargs)
        return CausalLMOutputWithPast(logits=logits, past_key_values=kwargs["past_key_values"])

    def _logits(self, ids: Any, given: dict[str, Any]) -> Tensor | None:
        """``[1, 1, vocabulary]``, or None where this is not a token that can be done here."""
        ids, cache = given.get("input_ids") if ids is None else ids, given.get("past_key_values")
        if (
            not isinstance(ids, Tensor)
            or ids.shape != (1, 1)
            or cache is None
            or not eager(ids)
            or torch.is_grad_enabled()
            or self._asked_for_more(given)
        ):
            return None
        held = cache.get_seq_length()
        if not held or not _sees_all(given.get("attention_mask"), held + 1):
            return None
        positions = given.get("position_ids")
        if positions is not None and positions.shape != (1, 1):
            return None
        model = self.plain.__self__
        hidden = model.get_input_embeddings()(ids)
        position = self._angles.at(held if positions is None else int(positions), hidden)
        hidden = self.run.step(hidden, position, cache)
        return None if hidden is None else model.get_output_embeddings()(self._base.norm(hidden))

    def _asked_for_more(self, given: dict[str, Any]) -> bool:
        """Whether anything but logits and the cache is wanted, or somebody looks at the decoder."""
        config, base = self.plain.__self__.config, self._base
        return (
            given.get("use_cache") is False
            or given.get("return_dict") is False
            or type(given.get("logits_to_keep", 0)) is not int
            or any(v is not None and v is not False for n, v in given.items() if n not in _KNOWN)
            or bool(base._forward_hooks or base._forward_pre_hooks)
            or not self.run.is_of(base.layers)
            or config.output_hidden_states
            or config.output_attentions
            or not config.return_dict
        )


def _sees_all(mask: Any, tokens: int) -> bool:
    """Whether a mask hides none of so many tokens."""
    return mask is None or (mask.shape == (1, tokens) and bool(mask.all()))


def install(model: PreTrainedModel, run: Run) -> str | None:
    """Let ``model`` do single tokens this way, or say why not."""
    if model.get_output_embeddings() is None:
        return "it has no output head"
    try:
        fast = TokenForward(model.forward, run)
        if not run.is_of(fast._base.layers):
            return "its blocks are not the decoder's only ones"
    except AttributeError as e:
        return f"it is not built as expected ({e})"
    kind = getattr(fast._base.rotary_emb, "rope_type", None)
    if kind not in _FIXED:
        return f"its angles may depend on more than the position ({kind})"
    if not torch.equal(*(_trial(model, forward) for forward in (fast.plain, fast))):
        return "a trial gave other numbers"
    model.forward = fast
    return None


@torch.inference_mode()
def _trial(model: PreTrainedModel, forward: Any) -> Tensor:
    """The logits of two tokens behind a prompt."""
    cache = DynamicCache(config=model.config)
    model(torch.arange(3)[None], past_key_values=cache, use_cache=True)
    tokens = torch.arange(1, 3).view(2, 1, 1)
    outputs = [forward(input_ids=t, past_key_values=cache, use_cache=True) for t in tokens]
    return torch.cat([o.logits for o in outputs])
