"""Activations on their way between the memory of the CPU and a device.

Where a device has streams of work (CUDA) a copy runs beside the computation: from and to pinned
memory, on a stream of its own. :func:`behind` begins the next copy before the one before it is
waited for, so a batch arrives while the one before it is worked on, and a result leaves while the
next is computed. That holds two batches on the device. Elsewhere a copy is made when it is asked
for. Both move the same bytes.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, get_device_module

log = logging.getLogger(__name__)
_AHEAD = 2  # batches whose work may be asked for and not done

Arrival = Callable[[], Tensor]
"""A tensor that may still be on its way; to call it is to wait for it."""


class Transfers:
    """Copies one after the other: a CPU, and devices without streams.

    Args:
        device: where batches are worked on.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, tensor: Tensor) -> Arrival:
        """Begin to bring a tensor of the CPU to the device."""
        return lambda: tensor.to(self.device)

    def fetch(self, tensor: Tensor, into: Tensor | None = None, *, final: bool = True) -> Arrival:
        """Begin to bring a tensor to the CPU, contiguous.

        Args:
            into: a tensor of the CPU that is needed no more, and may be written to.
            final: nobody will write into ``tensor``; otherwise it is copied even on a CPU.
        """
        here = tensor.detach().to("cpu", copy=not final).contiguous()
        return lambda: here

    def paced(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same, none of which is given out while the work on one long before is not done."""
        return iter(tensors)


class Streamed(Transfers):
    """Copies on a stream of their own.

    Args:
        device: of a kind whose module in torch has streams, as ``torch.cuda`` has.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._of = get_device_module(device)
        self._copies = self._of.Stream(device)

    def send(self, tensor: Tensor) -> Arrival:
        with self._of.stream(self._copies):
            there = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            there.copy_(pinned(tensor), non_blocking=True)
        arrived = self._copies.record_event()

        def receive() -> Tensor:
            current = self._of.current_stream(self.device)
            current.wait_event(arrived)
            there.record_stream(current)  # so that its memory is not given away too early
            return there

        return receive

    def fetch(self, tensor: Tensor, into: Tensor | None = None, *, final: bool = True) -> Arrival:
        source = tensor.detach().contiguous()
        here = into if into is not None and _fits(into, source) else pinned_like(source)
        current = self._of.current_stream(self.device)
        if final:
            self._copies.wait_event(current.record_event())
        with self._of.stream(self._copies if final else current):
            here.copy_(source, non_blocking=True)
            done = self._of.current_stream(self.device).record_event()
        if final and source.device.type == self.device.type:
            source.record_stream(self._copies)

        def receive() -> Tensor:
            done.synchronize()
            return here

        return receive

    def paced(self, tensors: Iterable[Tensor]) -> Iterator[Tensor]:
        begun: deque[Any] = deque()
        for tensor in tensors:
            if len(begun) == _AHEAD:
                begun.popleft().synchronize()
            yield tensor
            begun.append(self._of.current_stream(self.device).record_event())


def transfers_of(device: torch.device) -> Transfers:
    """The kind that a device has."""
    streams = device.type != "cpu" and hasattr(get_device_module(device), "Stream")
    return Streamed(device) if streams else Transfers(device)


def pinned_like(tensor: Tensor) -> Tensor:
    """An unset tensor of the CPU that a device can read and write by itself, as far as the system
    gives such memory."""
    try:
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError as e:
        _no_more_pinned(str(e).splitlines()[0])
        return torch.empty(tensor.shape, dtype=tensor.dtype)


@cache
def _no_more_pinned(reason: str) -> None:
    """Said once."""
    log.warning("the system gives no more pinned memory (%s), so copies are waited for", reason)


def pinned(tensor: Tensor) -> Tensor:
    """A tensor of the CPU in memory that a device can read by itself; a copy where it is not."""
    return tensor if tensor.is_pinned() else pinned_like(tensor).copy_(tensor)


def _fits(into: Tensor, source: Tensor) -> bool:
    same = into.shape == source.shape and into.dtype is source.dtype
    return same and into.is_contiguous() and into.is_pinned()


def behind(arrivals: Iterable[Arrival]) -> Iterator[Tensor]:
    """What arrives, each waited for only after the next was begun."""
    before: Arrival | None = None
    for arrival in arrivals:
        if before is not None:
            yield before()
        before = arrival
    if before is not None:
        yield before()
