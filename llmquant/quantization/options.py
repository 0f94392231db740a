"""What a run is asked for beside its recipe, what it calls back, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llmquant.data.calibration import Calibration
from llmquant.quantization.plan import Progress
from llmquant.recipe import Recipe
from llmquant.records import (
    GroupSizeRecord,
    ModuleReport,
    PairReport,
    QatRecord,
    TuneReport,
)
from llmquant.runtime.computing import Computing
from llmquant.runtime.distributed import ALONE, World


@dataclass(frozen=True, slots=True)
class QuantizeOptions:
    """Where and how a run happens; nothing here is meant to change what is computed but ``dtype``
    and ``device``.

    Attributes:
        device: torch device that holds the current block; ``auto``: cuda where there is one, else
            cpu.
        dtype: in which blocks are run for calibration: float32 (``auto``), bfloat16 or float16.
            Statistics and rounding are float32 whatever it is.
        overwrite: replace an existing model folder.
        max_shard_size: bytes per safetensors file.
        base_model: name for the model card; default: the model as it was given.
        store_dtype: of scales and of what is not quantized: ``source`` (the model's), ``auto``
            (the command line's default: 16 bits where the model has more), or a dtype.
        evaluation: text that calibration must not overlap with, as a source.
        resume: keep what is needed to continue after a kill, and continue what such a run left.
            False: keep nothing.
        restart: start over even if there is something to resume.
        max_memory: bytes of RAM to stay under by keeping hidden states in files; None: what the
            machine has left.
        log: file for one JSON line per module, block and turn of the run; None: none.
        note: to be said with the run's own notes, once nothing refuses it.
        world: the processes that do it together, each with the same arguments; see
            :mod:`llmquant.runtime.distributed`.
    """

    device: str = "cpu"
    dtype: str = "auto"
    overwrite: bool = False
    max_shard_size: int = 5_000_000_000
    base_model: str | None = None
    store_dtype: str = "source"
    evaluation: str | None = None
    resume: bool = True
    restart: bool = False
    max_memory: int | None = None
    log: Path | None = None
    note: str | None = None
    world: World = ALONE


@dataclass(frozen=True, slots=True)
class QuantizeResult:
    """What came out, and how it was computed.

    ``recipe`` has the group sizes that were used, ``regrouped`` says where they are not the wanted
    ones. ``resumed``: blocks that an earlier process had finished. ``trained``: what training did
    after rounding, whose errors ``modules`` has.
    """

    path: Path
    recipe: Recipe
    modules: tuple[ModuleReport, ...]
    tuned: Mapping[str, TuneReport]
    scaled: Mapping[str, tuple[PairReport, ...]]
    skipped: Mapping[str, str]
    bits_per_weight: float
    source_bytes: int
    bytes_written: int
    calibration: Calibration | None
    warnings: tuple[str, ...]
    computing: Computing
    resumed: int = 0
    regrouped: tuple[GroupSizeRecord, ...] = ()
    trained: QatRecord | None = None


@dataclass(slots=True)
class Events:
    """Callbacks of a run, all optional: calibration is ready, a module begins, a phase begins, a
    warning before work starts, something worth knowing (an earlier run is continued, hidden states
    go to files)."""

    on_calibration: Callable[[Calibration], None] = lambda _: None
    on_progress: Callable[[Progress], None] = lambda _: None
    on_phase: Callable[[str], None] = lambda _: None
    on_warning: Callable[[str], None] = lambda _: None
    on_note: Callable[[str], None] = lambda _: None
