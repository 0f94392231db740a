"""What a walk is given and what it hands out; see :mod:`llmquant.quantization.walk`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmquant.algorithms import AWQOptions, GPTQOptions, ScaleSearch, TuneOptions
from llmquant.formats import layout_of
from llmquant.models.architectures import Architecture
from llmquant.quantization.steps.channel_scaling import PairReport
from llmquant.quantization.steps.rescaling import RescaledReader
from llmquant.quantization.steps.smoothquant import SmoothOptions
from llmquant.quantization.steps.tuning import TuneReport
from llmquant.recipe import Recipe
from llmquant.runtime.distributed import ALONE, World
from llmquant.spec import QuantSpec
from llmquant.weight import QuantizedWeight


@dataclass(frozen=True, slots=True)
class ModuleReport:
    """What happened to one linear.

    Attributes:
        name: full module name.
        spec: its grid.
        digest: :meth:`QuantizedWeight.digest` as the algorithm returned it.
        weight_error: ``|W - Q|^2 / |W|^2``.
        output_error: relative output error on the calibration inputs; None for a data-free method,
            and for a tuned block, whose error is measured as a whole.
        damping: GPTQ's damping as finally used; larger than the recipe's when Cholesky failed.
        dead: input channels that were zero for every calibration token.
        tokens: calibration tokens seen.
        dropped: tokens left out for NaN or Inf.
        seconds: time spent rounding; not part of the manifest.
        peak: the most bytes that this process had in RAM up to then; likewise.
        fallback: why the recipe's method was not used and the weight rounded to nearest instead,
            else None.
        coarse: scales so small that fp16 has fewer than five bits for them; not part of the
            manifest.
        wide: scales that only a wider dtype than fp16 holds; likewise.
    """

    name: str
    spec: QuantSpec
    digest: str
    weight_error: float
    output_error: float | None = None
    damping: float | None = None
    dead: int = 0
    tokens: int = 0
    dropped: int = 0
    seconds: float = 0.0
    peak: int = 0
    fallback: str | None = None
    coarse: int = 0
    wide: int = 0


@dataclass(frozen=True, slots=True)
class BlockResult:
    """The quantized linears of one decoder block (``index`` None: of the head), by full name; what
    tuning it did.

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
    """Where the walk is: ``block`` of ``blocks`` (the head counts as one), and the module being
    worked on."""

    block: int
    blocks: int
    module: str


@dataclass(frozen=True, slots=True)
class WalkPlan:
    """What to walk: the meta model, where its tensors are, and the spec of every linear to
    quantize, by full name.

    Of several processes in a ``world`` each walks with its share of the calibration batches; all
    hand out the same results.
    """

    model: PreTrainedModel
    architecture: Architecture
    reader: RescaledReader
    specs: Mapping[str, QuantSpec]
    recipe: Recipe
    device: torch.device
    dtype: torch.dtype
    head: str | None = None
    world: World = ALONE

    @property
    def search(self) -> ScaleSearch:
        s = self.recipe.scales
        lowest = layout_of(self.recipe.format).lowest_zero
        return ScaleSearch(s.steps, s.smallest, s.norm, s.weighted, lowest)

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
