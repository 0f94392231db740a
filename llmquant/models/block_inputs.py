"""How a model calls its decoder blocks, observed rather than assumed, and one block run by itself.

``first_inputs`` runs the embedding part of a model whose blocks may still be on the meta device:
every block is replaced by a catcher that notes how it was called and hands the hidden states on
untouched; the last one stops the forward pass. From then on each block is called with exactly what
transformers would have given *it* (position embeddings, mask, cache position: models that mix full
and sliding-window attention give different blocks different masks), so no per-model code is needed
here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmquant.errors import ArchitectureError
from llmquant.runtime.memory import out_of_memory

Call = tuple[tuple[Any, ...], dict[str, Any]]


class _LastBlockReached(Exception):  # noqa: N818 - control flow, never an error that anyone sees
    """Raised by a catcher to end the forward pass at the last block."""


@dataclass(frozen=True, slots=True)
class BlockInput:
    """One batch's way into a block and through the blocks behind it.

    Attributes:
        hidden: hidden states ``[batch, positions, hidden]`` that the block reads.
        calls: for this block and every later one, the positional arguments behind the hidden states
            and the keyword arguments. Blocks that get the same mask share the tensor.
    """

    hidden: Tensor
    calls: tuple[Call, ...]

    def after(self, hidden: Tensor) -> BlockInput:
        """The way into the next block, given this one's output."""
        return BlockInput(hidden, self.calls[1:])


class _Catcher(nn.Module):
    """Stands in for a block: notes its call."""

    def __init__(self, block: nn.Module, note: Callable[[Tensor, Call], Any]) -> None:
        super().__init__()
        self._note = note
        # Models read attributes such as attention_type off the block before calling it.
        self.__dict__["_block"] = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self._note(args[0], (args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return self._note(hidden, ((), kwargs))


def first_inputs(
    model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor], *, walk: bool = True
) -> list[BlockInput]:
    """What the first block is called with for each batch of token ids ``[batch, positions]``, and
    the later ones beside it.

    Args:
        model: whose blocks may be on the meta device.
        blocks: its decoder blocks.
        batches: of token ids.
        walk: whether they will run one after the other, each on what the one before gave.

    Raises:
        ArchitectureError: the model finished without calling each block once, changes the hidden
            states between two of them, or lets later ones read what earlier ones computed, which a
            walk from block to block would miss.
    """
    if walk:
        refuse_walk(model)
    return [_inputs_of(model, blocks, ids, walk=walk) for ids in batches]


def refuse_walk(
    model: nn.Module, otherwise: str = "use --method rtn, without --calibration"
) -> None:
    """Refuse a model whose blocks do not follow from one another alone.

    Args:
        model: of transformers' class.
        otherwise: what can be done.

    Raises:
        ArchitectureError: later blocks read what earlier ones computed.
    """
    if why := why_not_walked(model):
        raise ArchitectureError(f"{why}; {otherwise}")


def why_not_walked(model: nn.Module) -> str | None:
    """Why a model of transformers' class cannot be calibrated, as far as its config tells."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if not getattr(text, "num_kv_shared_layers", None):
        return None
    return (
        f"later blocks of this {type(model).__name__} read keys and values of earlier ones (num_kv_shared_layers), so it cannot "
        "be calibrated block by block"
    )


def _inputs_of(model: nn.Module, blocks: nn.ModuleList, ids: Tensor, *, walk: bool) -> BlockInput:
    # A block returns its hidden states, or (older models) a tuple that begins with them: the model
    # picks item 0 of what it gets, so handing on the wrong one shows at the next block, or fails.
    failed: Exception | None = None
    changed = False
    for hand_on in (lambda hidden: hidden, lambda hidden: (hidden,), lambda hidden: (hidden, None)):
        try:
            caught = _catch(model, blocks, ids, hand_on)
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
            if out_of_memory(e):
                raise
            failed = e
            continue
        first = caught[0][0]
        # A block may have been called with what was handed on, tuple and all.
        alike = all(getattr(hidden, "shape", None) == first.shape for hidden, _ in caught)
        if all(hidden is first for hidden, _ in caught) or (not walk and alike):
            return BlockInput(first, tuple(call for _, call in caught))
        failed, changed = None, changed or alike
    if failed is not None and not changed:
        raise ArchitectureError(
            f"{type(model).__name__} cannot be run block by block ({failed}); quantize a model of another type"
        ) from failed
    raise ArchitectureError(
        f"{type(model).__name__} changes the hidden states between its decoder blocks, so it cannot be calibrated block by "
        "block; use --method rtn, without --calibration"
    )


def _catch(
    model: nn.Module, blocks: nn.ModuleList, ids: Tensor, hand_on: Callable[[Tensor], Any]
) -> list[tuple[Tensor, Call]]:
    """Hidden states and call of every block in one pass of the embedding part."""
    originals = list(blocks)
    caught: list[tuple[Tensor, Call]] = []

    def note(hidden: Tensor, call: Call) -> Any:
        caught.append((hidden, call))
        if len(caught) == len(originals):
            raise _LastBlockReached
        return hand_on(hidden)

    try:
        for i, block in enumerate(originals):
            blocks[i] = _Catcher(block, note)
        with torch.no_grad(), suppress(_LastBlockReached):
            model(input_ids=ids, use_cache=False)
    finally:
        for i, block in enumerate(originals):
            blocks[i] = block
    if len(caught) < len(originals):
        raise ArchitectureError(
            f"{type(model).__name__} called {len(caught)} of its {len(originals)} decoder blocks in one pass"
        )
    return caught


def run_block(block: nn.Module, inputs: BlockInput) -> Tensor:
    """The block's hidden-state output for one batch."""
    with torch.no_grad():
        return run_with(block, {}, inputs)


def run_with(block: nn.Module, parameters: Mapping[str, Tensor], inputs: BlockInput) -> Tensor:
    """The block's output with some parameters, named from the block, replaced; gradients flow to
    them."""
    args, kwargs = inputs.calls[0]
    out = functional_call(block, dict(parameters), (inputs.hidden, *args), kwargs)
    result: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return result
