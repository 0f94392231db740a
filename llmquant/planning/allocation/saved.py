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


@contextmanager
def saved_beside(output: Path, *, resume: bool, restart: bool) -> Iterator[Path | None]:
    """The file of a destination, to be used within; None where nothing is to be saved. It is
    removed at the end, and where the command that began it would fail again: another's stays.

    Raises:
        UsageError: nothing is to be resumed, and an interrupted run has saved something.
    """
    path = output.with_name(f".{output.name}.measured")
    if not resume and not restart and path.exists():
        raise UsageError(
            f"{path} has what an interrupted run measured; leave out --no-resume to resume it, or add --restart to start over"
        )
    anothers = path.exists()
    try:
        yield path if resume else None
    except (ArchitectureError, FormatError, ProofError, QuantizationError):
        if not anothers:
            path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


class SavedMeasurements:
    """The damages that are known, as a context manager around the measuring.

    Args:
        path: the file; None: nothing is kept.
        facts: what the numbers depend on.
        items: what is measured.
        restart: nothing of the file counts; the first measurement takes its place.

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
        records, self._end = ([], 0) if path is None or restart else read_journal(path)
        if not records:
            return
        different = differences(records[0]["facts"], facts)
        if different:
            raise UsageError(
                f"{path} has what an interrupted run measured, with other settings: {different}. Repeat that run's command "
                "to resume it, or add --restart to delete the state and start over"
            )
        for record in records[1:]:
            damages = [Damage(*numbers) for numbers in record["damages"]]
            specs = items[record["item"]].specs
            self.known[record["item"]] = dict(zip(specs, damages, strict=True))

    def __enter__(self) -> SavedMeasurements:
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
        if self._path is None:
            return
        if not self.known:
            if not read_journal(self._path)[0]:
                self._path.unlink(missing_ok=True)  # begun on a disk that took nothing
        elif stops(error):
            raise KeyboardInterrupt(
                f"{len(self.known)} of {len(self._items)} measurements are saved in {self._path.name}; run the same command "
                "to resume, or add --restart to start over"
            ) from error
