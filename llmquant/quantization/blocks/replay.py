"""Replay: parts of a block that are not run again, because all that changes in them is their last
linear.

With ``true_sequential`` a block is run once for every set of linears. By the time its MLP is
calibrated its attention gives the same for every batch in every pass: the weights before its last
linear are final. So the input of that linear is kept, batch by batch, and from then on the part
*is* that linear, applied to it: the same operation on the same numbers, so the same bits.

That a part returns what its last linear gave is observed in one pass (:class:`Tails`), never
assumed; a part that does anything behind it (a norm, a second output, experts) is simply run again.
Inputs are kept on the CPU, as all hidden states are; whether there is memory for them is decided by
:mod:`llmquant.quantization.memory`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmquant.models.experts import ExpertList
from llmquant.quantization.blocks.transfers import Arrival, Transfers


@dataclass(frozen=True, slots=True)
class Tail:
    """A part of a block that returns what its last linear gives.

    Attributes:
        part: a child of the block.
        before: linears inside it that are called earlier; all names are seen from the block.
        linear: the last one.
        more: what the part returns behind it, none of it tensors; None: it returns the tensor
            itself.
    """

    part: str
    before: frozenset[str]
    linear: str
    more: tuple[Any, ...] | None


class Tails:
    """Watches one pass, as long as it is entered, for the tails of a block; ``linears`` are those
    to be quantized."""

    def __init__(self, block: nn.Module, linears: Mapping[str, nn.Module]) -> None:
        self._linears = linears
        self._parts = {
            name: part
            for name, part in block.named_children()
            if not isinstance(part, nn.Linear)
            and not any(isinstance(m, ExpertList) for m in part.modules())
        }
        self._outputs: dict[str, Tensor] = {}  # in calling order
        self._results: dict[str, Any] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> Tails:
        for modules, kept in ((self._linears, self._outputs), (self._parts, self._results)):
            for name, module in modules.items():
                note = lambda _m, _args, out, name=name, kept=kept: kept.__setitem__(name, out)  # noqa: E731
                self._hooks.callback(module.register_forward_hook(note).remove)
        return self

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def found(self) -> list[Tail]:
        """What the pass showed; the tensors that it held are let go."""
        tails = []
        for name, result in self._results.items():
            inside = [linear for linear in self._outputs if linear.startswith(f"{name}.")]
            first, more = (
                (result[0], result[1:]) if type(result) is tuple and result else (result, None)
            )
            if (
                inside
                and first is self._outputs[inside[-1]]
                and not any(isinstance(m, Tensor) for m in more or ())
            ):
                tails.append(Tail(name, frozenset(inside[:-1]), inside[-1], more))
        self._outputs.clear()
        self._results.clear()
        return tails


class Replay:
    """What passes through one block leave for later ones, as long as it is entered.

    Args:
        block: with the weights of this walk.
        tails: of the block, as :class:`Tails` saw them.
        waiting: linears that are still to be observed and quantized; say with :meth:`settle` when
            they are. A part with one of them before its last linear is run.
        original: the passes are with original weights, which do not change, so what the last linear
            reads is kept early.
        transfers: of what is kept; default: a CPU's.
    """

    def __init__(
        self,
        block: nn.Module,
        tails: Sequence[Tail],
        waiting: Collection[str],
        *,
        original: bool = False,
        transfers: Transfers | None = None,
    ) -> None:
        self._block, self._tails, self._original = block, tails, original
        self._transfers = transfers or Transfers(torch.device("cpu"))
        self._waiting = set(waiting)
        self._inputs: dict[tuple[str, int], Arrival] = {}
        self._batch: int | None = None
        self._entered = ExitStack()

    def __enter__(self) -> Replay:
        for tail in self._tails:
            self._install(tail)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()
        self._inputs.clear()

    def settle(self, names: Collection[str]) -> None:
        """These linears were observed and have their final weights."""
        self._waiting.difference_update(names)

    @contextmanager
    def batch(self, number: int) -> Iterator[None]:
        """Passes inside are of this batch; outside nothing is kept or replayed."""
        self._batch = number
        try:
            yield
        finally:
            self._batch = None

    def _install(self, tail: Tail) -> None:
        part, linear = self._block.get_submodule(tail.part), self._block.get_submodule(tail.linear)
        run = part.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            kept = None if self._batch is None else self._inputs.get((tail.part, self._batch))
            if kept is None or tail.before & self._waiting:
                return run(*args, **kwargs)
            out = linear(kept().to(next(linear.parameters()).device, non_blocking=True))
            return out if tail.more is None else (out, *tail.more)

        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            key = (tail.part, self._batch) if self._batch is not None else None
            final = self._original or not tail.before & self._waiting
            if key is not None and final and key not in self._inputs:
                self._inputs[key] = self._transfers.fetch(args[0], final=False)

        self._entered.callback(linear.register_forward_pre_hook(keep).remove)
        before = part.__dict__.get("forward")  # of another walk through the same block
        part.__dict__["forward"] = forward
        self._entered.callback(_restore, part, before)


def _restore(part: nn.Module, forward: Any) -> None:
    if forward is None:
        del part.__dict__["forward"]
    else:
        part.__dict__["forward"] = forward
