"""Block inputs and linear inputs, observed rather than assumed.

``first_inputs`` runs the embedding part of a model whose blocks are still on the meta device: every block is replaced by a
catcher that notes how it was called and hands the hidden states on untouched; the last one stops the forward pass. From
then on each block is called with exactly what transformers would have given *it* (position embeddings, mask, cache position:
models that mix full and sliding-window attention give different blocks different masks), so no per-model code is needed here.

``stages`` runs one batch through a block and notes which linears were called with the very same tensor, in calling order:
those share one Hessian. ``observe`` then accumulates :class:`InputStats` for one linear of each such set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmquant.errors import ArchitectureError
from llmquant.experts import Watch, watched
from llmquant.stats import InputStats, PairStats

Call = tuple[tuple[Any, ...], dict[str, Any]]
Around = Callable[[int], AbstractContextManager[None]]
"""What is entered around the passes of a batch, by its number; see :class:`llmquant.replay.Replay`."""


def nothing(_number: int) -> AbstractContextManager[None]:
    """Passes as they are."""
    return nullcontext()


class _LastBlockReached(Exception):  # noqa: N818 - control flow, never an error that anyone sees
    """Raised by a catcher to end the forward pass at the last block."""


class _EnoughSeen(Exception):  # noqa: N818 - control flow, as above
    """Raised by a hook to end a block's pass once every wanted input was seen."""


@dataclass(frozen=True, slots=True)
class BlockInput:
    """One batch's way into a block and through the blocks behind it.

    Attributes:
        hidden: hidden states ``[batch, positions, hidden]`` that the block reads.
        calls: for this block and every later one, the positional arguments behind the hidden states and the keyword
            arguments. Blocks that get the same mask share the tensor.
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


def first_inputs(model: nn.Module, blocks: nn.ModuleList, batches: Sequence[Tensor]) -> list[BlockInput]:
    """What the first block is called with for each batch of token ids ``[batch, positions]``, and the later ones beside it.

    Raises:
        ArchitectureError: the model finished without calling each block once, or changes the hidden states between two of
            them, which a walk from block to block would miss.
    """
    return [_inputs_of(model, blocks, ids) for ids in batches]


def _inputs_of(model: nn.Module, blocks: nn.ModuleList, ids: Tensor) -> BlockInput:
    # A block returns its hidden states, or (older models) a tuple that begins with them: the model picks item 0 of what it
    # gets, so handing on the wrong one shows at the next block.
    for hand_on in (lambda hidden: hidden, lambda hidden: (hidden,)):
        caught = _catch(model, blocks, ids, hand_on)
        if all(hidden is caught[0][0] for hidden, _ in caught):
            return BlockInput(caught[0][0], tuple(call for _, call in caught))
    raise ArchitectureError(
        f"{type(model).__name__} changes the hidden states between its decoder blocks, so it cannot be calibrated block by "
        "block; use --method rtn"
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
    """The block's output with some parameters, named from the block, replaced; gradients flow to them."""
    args, kwargs = inputs.calls[0]
    out = functional_call(block, dict(parameters), (inputs.hidden, *args), kwargs)
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


def stages(
    block: nn.Module, linears: Mapping[str, nn.Module], inputs: BlockInput, all_experts: bool = False
) -> list[tuple[str, ...]]:
    """Sets of linears that read the same tensor, in execution order; ``all_experts`` as for :func:`observe`.

    Raises:
        ArchitectureError: a linear was not called, or called more than once, in one forward pass.
    """
    calls: list[tuple[str, Tensor]] = []
    with watched(block, Watch(all_experts)), _input_hooks(linears, lambda name, x: calls.append((name, x))):
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
    block: nn.Module, wanted: Mapping[str, nn.Linear], batches: Sequence[BlockInput], all_experts: bool = False,
    around: Around = nothing,
) -> dict[str, InputStats]:  # fmt: skip
    """Input statistics of each wanted linear over all batches. A pass ends once the last wanted linear is reached.

    An expert's are those of the tokens that the router sends to it, or with ``all_experts`` of all tokens.
    """
    stats = {name: InputStats(m.in_features, device=m.weight.device) for name, m in wanted.items()}
    waiting: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        stats[name].add(x)
        waiting.discard(name)
        if not waiting:
            raise _EnoughSeen

    with _input_hooks(wanted, see):
        for number, batch in enumerate(batches):
            waiting.update(wanted)
            with watched(block, Watch(all_experts)), around(number), suppress(_EnoughSeen):
                run_block(block, batch)
    return stats


def observe_pairs(
    block: nn.Module,
    wanted: Mapping[str, nn.Linear],
    batches: Sequence[BlockInput],
    originals: Mapping[str, Tensor],
    reference: Sequence[Tensor],
    all_experts: bool = False,
    around: Around = nothing,
    around_originals: Around = nothing,
) -> dict[str, PairStats]:
    """Input statistics of each wanted linear beside what the original model reads there.

    In the original's pass experts are sent the same tokens as in the other one, or their inputs would not pair up.

    Args:
        block: with the weights quantized so far.
        wanted: linears of it, by name.
        batches: what the quantized blocks before it deliver.
        originals: the block's original parameters that no longer stand in it, named from the block.
        reference: the original model's hidden states ``[batch, positions, hidden]`` for the same batches.
        all_experts: as for :func:`observe`.
        around: entered around the quantized block's passes, by the number of the batch.
        around_originals: likewise around those with its original parameters.
    """
    stats = {name: PairStats(m.in_features, device=m.weight.device) for name, m in wanted.items()}
    for number, (batch, hidden) in enumerate(zip(batches, reference, strict=True)):
        watch = Watch(all_experts)
        with around(number):
            seen = linear_inputs(block, wanted, batch, {}, watch)
        again = Watch(all_experts, replay=watch.routes)
        with around_originals(number):
            beside = linear_inputs(block, wanted, BlockInput(hidden, batch.calls), originals, again)
        for name, pair in stats.items():
            pair.add_pair(seen[name], beside[name])
    return stats


def linear_inputs(
    block: nn.Module, wanted: Mapping[str, nn.Linear], batch: BlockInput, parameters: Mapping[str, Tensor],
    watch: Watch | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """What each wanted linear reads in one batch, with some of the block's parameters replaced; experts as ``watch`` says."""
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        seen[name] = x
        if len(seen) == len(wanted):
            raise _EnoughSeen

    with watched(block, watch or Watch()), _input_hooks(wanted, see), torch.no_grad(), suppress(_EnoughSeen):
        run_with(block, parameters, batch)
    return seen
