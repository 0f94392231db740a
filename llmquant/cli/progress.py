"""What a terminal shows while blocks are worked on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from llmquant.cli.screen import screen

if TYPE_CHECKING:
    from llmquant.data.calibration import Calibration
    from llmquant.quantization.plan import Progress as Where
    from llmquant.quantization.run import Events


@contextmanager
def progress(hidden: bool) -> Iterator[Events]:
    """A bar over blocks with the time left, the memory in use and at most, and the current module,
    on stderr."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from llmquant.quantization.run import Events
    from llmquant.runtime.memory import peak_resident_bytes, resident_bytes

    console = screen(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[memory]}", markup=False),
    )
    with Progress(
        *columns, console=console, disable=hidden or not console.is_terminal, transient=True
    ) as progress:
        task = progress.add_task("reading", total=None, memory="")
        first: list[int] = []

        def on_calibration(calibration: Calibration) -> None:
            if not hidden:
                console.print(f"calibration  {calibration.source}", soft_wrap=True)
                for line in calibration.summary.lines():
                    console.print(f"  {line}", soft_wrap=True)
            progress.update(task, description="calibrating")

        def on_warning(warning: str) -> None:
            console.print(f"warning: {warning}", soft_wrap=True)

        def on_note(note: str) -> None:
            if not hidden:
                console.print(note, soft_wrap=True)

        def on_progress(p: Where) -> None:
            if not first:  # what an earlier process did says nothing of this one's speed
                first.append(p.block)
                progress.reset(task, total=p.blocks, completed=p.block)
            memory = f"{resident_bytes() / 1e9:.1f} GB (peak {peak_resident_bytes() / 1e9:.1f})"
            progress.update(
                task, description=p.module, completed=p.block, total=p.blocks, memory=memory
            )

        events = Events(
            on_warning=on_warning,
            on_note=on_note,
            on_calibration=on_calibration,
            on_progress=on_progress,
            on_phase=lambda phase: progress.update(
                task, description=phase, completed=progress.tasks[0].total or 0
            ),
        )
        yield events
