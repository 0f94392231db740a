"""What blocks are called with beside the hidden states: masks and position embeddings, by batch and
block.

They depend on the windows' lengths alone, so nearly all batches have equal ones: each distinct
tensor is held once, on the CPU, and those of the last batch on the device. A walk that is continued
computes them again, and their digest tells whether this machine gives what the first one gave.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmquant.checkpoint.reader import sha256_tensor
from llmquant.errors import CheckpointError
from llmquant.models.block_inputs import Call


class Calls:
    """Arguments of every block for every batch."""

    def __init__(self) -> None:
        self._of: list[tuple[Call, ...]] = []
        self._tensors: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._there: dict[int, tuple[Tensor, Tensor]] = {}  # of the last batch asked for
        self._digest = hashlib.sha256()

    def add(self, calls: tuple[Call, ...]) -> None:
        """Note the next batch's; the blocks' arguments in order."""
        known: dict[
            int, tuple[Tensor, Tensor]
        ] = {}  # blocks share most tensors, so each is hashed once

        def interned(tensor: Tensor) -> Tensor:
            if id(tensor) not in known:
                plain = tensor.detach().to("cpu")
                sha = sha256_tensor(plain)
                known[id(tensor)] = tensor, self._tensors.setdefault((sha, plain.stride()), plain)
                self._digest.update(sha.encode())
            return known[id(tensor)][1]

        self._of.append(tuple(_mapped(call, interned) for call in calls))
        self._digest.update(repr(_mapped(calls, lambda _: "tensor", _plain)).encode())

    def of(self, batch: int, block: int, device: torch.device) -> tuple[Call, ...]:
        """The arguments of one block as a one-item tuple; empty behind the last block."""
        before, self._there = self._there, {}

        def there(tensor: Tensor) -> Tensor:
            known = before.get(id(tensor))
            if known is None or known[1].device.type != device.type:
                known = tensor, tensor.to(device)
            self._there[id(tensor)] = known
            return known[1]

        calls: tuple[Call, ...] = _mapped(self._of[batch][block : block + 1], there)
        return calls

    def settle(self, before: str | None) -> str:
        """The digest of all; compared with that of the run that is continued.

        Raises:
            CheckpointError: they differ.
        """
        digest = self._digest.hexdigest()
        if before is not None and before != digest:
            raise CheckpointError(
                "masks or position embeddings differ from those of the interrupted run; is this another machine? "
                "Resume where the run started, or start over with --restart"
            )
        return digest


def _mapped(
    value: Any, on_tensor: Callable[[Tensor], Any], on_other: Callable[[Any], Any] = lambda v: v
) -> Any:
    """A nest of tuples, lists and dicts with its leaves replaced."""
    if isinstance(value, Tensor):
        return on_tensor(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(v, on_tensor, on_other) for v in value)
    if type(value) is dict:
        return {k: _mapped(v, on_tensor, on_other) for k, v in value.items()}
    return on_other(value)


def _plain(value: Any) -> Any:
    """Numbers, words and None as they are; of other objects their kind."""
    return value if isinstance(value, bool | int | float | str | None) else type(value).__name__
