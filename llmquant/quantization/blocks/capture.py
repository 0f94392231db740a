"""What the linears of a block read, observed rather than assumed.

``stages`` runs one batch through a block and notes which linears were called with the very same
tensor, in calling order: those share one Hessian. ``observe`` then accumulates :class:`InputStats`
for one linear of each such set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.errors import ArchitectureError
from llmquant.models.block_inputs import BlockInput, run_block, run_with
from llmquant.models.experts import Watch, watched
from llmquant.stats import InputStats, PairStats

BatchContext = Callable[[int], AbstractContextManager[None]]
"""What is entered around the passes of a batch, by its number; see
:class:`llmquant.quantization.blocks.replay.Replay`."""


def no_context(_number: int) -> AbstractContextManager[None]:
    """Passes as they are."""
    return nullcontext()


class _EnoughSeen(Exception):  # noqa: N818 - control flow, as above
    """Raised by a hook to end a block's pass once every wanted input was seen."""


@contextmanager
def _input_hooks(
    linears: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _module, args: see(name, args[0])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stages(
    block: nn.Module,
    linears: Mapping[str, nn.Module],
    inputs: BlockInput,
    all_experts: bool = False,
) -> list[tuple[str, ...]]:
    """Sets of linears that read the same tensor, in execution order; ``all_experts`` as for
    :func:`observe`.

    Raises:
        ArchitectureError: a linear was not called, or called more than once, in one forward pass.
    """
    calls: list[tuple[str, Tensor]] = []
    with (
        watched(block, Watch(all_experts)),
        _input_hooks(linears, lambda name, x: calls.append((name, x))),
    ):
        run_block(block, inputs)
    names = [name for name, _ in calls]
    for name in linears:
        if names.count(name) != 1:
            raise ArchitectureError(
                f"{name} was called {names.count(name)} times in one pass through its block, so its inputs cannot be "
                f"calibrated; --ignore it or use --method rtn, without --calibration"
            )
    sets: list[tuple[Tensor, list[str]]] = []
    for name, x in calls:
        same = next((members for seen, members in sets if seen is x), None)
        if same is None:
            sets.append((x, [name]))
        else:
            same.append(name)
    return [tuple(members) for _, members in sets]


def observe(
    block: nn.Module,
    wanted: Mapping[str, nn.Linear],
    batches: Sequence[BlockInput],
    all_experts: bool = False,
    context: BatchContext = no_context,
    first_token_share: float = 0.0,
) -> dict[str, InputStats]:
    """Input statistics of each wanted linear over all batches. A pass ends once the last wanted
    linear is reached.

    An expert's are those of the tokens that the router sends to it, or with ``all_experts`` of all
    tokens. ``first_token_share`` as for :class:`InputStats`.
    """
    stats = {
        name: InputStats(m.in_features, device=m.weight.device, first_token_share=first_token_share)
        for name, m in wanted.items()
    }
    waiting: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        stats[name].add(_in_windows(x, batch))
        waiting.discard(name)
        if not waiting:
            raise _EnoughSeen

    with _input_hooks(wanted, see):
        for number, batch in enumerate(batches):
            waiting.update(wanted)
            with watched(block, Watch(all_experts)), context(number), suppress(_EnoughSeen):
                run_block(block, batch)
    return stats


def observe_pairs(
    block: nn.Module,
    wanted: Mapping[str, nn.Linear],
    batches: Sequence[BlockInput],
    originals: Mapping[str, Tensor],
    reference: Sequence[Tensor],
    all_experts: bool = False,
    context: BatchContext = no_context,
    context_of_originals: BatchContext = no_context,
    first_token_share: float = 0.0,
) -> dict[str, PairStats]:
    """Input statistics of each wanted linear beside what the original model reads there.

    In the original's pass experts are sent the same tokens as in the other one, or their inputs
    would not pair up.

    Args:
        block: with the weights quantized so far.
        wanted: linears of it, by name.
        batches: what the quantized blocks before it deliver.
        originals: the block's original parameters that no longer stand in it, named from the block.
        reference: the original model's hidden states ``[batch, positions, hidden]`` for the same
            batches.
        all_experts: as for :func:`observe`.
        context: entered around the quantized block's passes, by the number of the batch.
        context_of_originals: likewise around those with its original parameters.
        first_token_share: as for :class:`InputStats`.
    """
    stats = {
        name: PairStats(m.in_features, device=m.weight.device, first_token_share=first_token_share)
        for name, m in wanted.items()
    }
    for number, (batch, hidden) in enumerate(zip(batches, reference, strict=True)):
        watch = Watch(all_experts)
        with context(number):
            seen = linear_inputs(block, wanted, batch, {}, watch)
        again = Watch(all_experts, replay=watch.routes)
        with context_of_originals(number):
            beside = linear_inputs(block, wanted, BlockInput(hidden, batch.calls), originals, again)
        for name, pair in stats.items():
            pair.add_pair(_in_windows(seen[name], batch), _in_windows(beside[name], batch))
    return stats


def _in_windows(x: Tensor, batch: BlockInput) -> Tensor:
    """Activations as ``[windows, positions, in]`` if they are of all positions of the batch,
    whatever shape the block gave them on the way (OPT flattens them for its MLP, DeepSeek splits
    heads); else, an expert's, as ``[tokens, in]``."""
    rows = x.reshape(-1, x.shape[-1])
    windows, positions = batch.hidden.shape[:2]
    everything = rows.shape[0] == windows * positions
    return rows.reshape(windows, positions, -1) if everything else rows


def linear_inputs(
    block: nn.Module,
    wanted: Mapping[str, nn.Linear],
    batch: BlockInput,
    parameters: Mapping[str, Tensor],
    watch: Watch | None = None,
) -> dict[str, Tensor]:
    """What each wanted linear reads in one batch, with some of the block's parameters replaced;
    experts as ``watch`` says."""
    seen: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        seen[name] = x
        if len(seen) == len(wanted):
            raise _EnoughSeen

    with (
        watched(block, watch or Watch()),
        _input_hooks(wanted, see),
        torch.no_grad(),
        suppress(_EnoughSeen),
    ):
        run_with(block, parameters, batch)
    return seen
