"""World: the processes that quantize one model together, each on its own device, and what they tell
each other.

Each process carries its share of the calibration batches through every block. Three things are
common: the statistics of a linear's inputs are added up over all processes, the linears are dealt
out to be rounded, and every process gets every result, so that all of them go on with the same
weights. The first process alone writes. A world of one does nothing of this.

Each share is summed by itself and the shares are added in the order of the ranks: as
:meth:`InputStats.merge` would, bit for bit, and the same in every run with as many processes. One
process adds the same terms in another order. Its Hessians differ in the last bits of float32, and
GPTQ passes a code that falls the other way on to every column behind it. A data-free method has no
sums and gives the same bytes however many take part.

Values travel pickled between the processes of one run, which run the same program; nothing pickled
is ever read from a file.
"""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from llmquant.errors import ParallelError, UsageError
from llmquant.runtime.devices import AUTO, parse_device
from llmquant.runtime.memory import out_of_memory
from llmquant.stats import InputStats

T = TypeVar("T")

_PATIENCE = timedelta(
    days=7
)  # others wait while the first one writes and proves; a process that dies is noticed at once
_PART = 1 << 24  # numbers sent at a time: bounds the memory that adding up takes


@dataclass(frozen=True, slots=True)
class World:
    """``size`` processes, of which this is number ``rank``; ``local`` of them run on this machine,
    this one as ``local_rank``."""

    rank: int = 0
    size: int = 1
    local: int = 1
    local_rank: int = 0

    @classmethod
    def of(cls, environment: Mapping[str, str] = os.environ) -> World:
        """The world of which ``torchrun`` tells; a world of one where it tells of none.

        Raises:
            UsageError: its variables contradict each other.
        """
        try:
            rank, size, local, local_rank = (
                int(environment.get(name, default))
                for name, default in (
                    ("RANK", "0"),
                    ("WORLD_SIZE", "1"),
                    ("LOCAL_WORLD_SIZE", "1"),
                    ("LOCAL_RANK", "0"),
                )
            )
        except ValueError as e:
            raise UsageError(
                f"RANK, WORLD_SIZE and LOCAL_RANK are torchrun's and must be numbers: {e}"
            ) from e
        if not 0 <= rank < size:
            raise UsageError(
                f"RANK {rank} is not in 0 … {size - 1}, as WORLD_SIZE {size} has it; start with torchrun"
            )
        return cls(rank, size, local, local_rank)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def device(self, name: str) -> str:
        """The device of this process, given what was asked for: ``auto`` is a GPU where there is
        one; of several each process takes its own.

        Raises:
            UsageError: one GPU was named for several processes.
        """
        if name == AUTO:
            name = parse_device(AUTO).type
        if self.size == 1 or not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise UsageError(
                f"{self.size} processes cannot share {name}; give --device cuda, and each takes a GPU of its own"
            )
        return f"cuda:{self.local_rank}"

    def shard(self, items: Sequence[T]) -> list[T]:
        """This process's share: every ``size``-th item."""
        return list(items[self.rank :: self.size])

    def all_reduce(self, stats: InputStats) -> None:
        """Replace a share's sums by those over all processes.

        Raises:
            ParallelError: another process is gone.
        """
        if self.size == 1:
            return
        counts = torch.tensor([stats.tokens, stats.dropped])
        with _reached(self):
            for tensor in (*stats.sums, counts):
                for part in tensor.view(-1).split(_PART):
                    self._reduce(part)
        stats.set_counts(*(int(n) for n in counts))

    def _reduce(self, part: Tensor) -> None:
        from torch import distributed

        if self.first:
            other = torch.empty_like(part)
            for rank in range(1, self.size):
                distributed.recv(other, src=rank)
                part += other
        else:
            distributed.send(part, dst=0)
        distributed.broadcast(part, src=0)

    def scatter_gather(self, names: Sequence[str], work: Callable[[str], T]) -> dict[str, T]:
        """Do ``work`` for each name, each in one process; all get all results, in order.

        Raises:
            ParallelError: another process is gone.
        """
        done = {name: work(name) for name in self.shard(names)}
        if self.size == 1:
            return done
        return {name: self.broadcast(done.get(name), i % self.size) for i, name in enumerate(names)}  # type: ignore[misc]

    def broadcast(self, value: T, by: int = 0) -> T:
        """The value that process ``by`` has. Tensors arrive on the kind of device that they left
        from.

        Raises:
            ParallelError: another process is gone.
        """
        if self.size == 1:
            return value
        from torch import distributed

        with _reached(self):
            message: list[Any] = [None]
            tensors: list[Tensor] = []
            if self.rank == by:
                file = io.BytesIO()
                lift = _Lift(file)
                lift.dump(value)
                tensors = lift.tensors
                message = [(file.getvalue(), [(t.shape, t.dtype, t.device.type) for t in tensors])]
            distributed.broadcast_object_list(message, src=by, device=torch.device("cpu"))
            data, kinds = message[0]
            if self.rank != by:
                tensors = [
                    torch.empty(shape, dtype=dtype, device=self._beside(kind))
                    for shape, dtype, kind in kinds
                ]
            for tensor in tensors:
                distributed.broadcast(tensor, src=by)
        if self.rank == by:
            return value
        received: T = _Lower(io.BytesIO(data), tensors).load()
        return received

    def _beside(self, kind: str) -> torch.device:
        return torch.device(kind, self.local_rank) if kind == "cuda" else torch.device(kind)

    def barrier(self) -> None:
        """Wait until every process has come this far.

        Raises:
            ParallelError: another process is gone.
        """
        if self.size > 1:
            with _reached(self):
                self._reduce(torch.zeros(1))


ALONE = World()


class _Lift(pickle.Pickler):
    """Takes tensors out of a value, so that they travel as themselves."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach().contiguous())
        return len(self.tensors) - 1


class _Lower(pickle.Unpickler):
    """Puts them back."""

    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


@contextmanager
def _reached(world: World) -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:  # what every backend raises for a lost connection
        if out_of_memory(e):
            raise
        raise ParallelError(
            f"process {world.rank} of {world.size} lost contact with the other processes; see the error of the one that failed ({str(e).splitlines()[0]})"
        ) from e


@contextmanager
def joined(world: World) -> Iterator[World]:
    """``world``, connected for the length of the block.

    Raises:
        UsageError: this torch cannot.
        ParallelError: the other processes do not answer.
    """
    if world.size == 1:
        yield world
        return
    from torch import distributed

    if not distributed.is_available():
        raise UsageError("this torch was built without torch.distributed; quantize in one process")
    with _reached(world):
        distributed.init_process_group(
            _backends(), rank=world.rank, world_size=world.size, timeout=_PATIENCE
        )
    try:
        yield world
    finally:
        distributed.destroy_process_group()


def _backends() -> str:
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
