"""What an allocation has measured, kept beside what it is for, so that a run that was killed
resumes.

``.NAME.measured`` begins with what the numbers depend on; a line per item follows, once it was
measured. Numbers come back bit for bit, so the choice is that of a run without interruption.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from types import TracebackType

from llmquant.checkpoint.atomic import disk
from llmquant.errors import (
    ArchitectureError,
    FormatError,
    ProofError,
    QuantizationError,
    UsageError,
)
from llmquant.planning.allocation.quality_loss import Damage
from llmquant.planning.allocation.sensitivity import Item
from llmquant.quantization.state.fingerprint import Facts, differences
from llmquant.quantization.state.journal import Journal, read_journal
from llmquant.runtime.signals import stops
from llmquant.spec import QuantSpec

# What the same command would meet again.
_REPEATED = (QuantizationError, FormatError, ProofError, ArchitectureError)


def measured_for(output: Path) -> Path:
    """The file of a destination."""
    return output.with_name(f".{output.name}.measured")


@contextmanager
def kept_until_done(path: Path) -> Iterator[None]:
    """Within it the file is needed; it is removed unless the same command could do better later."""
    try:
        yield
    except BaseException as e:
        if isinstance(e, _REPEATED) and not stops(e):
            path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


class Measured:
    """The damages that are known, as a context manager around the measuring.

    Args:
        path: the file; None: nothing is kept.
        facts: what the numbers depend on.
        items: what is measured.
        restart: start over, whatever is there.

    Attributes:
        known: the damages of an item's schemes, by its place among the items.

    Raises:
        UsageError: the file is of a run with other settings; names what differs.
        DiskError: the disk refused.
    """

    def __init__(
        self, path: Path | None, facts: Facts, items: Sequence[Item], *, restart: bool = False
    ) -> None:
        self.known: dict[int, dict[QuantSpec, Damage]] = {}
        self._path, self._facts, self._items = path, facts, items
        self._journal: Journal | None = None
        self._end = 0
        if path is None or restart:
            return
        records, self._end = read_journal(path)
        if not records:
            return
        different = differences(records[0]["facts"], facts)
        if different:
            raise UsageError(
                f"{path} has what an interrupted run measured, with other settings: {different}. Repeat that run's command "
                "to resume it, or add --restart to delete the state and start over"
            )
        for record in records[1:]:
            specs = items[record["item"]].specs
            damages = (Damage(*numbers) for numbers in record["damages"])
            self.known[record["item"]] = dict(zip(specs, damages, strict=True))

    def __enter__(self) -> Measured:
        return self

    def add(self, index: int, damages: dict[QuantSpec, Damage]) -> None:
        """An item was measured: keep that."""
        if self._path is not None:
            with disk(self._path.parent):
                if self._journal is None:
                    self._path.parent.mkdir(parents=True, exist_ok=True)
                    self._journal = Journal(self._path, self._end)
                    if self._end == 0:
                        self._journal.append({"facts": self._facts})
                numbers = [astuple(damages[spec]) for spec in self._items[index].specs]
                self._journal.append({"item": index, "damages": numbers})
        self.known[index] = damages

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._journal is not None:
            self._journal.close()
        if self._path is not None and not self.known:
            self._path.unlink(missing_ok=True)  # begun on a disk that took nothing
        if stops(error) and self._path is not None and self.known:
            raise KeyboardInterrupt(
                f"{len(self.known)} of {len(self._items)} measurements are saved in {self._path.name}; run the same command "
                "to resume, or add --restart to start over"
            ) from error
