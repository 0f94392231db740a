"""Continuing a run that was killed: the state that it keeps in ``.NAME.resume`` beside its
unfinished ``.NAME.partial``.

The first line of ``journal.jsonl`` says which run it is
(:mod:`llmquant.quantization.state.fingerprint`). Then comes a line per finished block: what was
done, which bytes of the weight files count, and which file holds the hidden states behind it.
Before a line is written everything that it names is on the disk; what an older line names is
removed only after that. So at every instant the last whole line describes a state that is there,
and continuing from it is the same computation on the same numbers: the files come out byte for byte
as without the interruption.

Two more lines end a run: ``weights`` when all tensors are in finished files, ``whole`` when the
folder was proved and is about to get its name. The state is removed when it has it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from pydantic import TypeAdapter

from llmquant.checkpoint.atomic import disk, fsync_path, remove
from llmquant.checkpoint.reader import sha256_file
from llmquant.checkpoint.shards import Mark
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.errors import (
    ArchitectureError,
    DiskError,
    FormatError,
    LlmquantError,
    ProofError,
    QuantizationError,
    UsageError,
)
from llmquant.quantization.blocks.hidden_states import IN_MEMORY, Placement, SavedStream, StateStore
from llmquant.quantization.state.fingerprint import Facts, differences
from llmquant.quantization.state.journal import Journal, read_journal
from llmquant.quantization.state.outcome import Outcome
from llmquant.runtime import signals as interruption

_JOURNAL = "journal.jsonl"
# What the same command would meet again, so that nothing is kept: numbers that are impossible or
# that a layout cannot hold, a request that cannot be right. A disk or a source that could not be
# read may be better next time.
_REPEATED = (QuantizationError, FormatError, ProofError, ArchitectureError, UsageError)
_MARK, _STREAMS = TypeAdapter(Mark), TypeAdapter(dict[str, SavedStream])


def state_of(output: Path) -> Path:
    """The state folder of a destination."""
    return output.with_name(f".{output.name}.resume")


def kept_blocks(output: Path) -> int:
    """Blocks that an interrupted run of this destination finished and kept."""
    return sum(record["kind"] == "block" for record in _records(state_of(output)))


def finished_before(output: Path, facts: Facts) -> Outcome | None:
    """What the run did, if it was killed between giving the folder its name and removing its state;
    the state is removed then."""
    folder, manifest = state_of(output), output / "manifest.json"
    records = _records(folder)
    if not records or records[-1]["kind"] != "whole" or not manifest.is_file():
        return None
    if sha256_file(manifest) != records[-1]["manifest"] or records[0]["facts"] != facts:
        return None
    _remove_at_end(folder)
    return _outcome(records)


def _records(folder: Path) -> list[dict[str, Any]]:
    return read_journal(folder / _JOURNAL)[0]


def _outcome(records: list[dict[str, Any]]) -> Outcome:
    """Everything that the lines tell was done."""
    outcome = Outcome()
    for record in records:
        if "outcome" in record:
            outcome.add(Outcome.from_json(record["outcome"]))
    return outcome


def _remove_at_end(folder: Path) -> None:
    """Remove the state of a run that ended: the journal last, since it tells so."""
    for path in folder.glob("states-*.bin"):
        path.unlink(missing_ok=True)
    remove(folder)


def _give_up(folder: Path) -> None:
    """Remove a state that nobody shall continue: the journal first, since without it there is
    nothing to continue."""
    (folder / _JOURNAL).unlink(missing_ok=True)
    remove(folder)


class SavedRun:
    """The state of one run, as a context manager inside that of its writer.

    Leaving it normally removes the state. Leaving it by an exception keeps it if the same command
    could do better next time (an interrupt, a full disk, any surprise), and removes it if it could
    not (impossible numbers, numbers that the layout cannot hold, a failed proof).

    Args:
        writer: entered, with ``keep`` set.
        facts: the fingerprint.
        total: decoder blocks to quantize, the head counted as one.
        enabled: keep state at all.
        restart: start over, whatever is there.
        placement: where hidden states are kept.
        device: for hidden states.

    Attributes:
        outcome: of everything finished.
        blocks: of ``total``, finished; in order.
        weights_done: every tensor is in a finished file.
        store: for the walk.
        bytes_expected: of all tensors, for the message about a full disk; set by the caller.

    Raises:
        UsageError: an interrupted run of this destination was another run; names what differs.
        CheckpointError: its state is damaged.
        DiskError: the disk refused.
    """

    def __init__(
        self,
        writer: CheckpointWriter,
        facts: Facts,
        total: int,
        device: torch.device,
        *,
        enabled: bool = True,
        restart: bool = False,
        placement: Placement = IN_MEMORY,
    ) -> None:
        self.folder = state_of(writer.path)
        self.outcome = Outcome()
        self.blocks = self.resumed = 0
        self.weights_done = self._proving = False
        self.bytes_expected = 0
        self.total = total
        self._writer, self._facts, self._enabled, self._restart = writer, facts, enabled, restart
        self._device, self._placement = device, placement
        self._journal: Journal | None = None

    def __enter__(self) -> SavedRun:
        records = _records(self.folder)
        if records and records[-1]["kind"] == "whole" and not any(self._writer.partial.iterdir()):
            records = []  # that run ended; only its state was left
        if any(record["kind"] == "block" for record in records) and not self._restart:
            self._continue(records)
        else:
            self._writer.keep = False
            self._begin()
        return self

    def _begin(self) -> None:
        _give_up(self.folder)
        self._writer.clear()
        with disk(self.folder):
            if self._enabled or self._placement.spill:
                self.folder.mkdir()
                fsync_path(self.folder.parent)
            if self._enabled:
                self._journal = Journal(self.folder / _JOURNAL)
                self._journal.append({"kind": "run", "facts": self._facts})
        self.store = StateStore(
            self._device, self.folder if self.folder.exists() else None, placement=self._placement
        )

    def _continue(self, records: list[dict[str, Any]]) -> None:
        state = f"{self._writer.path} has the saved state of an interrupted run"
        different = differences(records[0]["facts"], self._facts)
        if different:
            raise UsageError(
                f"{state} with other settings: {different}. Repeat that run's command to resume it, or add --restart to "
                "delete the state and start over"
            )
        if not self._enabled:
            raise UsageError(
                f"{state}; leave out --no-resume to resume it, or add --restart to start over"
            )
        self.outcome = _outcome(records)
        self._writer.restore([_MARK.validate_python(r["mark"]) for r in records if "mark" in r])
        self.blocks = self.resumed = sum(r["kind"] == "block" for r in records)
        self.weights_done = any(r["kind"] == "weights" for r in records)
        last = [r for r in records if r["kind"] == "block"][-1]
        saved = _STREAMS.validate_python(last["streams"])
        with disk(self.folder):
            for path in self.folder.glob("states-*.bin"):
                if path.name not in {s.file for s in saved.values()}:
                    path.unlink()
        # When nothing is left to compute nobody asks for the states, and they need not be read.
        left = saved if self.blocks < self.total else None
        self.store = StateStore(self._device, self.folder, placement=self._placement, saved=left)
        self.store.calls = last["calls"]
        with disk(self.folder):
            self._journal = Journal(self.folder / _JOURNAL, read_journal(self.folder / _JOURNAL)[1])

    @contextmanager
    def proof(self) -> Iterator[None]:
        """As long as this is entered, an error means that what was written is wrong."""
        self._proving = True
        yield
        self._proving = False  # not after an error: it is looked at when the run is left

    def block_done(self, done: Outcome) -> None:
        """The next block is finished and its tensors were handed to the writer: make that last."""
        self._commit("block", done)
        self.blocks += 1
        interruption.check()

    def all_written(self, done: Outcome) -> None:
        """Every tensor was handed to the writer and its shards are finished."""
        self._commit("weights", done)
        self.weights_done = True

    def _commit(self, kind: str, done: Outcome) -> None:
        self.outcome.add(done)
        if self._journal is None:
            return
        mark = self._writer.mark()
        record = {
            "kind": kind,
            "outcome": done.as_json(),
            "mark": _MARK.dump_python(mark, mode="json"),
        }
        with disk(self.folder):
            if kind == "block":
                streams = self.store.save()
                record |= {
                    "streams": _STREAMS.dump_python(streams, mode="json"),
                    "calls": self.store.calls,
                }
                fsync_path(self.folder)
            self._journal.append(record)
            self._writer.keep = True
            self._writer.marked()
            if kind == "block":
                self.store.forget_all_but(streams)

    def whole(self, manifest: str) -> None:
        """The folder was proved; ``manifest`` is the text of its manifest."""
        if self._journal is not None:
            with disk(self.folder):
                self._journal.append(
                    {"kind": "whole", "manifest": hashlib.sha256(manifest.encode()).hexdigest()}
                )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._journal is not None:
            self._journal.close()
        stopped = interruption.stops(error)
        failed = isinstance(error, _REPEATED) or (
            self._proving and isinstance(error, LlmquantError)
        )
        if error is None:
            _remove_at_end(self.folder)
        elif (failed and not stopped) or not self._writer.keep:
            self._writer.keep = False
            _give_up(self.folder)
        if stopped:
            raise KeyboardInterrupt(self.progress()) from error
        if isinstance(error, DiskError) and self._writer.keep:
            raise DiskError(
                f"{error}: {self.progress()}{self._needs(error)}", full=error.full
            ) from error

    def progress(self) -> str:
        """What an interruption leaves, and how to resume."""
        if not self._writer.keep:
            return "no incomplete output remains"
        return (
            f"{self.blocks} of {self.total} blocks are saved next to {self._writer.path.name}; run the same command to "
            "resume, or add --restart to start over"
        )

    def _needs(self, error: DiskError) -> str:
        """The disk space that the rest will take: tensors, the shard that is put together from its
        side file, states twice."""
        if not error.full:
            return ""
        left = max(0, self.bytes_expected - self._writer.total_bytes)
        states = sum(s.nbytes for s in self.store.kept.values())
        shard = min(self.bytes_expected, self._writer.max_shard_size)
        return f"; up to {(left + states + shard) / 1e6:,.0f} MB more are needed in {self.folder.parent}"
