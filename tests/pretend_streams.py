"""Streams of work for the pretend device, as lazy as a real one may be: a copy that need not be
waited for is made only when somebody waits for it, and until then its target holds NaN.

* A copy of memory that was given away before the copy was made raises :class:`RaceError`, unless
  ``record_stream`` was told of it.
* A copy on a stream of a tensor that the computation made, before that stream was told to wait for
  the computation, raises :class:`RaceError`.
* Memory counts as pinned if :func:`streaming`'s maker gave it. A copy from or to other memory of
  the CPU is made at once, and is a synchronization, as CUDA has it.

The computation's own stream does everything at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from pretend_device import LEDGER, NAME, PretendTensor, install
from torch import Tensor

from llmquant.quantization.blocks import transfers


class RaceError(AssertionError):
    """A copy that may run before what it copies is there, or after it is gone."""


@dataclass
class Copy:
    """``source``: the address of the device's memory that is copied from, if it is that."""

    make: Callable[[], object]
    source: int | None
    lost: bool = False


@dataclass
class Stream:
    """Copies in the order in which they were asked for; ``seen``: how many of the computation's
    tensors it waits for; ``uses``: addresses that are not given away before its work is done."""

    device: torch.device | None = None
    waiting: list[Copy] = field(default_factory=list)
    uses: set[int] = field(default_factory=set)
    made: int = 0
    seen: int = 0

    def record_event(self) -> Event:
        return Event(self, self.made + len(self.waiting), LEDGER.made)

    def wait_event(self, event: Event) -> None:
        if event.of is COMPUTATION:
            self.seen = max(self.seen, event.tensors)
        event.synchronize()

    def run(self, until: int) -> None:
        while self.made < until:
            copy = self.waiting.pop(0)
            self.made += 1
            if copy.lost:
                raise RaceError("what is copied was given away before")
            copy.make()


@dataclass(frozen=True)
class Event:
    """A place in a stream."""

    of: Stream
    place: int
    tensors: int

    def synchronize(self) -> None:
        self.of.run(self.place)


COMPUTATION = Stream()


class Module:
    """What torch has for a kind of device: ``torch.pretend``."""

    Stream = Stream

    def __init__(self) -> None:
        self._current = COMPUTATION
        self._all: list[Stream] = []
        self.copies = 0

    def current_stream(self, _device: Any = None) -> Stream:
        return self._current

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self._current = self._current, stream
        try:
            yield
        finally:
            self._current = before

    def copy(self, to: Tensor, source: Tensor, make: Callable[[], object]) -> None:
        """A copy that need not be waited for, on the current stream."""
        self.copies += 1
        stream = self._current
        if stream is COMPUTATION:
            make()
            return
        if isinstance(source, PretendTensor) and source.number > stream.seen:
            raise RaceError("the copy does not wait for the computation of what it copies")
        (to.raw if isinstance(to, PretendTensor) else to).fill_(torch.nan)
        there = isinstance(source, PretendTensor)
        stream.waiting.append(
            Copy(make, source.raw.untyped_storage().data_ptr() if there else None)
        )
        if not any(known is stream for known in self._all):
            self._all.append(stream)

    def given_away(self, at: int) -> None:
        """Memory at this address may be another tensor's from now on."""
        for stream in self._all:
            for copy in stream.waiting:
                copy.lost |= copy.source == at and at not in stream.uses
            stream.uses.discard(at)


@contextmanager
def streaming() -> Iterator[Module]:
    """The device has streams inside."""
    install()
    pinned: set[int] = set()
    keep: list[Tensor] = []  # so that no address is given twice

    def make(like: Tensor) -> Tensor:
        keep.append(torch.empty(like.shape, dtype=like.dtype))
        pinned.add(keep[-1].data_ptr())
        return keep[-1]

    with pytest.MonkeyPatch.context() as patch:
        plain, module = torch.get_device_module, Module()
        patch.setattr(
            transfers, "get_device_module", lambda d: module if d.type == NAME else plain(d)
        )
        patch.setattr(transfers, "pinned_like", make)
        patch.setattr(Tensor, "is_pinned", lambda t: t.data_ptr() in pinned)
        patch.setattr(LEDGER, "streams", module)
        yield module
