"""What a terminal shows while blocks are worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmquant.cli.screen import screen

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn, TaskID

    from llmquant.data.calibration import Calibration
    from llmquant.quantization.options import Events
    from llmquant.quantization.plan import Progress as Where
    from llmquant.training.options import QatEvents, TrainingStep


def bar_columns(*more: ProgressColumn) -> tuple[ProgressColumn, ...]:
    """What a bar of any command shows: its text, the bar, how many are done, the time so far, the
    time left, and ``more``."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        *more,
    )


@contextmanager
def progress(hidden: bool) -> Iterator[Events]:
    """A bar over blocks with the time left, the memory in use and at most, and the current module,
    on stderr."""
    from rich.progress import Progress, TextColumn

    from llmquant.quantization.options import Events

    console = screen(stderr=True)
    columns = bar_columns(TextColumn("{task.fields[memory]}", markup=False))
    silent = hidden or not console.is_terminal
    with Progress(*columns, console=console, disable=silent, transient=True) as bar:
        shown = _Shown(bar, console, hidden)
        yield Events(
            on_warning=lambda warning: console.print(f"warning: {warning}", soft_wrap=True),
            on_note=shown.note,
            on_calibration=shown.calibration,
            on_progress=shown.progress,
            on_phase=shown.phase,
        )


@contextmanager
def steps(hidden: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar over linears or tensors, on stderr; what it gives is called with a word for the phase,
    how many are done, and all of them."""
    from rich.progress import Progress

    console = screen(stderr=True)
    silent = hidden or not console.is_terminal
    with Progress(console=console, disable=silent, transient=True) as bar:
        task = bar.add_task("reading", total=None)
        yield lambda phase, done, total: bar.update(
            task, description=phase, completed=done, total=total
        )


@contextmanager
def training_progress(hidden: bool) -> Iterator[QatEvents]:
    """A bar over training steps, with the loss, the held-out KL and tokens per second, on
    stderr."""
    from rich.progress import Progress, TextColumn

    from llmquant.training.options import QatEvents

    console = screen(stderr=True)
    columns = bar_columns(TextColumn("{task.fields[facts]}", markup=False))
    silent = hidden or not console.is_terminal
    with Progress(*columns, console=console, disable=silent, transient=True) as bar:
        shown = _Trained(bar, console, hidden)
        yield QatEvents(on_note=shown.note, on_phase=shown.phase, on_step=shown.step)


class _Trained:
    """What stands on the terminal while a model is trained."""

    def __init__(self, bar: Progress, console: Console, hidden: bool) -> None:
        self._bar, self._console, self._hidden = bar, console, hidden
        self._task = bar.add_task("reading", total=None, facts="")
        self._training: TaskID | None = None

    def note(self, note: str) -> None:
        if not self._hidden:
            self._console.print(note, soft_wrap=True)

    def phase(self, phase: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=phase, completed=done, total=total)

    def step(self, step: TrainingStep) -> None:
        if self._training is None:  # its clock begins here, so that the time left is right
            self._training = self._bar.add_task("training", total=step.steps, facts="")
            self._bar.update(self._training, completed=step.step - 1)
        facts = (
            f"loss {step.loss:.4f}, held-out KL {step.heldout:.4f} (best {step.best:.4f}), "
            f"{step.tokens_per_second:,.0f} tokens/s"
        )
        self._bar.update(self._training, completed=step.step, facts=facts)


class _Shown:
    """What stands on the terminal."""

    def __init__(self, bar: Progress, console: Console, hidden: bool) -> None:
        self._bar, self._console, self._hidden = bar, console, hidden
        self._task = bar.add_task("reading", total=None, memory="")
        self._began = False

    def note(self, note: str) -> None:
        if not self._hidden:
            self._console.print(note, soft_wrap=True)

    def calibration(self, calibration: Calibration) -> None:
        self.note(f"calibration  {calibration.source}")
        for line in calibration.summary.lines():
            self.note(f"  {line}")
        self._bar.update(self._task, description="calibrating")

    def progress(self, where: Where) -> None:
        from llmquant.runtime.memory import peak_resident_bytes, resident_bytes

        if not self._began:  # what an earlier process did says nothing of this one's speed
            self._began = True
            self._bar.reset(self._task, total=where.blocks, completed=where.block)
        memory = f"{resident_bytes() / 1e9:.1f} GB (peak {peak_resident_bytes() / 1e9:.1f})"
        self._bar.update(
            self._task,
            description=where.module,
            completed=where.block,
            total=where.blocks,
            memory=memory,
        )

    def phase(self, phase: str) -> None:
        self._bar.update(self._task, description=phase, completed=self._bar.tasks[0].total or 0)
