"""Block inputs and linear inputs, observed rather than assumed.

``first_inputs`` runs the embedding part of a model whose blocks are still on the meta device: the first block is replaced by
a catcher that keeps its arguments and stops the forward pass. From then on a block is called with exactly what
transformers would have given it (position embeddings, mask, cache position), so no per-model code is needed here.

``stages`` runs one batch through a block and notes which linears were called with the very same tensor, in calling order:
those share one Hessian. ``observe`` then accumulates :class:`InputStats` for one linear of each such set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import ArchitectureError
from llmquant.stats import InputStats


class _BlockReached(Exception):  # noqa: N818 - control flow, never an error that anyone sees
    """Raised by the catcher to end the forward pass at the first block."""


class _EnoughSeen(Exception):  # noqa: N818 - control flow, as above
    """Raised by a hook to end a block's pass once every wanted input was seen."""


@dataclass(slots=True)
class BlockInput:
    """One batch's way into a block: hidden states ``[batch, positions, hidden]`` and everything else it is called with."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Catcher(nn.Module):
    def __init__(self, block: nn.Module, caught: list[BlockInput]) -> None:
        super().__init__()
        self._caught = caught
        # Models read attributes such as attention_type off the block before calling it.
        self.__dict__["_block"] = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            self.__dict__["_caught"].append(BlockInput(args[0], args[1:], kwargs))
        else:
            hidden = kwargs.pop("hidden_states")
            self.__dict__["_caught"].append(BlockInput(hidden, (), kwargs))
        raise _BlockReached


def first_inputs(model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor]) -> list[BlockInput]:
    """What the first block is called with for each batch of token ids ``[batch, positions]``.

    Raises:
        ArchitectureError: the model finished without calling its first block.
    """
    caught: list[BlockInput] = []
    first = blocks[0]
    blocks[0] = _Catcher(first, caught)
    try:
        with torch.no_grad():
            for ids in batches:
                try:
                    model(input_ids=ids, use_cache=False)
                except _BlockReached:
                    continue
                raise ArchitectureError(f"{type(model).__name__} never called its first decoder block")
    finally:
        blocks[0] = first
    return caught


def run_block(block: nn.Module, inputs: BlockInput) -> Tensor:
    """The block's hidden-state output for one batch."""
    with torch.no_grad():
        out = block(inputs.hidden, *inputs.args, **inputs.kwargs)
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@contextmanager
def _input_hooks(linears: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: see(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stages(block: nn.Module, linears: Mapping[str, nn.Module], inputs: BlockInput) -> list[tuple[str, ...]]:
    """Sets of linears that read the same tensor, in execution order.

    Raises:
        ArchitectureError: a linear was not called, or called more than once, in one forward pass.
    """
    calls: list[tuple[str, Tensor]] = []
    with _input_hooks(linears, lambda name, x: calls.append((name, x))):
        run_block(block, inputs)
    names = [name for name, _ in calls]
    for name in linears:
        if names.count(name) != 1:
            raise ArchitectureError(
                f"{name} was called {names.count(name)} times in one pass through its block, so its inputs cannot be "
                f"calibrated; --ignore it or use --method rtn"
            )
    found: list[tuple[Tensor, list[str]]] = []
    for name, x in calls:
        same = next((members for seen, members in found if seen is x), None)
        if same is None:
            found.append((x, [name]))
        else:
            same.append(name)
    return [tuple(members) for _, members in found]


def observe(
    block: nn.Module, wanted: Mapping[str, nn.Linear], batches: Sequence[BlockInput]
) -> dict[str, InputStats]:
    """Input statistics of each wanted linear over all batches. A pass ends once the last wanted linear is reached."""
    stats = {name: InputStats(m.in_features, device=m.weight.device) for name, m in wanted.items()}
    waiting: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        stats[name].add(x)
        waiting.discard(name)
        if not waiting:
            raise _EnoughSeen

    with _input_hooks(wanted, see):
        for batch in batches:
            waiting.update(wanted)
            with suppress(_EnoughSeen):
                run_block(block, batch)
    return stats
