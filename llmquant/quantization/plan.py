"""What a walk is given and what it hands out; see :mod:`llmquant.quantization.walk`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant.algorithms import AWQOptions, GPTQOptions, ScaleSearch, TuneOptions
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.formats import Format, layout_of
from llmquant.models.architectures import Architecture, blocks_of
from llmquant.models.reading.engine_names import EngineNames
from llmquant.models.reading.linears import Linears
from llmquant.models.selection import Selection
from llmquant.quantization.steps.rescaling import RescaledReader
from llmquant.quantization.steps.smoothquant import SmoothOptions
from llmquant.recipe import Recipe
from llmquant.records import ModuleReport, PairReport, TuneReport
from llmquant.runtime.computing import Computing
from llmquant.runtime.devices import ChosenDtype
from llmquant.runtime.distributed import ALONE, World
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight

NOTHING = Selection({}, {}, None)
"""No linear is quantized."""


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The quantized linears of one decoder block (``index`` None: the head, or the embeddings), by
    full name; what tuning it did.

    ``changed`` holds tensors beside them (norms, biases) that scaling changed, by full name;
    ``scaled`` says what it did.
    """

    index: int | None
    weights: dict[str, tuple[QuantizedWeight, ModuleReport]]
    tuned: TuneReport | None = None
    changed: Mapping[str, Tensor] = field(default_factory=dict)
    scaled: tuple[PairReport, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Where the walk is: ``block`` of ``blocks`` (embeddings and head count as one each), and the
    module being worked on."""

    block: int
    blocks: int
    module: str


@dataclass(frozen=True, slots=True)
class SourceModel:
    """An unquantized model and where its tensors are.

    Attributes:
        original: the checkpoint, its tensors named by their places in the model.
        rescaled: rotated where the recipe wants that, and with powers of two moved between layers
            where scales need it.
        reader: the same in the dtype that is stored: what a run reads.
        model: on the meta device.
        architecture: where its blocks are.
        linears: that could be quantized.
        names: what engines call its modules.
        leftovers: tensors that the model has no place for; carried over as they are.
        notes: what people should know of the folder.
    """

    original: CheckpointReader
    rescaled: RescaledReader
    reader: CheckpointReader
    model: PreTrainedModel
    architecture: Architecture
    linears: Linears
    names: EngineNames
    leftovers: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class WalkPlan:
    """What a walk does with a model.

    Attributes:
        source: the model.
        recipe: what is done to it.
        device: that blocks run on.
        precision: the dtype that they run in, and why.
        selection: every linear to quantize; of a walk for something else there are none.
        world: the processes that share the work. Each walks with its share of the calibration
            batches; all hand out the same results.
    """

    source: SourceModel
    recipe: Recipe
    device: torch.device
    precision: ChosenDtype
    selection: Selection = NOTHING
    world: World = ALONE

    @property
    def model(self) -> PreTrainedModel:
        return self.source.model

    @property
    def architecture(self) -> Architecture:
        return self.source.architecture

    @property
    def reader(self) -> CheckpointReader:
        return self.source.reader

    @property
    def layout(self) -> Format:
        """The recipe's format."""
        return layout_of(self.recipe.format)

    @property
    def dtype(self) -> torch.dtype:
        return self.precision.dtype

    @property
    def computing(self) -> Computing:
        """Device and dtype with the threads and the processor of now."""
        return Computing.of(self.device, self.precision)

    @cached_property
    def specs(self) -> Mapping[str, QuantSpec]:
        """The grid of every linear to quantize, by full name."""
        return self.selection.specs

    @property
    def head(self) -> str | None:
        """The head's name, if it is one of them."""
        return self.selection.head

    @property
    def embedding(self) -> str | None:
        """The token embeddings' name, if they are quantized."""
        return self.selection.embedding

    def repeats(self, tensor: str) -> bool:
        """Whether a stored tensor only says once more what the packed embeddings say."""
        return tensor.removesuffix(".weight") in self.selection.shared

    @property
    def blocks(self) -> int:
        """How many decoder blocks the model has."""
        return len(blocks_of(self.model, self.architecture))

    @property
    def total(self) -> int:
        """Steps of a walk: blocks, and embeddings and head where they are quantized."""
        return self.blocks + (self.embedding is not None) + (self.head is not None)

    @property
    def search(self) -> ScaleSearch:
        s = self.recipe.scales
        return ScaleSearch(s.steps, s.smallest, s.norm, s.weighted, self.layout.lowest_zero)

    @property
    def tune_options(self) -> TuneOptions | None:
        t = self.recipe.tune
        return (
            None
            if t is None
            else TuneOptions(t.steps, t.lr, t.scale_lr, t.checks, t.patience, self.recipe.seed)
        )

    @property
    def awq_options(self) -> AWQOptions | None:
        a = self.recipe.awq
        return None if a is None else AWQOptions(a.grid, a.duo_scaling, a.steps)

    @property
    def smooth_options(self) -> SmoothOptions | None:
        s = self.recipe.smooth
        return None if s is None else SmoothOptions(s.alpha, s.pairs == "all")

    @property
    def batch_size(self) -> int:
        """Calibration windows per pass."""
        return (
            self.recipe.calibration.batch_size
            if self.recipe.tune is None
            else self.recipe.tune.batch_size
        )

    @property
    def all_experts(self) -> bool:
        """Whether statistics of experts are taken over all tokens."""
        return bool(self.recipe.calibration.all_experts)

    @property
    def first_token_share(self) -> float:
        """How much the first token of a window counts in statistics; see :class:`InputStats`."""
        return self.recipe.calibration.first_token_share

    @property
    def gptq_options(self) -> GPTQOptions:
        g = self.recipe.gptq
        return GPTQOptions(g.block_size, g.damping, g.act_order, self.search)


def batched(windows: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """Stack windows of equal length ``[batch, positions]``; no padding, so no token is ever seen
    twice or masked."""
    by_length: dict[int, list[Tensor]] = {}
    for window in windows:
        by_length.setdefault(window.numel(), []).append(window)
    return [
        torch.stack(same[i : i + batch_size])
        for _, same in sorted(by_length.items(), reverse=True)
        for i in range(0, len(same), batch_size)
    ]
