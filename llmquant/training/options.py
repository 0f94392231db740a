"""What a training run is asked for beside the recipe's section, what it calls back, and what it
returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llmquant.records import QatRecord
from llmquant.runtime.computing import Computing


@dataclass(frozen=True, slots=True)
class QatOptions:
    """Where and how a run happens.

    Attributes:
        device: torch device; ``auto``: cuda where there is one, else cpu.
        dtype: that products are computed in: ``auto`` is the fastest here, float32 or bfloat16.
            Masters, moments and the loss are float32 whatever it is.
        checkpointing: run blocks again for their gradients instead of keeping what is inside; None:
            where a block's insides would not fit in a quarter of the free memory. Changes no
            number.
        evaluation: text that the model will be judged by; what of it is trained on is told.
        max_cache: bytes that the reference's logits may take on disk.
        overwrite: replace an existing model folder.
        resume: continue what an interrupted run left; what one needs is always kept.
        restart: start over even if there is something to resume.
        log: file for one JSON line per step; None: none.
        plot: file for the curve of the losses; None: none.
    """

    device: str = "auto"
    dtype: str = "auto"
    checkpointing: bool | None = None
    evaluation: str | None = None
    max_cache: int = 4_000_000_000
    overwrite: bool = False
    restart: bool = False
    log: Path | None = None
    plot: Path | None = None


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """What is known after a step.

    Attributes:
        step: how many were taken, of ``steps``.
        loss: of this one.
        heldout: the held-out KL as measured last.
        best: the smallest so far.
        tokens_per_second: of training, since the process began.
    """

    step: int
    steps: int
    loss: float
    heldout: float
    best: float
    tokens_per_second: float


@dataclass(slots=True)
class QatEvents:
    """Callbacks of a run, all optional: something worth knowing, progress of a phase (its word, how
    many are done, all), and a step."""

    on_note: Callable[[str], None] = lambda _: None
    on_phase: Callable[[str, int, int], None] = lambda phase, done, total: None
    on_step: Callable[[TrainingStep], None] = lambda _: None


@dataclass(frozen=True, slots=True)
class QatResult:
    """What came out.

    Attributes:
        path: the folder.
        record: as the manifest has it.
        heldout: (step, KL) of every measurement.
        bits_per_weight: of the packed modules, as stored.
        bytes_written: of all tensors.
        modules: how many linears were trained.
        resumed: steps that an earlier process had taken.
        seconds: of this process.
        computing: device and dtype.
        warnings: what a user should know though it succeeded.
    """

    path: Path
    record: QatRecord
    heldout: tuple[tuple[int, float], ...]
    bits_per_weight: float
    bytes_written: int
    modules: int
    resumed: int
    seconds: float
    computing: Computing
    warnings: tuple[str, ...]
