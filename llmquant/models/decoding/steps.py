"""A model's decoder blocks stepped in compiled code: each block's ``forward``, and the run of all
of them as one call.

:class:`BlockForward` stands in a block for its ``forward``. Where a model's blocks follow one
another with nothing between them and all get the same arguments, the first one's call does the work
of all (:class:`Run`), and the others hand on what it left: in a small model what Python does for
each block costs as much as the block. The new keys and values are written in place, behind those
that the cache holds; a cache layer that is not one of transformers' plain growing ones can say
where that is by a method ``in_place() -> (keys, values, held)``.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import DynamicLayer

from llmquant.errors import LlmquantError
from llmquant.kernels.block import Step
from llmquant.kernels.block_steps import Steps
from llmquant.kernels.cpu import eager, rows_for_torch

_SPARE = "llmquant_spare"  # attribute of a cache layer
# Tokens; or a quarter of what is held, if that is more: a token is moved a constant number of
# times.
_LEAST_SPARE = 256


class BlockForward:
    """A block's ``forward``: the compiled step for one token of one sequence, the compiled block
    for many rows, the plain one for everything else.

    Args:
        plain: the block's own ``forward``, a bound method.
        index: of the block's layer in a cache.
        many: whether many rows may be computed in compiled code.
    """

    def __init__(self, step: Step, plain: Any, index: int, many: bool = True) -> None:
        self.step, self.plain, self.index, self.many = step, plain, index, many
        self.run: Run | None = None

    def __call__(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Any:
        if self.run is not None:
            done = self.run.handed_on(self, hidden_states)
            if done is not None:
                return done
        if (
            position_embeddings is None
            or not eager(hidden_states)
            or torch.is_grad_enabled()
            or kwargs.get("output_attentions")
            or kwargs.get("output_hidden_states")
            or not self._takes(hidden_states, attention_mask, past_key_values, position_embeddings)
        ):
            return self.plain(
                hidden_states,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache,
                position_embeddings=position_embeddings,
                **kwargs,
            )
        if (
            attention_mask is not None
            or past_key_values is None
            or hidden_states.shape[:2] != (1, 1)
        ):
            return self._many(hidden_states, attention_mask, past_key_values, position_embeddings)
        if self.run is not None and self.run.starts_with(self):
            done = self.run.begin(hidden_states, position_embeddings, past_key_values)
            if done is not None:
                return done
        query, key, value = self.step.before(hidden_states, *position_embeddings)
        keys, values = past_key_values.update(key, value, self.index)
        return self.step.after(hidden_states, query, keys, values)

    def _takes(
        self, hidden: Tensor, mask: Tensor | None, cache: Any, position: tuple[Tensor, Tensor]
    ) -> bool:
        """Whether compiled code computes what is asked for, of one row or of many."""
        if mask is None and cache is not None and hidden.shape[:2] == (1, 1):
            return self.step.takes(hidden, *position)
        return (
            self.many
            and hidden.dim() == 3
            and self.plain.__self__.self_attn.config._attn_implementation == "sdpa"
            and hidden.shape[0] * hidden.shape[1] < rows_for_torch(hidden.dtype)
            and self.step.takes_many(hidden, *position, mask)
            # Without a mask, each token sees those before it in this call: there may be no others.
            and (mask is not None or hidden.shape[1] == 1 or not _held(cache, self.index))
            and not _hooked(self.plain)
        )

    def _many(
        self, hidden: Tensor, mask: Tensor | None, cache: Any, position: tuple[Tensor, Tensor]
    ) -> Tensor:
        query, keys, values = self.step.before_many(hidden, *position)
        if cache is not None:
            keys, values = cache.update(keys, values, self.index)
        if mask is None and hidden.shape[1] > 1:  # a cache of fixed length gives what is empty too
            keys, values = (t[:, :, : hidden.shape[1]] for t in (keys, values))
        return self.step.after_many(hidden, query, keys, values, mask)


def _held(cache: Any, index: int) -> bool:
    """Whether a cache has tokens of this block already."""
    return cache is not None and bool(cache.get_seq_length(index) != 0)


def _hooked(forward: Any) -> bool:
    """Whether somebody looks into the block that this ``forward`` is a method of."""
    return any(
        m._forward_hooks or m._forward_pre_hooks
        for m in forward.__self__.modules()
        if m is not forward.__self__
    )


@dataclass(slots=True)
class Spare:
    """Buffers ``[1, kv_heads, capacity, head_dim]`` of which a cache layer's keys and values are
    the first ``held`` tokens."""

    keys: Tensor
    values: Tensor
    held: int


class Run:
    """All blocks of a model, stepped by the first one's call.

    Args:
        config: of the decoder; says how many of its blocks a pass runs.
        layers: the blocks, each with a :class:`BlockForward` of its own, which learns of this run.
    """

    def __init__(self, config: PretrainedConfig, layers: Sequence[nn.Module]) -> None:
        self._config, self._layers = config, layers
        self._forwards: list[BlockForward] = [layer.__dict__["forward"] for layer in layers]
        self._steps = Steps([f.step for f in self._forwards])
        self._of = threading.local()
        for forward in self._forwards:
            forward.run = self

    def __deepcopy__(self, memo: dict[int, object]) -> Run:
        made = Run.__new__(Run)
        memo[id(self)] = made
        made.__dict__.update(
            {n: copy.deepcopy(v, memo) for n, v in self.__dict__.items() if n != "_of"}
        )
        made._of = threading.local()
        return made

    def starts_with(self, forward: BlockForward) -> bool:
        """Whether it is the first block's."""
        return forward is self._forwards[0]

    def is_of(self, layers: Sequence[nn.Module]) -> bool:
        """Whether these are its blocks and nobody has put another ``forward`` into one."""
        return len(layers) == len(self._layers) and all(
            layer.__dict__.get("forward") is ours
            for layer, ours in zip(layers, self._forwards, strict=True)
        )

    def begin(self, hidden: Tensor, position: tuple[Tensor, Tensor], cache: Any) -> Tensor | None:
        """Step all blocks, and let the later ones know: the last one's output; None: each must run
        by itself."""
        out = self.step(hidden, position, cache)
        if out is not None:
            self._of.done = out
        return out

    def step(self, hidden: Tensor, position: tuple[Tensor, Tensor], cache: Any) -> Tensor | None:
        """Step all blocks: the last one's output; None: each must run by itself."""
        if self._watched() or not self._steps.takes(hidden, *position):
            return None
        caches = self._caches(hidden, cache)
        if caches is None:
            return None
        out = self._steps.run(hidden, *position, caches)
        for layer in cache.layers:
            _held_one_more(layer)
        return out

    def handed_on(self, forward: BlockForward, hidden: Tensor) -> Tensor | None:
        """What a later block gives after :meth:`begin`: the very tensor that it got. None: nothing
        was begun.

        Raises:
            LlmquantError: it got another one.
        """
        done: Tensor | None = getattr(self._of, "done", None)
        if done is None:
            return None
        if self.starts_with(forward):  # an earlier pass was broken off
            self._of.done = None
            return None
        if hidden is not done:
            raise LlmquantError(
                f"something changed the hidden states in front of block {forward.index}, but all blocks were already stepped"
            )
        if forward is self._forwards[-1]:
            self._of.done = None
        return done

    def _watched(self) -> bool:
        """Whether somebody looks at single blocks, or only some of them are run."""
        hooked = any(layer._forward_hooks or layer._forward_pre_hooks for layer in self._layers)
        return hooked or self._config.num_hidden_layers != len(self._layers)

    def _caches(self, hidden: Tensor, cache: Any) -> list[tuple[Tensor, Tensor, int]] | None:
        """Where every block's keys and values are; None where one has no place for another token of
        this kind."""
        layers = getattr(cache, "layers", ())
        if len(layers) != len(self._layers) or [f.index for f in self._forwards] != list(
            range(len(layers))
        ):
            return None
        places = []
        for layer in layers:
            place = _place(layer, hidden)
            if place is None:
                return None
            places.append(place)
        return places


def _place(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor, int] | None:
    if type(layer) is not DynamicLayer:
        find = getattr(layer, "in_place", None)
        place: tuple[Tensor, Tensor, int] | None = find() if find is not None else None
        fits = (
            place is not None
            and place[0].dtype is hidden.dtype
            and place[0].stride(3) == place[1].stride(3) == 1
        )
        return place if fits else None
    keys, values = layer.keys, layer.values
    if (
        not layer.is_initialized
        or keys is None
        or values is None
        or keys.dim() != 4
        or keys.shape[0] != 1
    ):
        return None
    if keys.dtype is not hidden.dtype or values.dtype is not hidden.dtype or not keys.is_cpu:
        return None
    spare: Spare | None = layer.__dict__.get(_SPARE)
    held = keys.shape[2]
    # What was cropped, copied or reordered since is not the buffer's any more: others may hold what
    # stands behind it.
    ours = (
        spare is not None
        and spare.held == held < spare.keys.shape[2]
        and spare.keys.data_ptr() == keys.data_ptr()
        and spare.values.data_ptr() == values.data_ptr()
    )
    if not ours:
        capacity = held + max(_LEAST_SPARE, held // 4)
        spare = Spare(_roomy(keys, capacity), _roomy(values, capacity), held)
        layer.__dict__[_SPARE] = spare
    assert spare is not None
    return spare.keys, spare.values, held


def _roomy(tensor: Tensor, capacity: int) -> Tensor:
    """A copy ``[1, heads, capacity, dim]`` with unset numbers at the end."""
    made = tensor.new_empty((*tensor.shape[:2], capacity, tensor.shape[3]))
    made[:, :, : tensor.shape[2]] = tensor
    return made


def _held_one_more(layer: Any) -> None:
    """The token that was written behind what a plain layer holds belongs to it."""
    if type(layer) is DynamicLayer:
        spare: Spare = layer.__dict__[_SPARE]
        spare.held += 1
        layer.keys, layer.values = (
            spare.keys.narrow(2, 0, spare.held),
            spare.values.narrow(2, 0, spare.held),
        )
