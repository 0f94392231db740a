"""The rungs that are tried, from cheap to dear, and which of them need not be.

A rung is a recipe, or ``mixed:BITS``, for which widths are allocated first. Before the search each
is planned: what its weight files take, and which engines refuse it. A stage says how strong a
method is: a stronger one is expected to lose less at the same bits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import llmquant
from llmquant import Plan, Recipe
from llmquant.errors import (
    ArchitectureError,
    LayoutError,
    LlmquantError,
    RecipeError,
    SpecError,
    UsageError,
)
from llmquant_eval.auto.request import AutoRequest

LADDER = (
    "rtn-w4g128",
    "gptq-w4g128",
    "rotate-gptq-w4g128",
    "awq-w4g128",
    "gptq-w3g32",
    "gptq-w4g32-asym",
    "rotate-gptq-w4g32-asym",
    "awq-gptq-w4g32-asym",
    "best-w4g128",
    "rotate-best-w4g128",
    "best-w4g32-asym",
    "best-w3g128",
    "best-w2g32",
    "mixed:3.5",
    "mixed:5",
    "mixed:6",
    "qat-w4g128",
    "qat-w3g128",
    "qat-w2g32",
    "gptq-w8",
)
STRENGTH = {"rtn": 0, "awq": 1, "gptq": 1, "mixed": 2, "tune": 3, "qat": 4}
"""Of stages: the higher, the less is lost at the same bits. Equal ones are not compared."""
SUPPORTED, UNQUANTIZED = (2, 3, 4, 8), 16
"""Widths that an allocation chooses from."""
VLLM_WIDTHS = (4, 8)
"""What vLLM's GPU kernels take; the engine table of a plan has its CPU builds and transformers."""
_MIXED = re.compile(r"mixed:(\d+(?:\.\d+)?)")
_MIXED_FROM = "gptq-w4g128"


@dataclass(frozen=True, slots=True)
class Step:
    """A rung as it is known before it is tried.

    Attributes:
        name: as the user writes it.
        stage: one of :data:`STRENGTH`.
        recipe: with format and calibration; for ``mixed`` the one that allocation starts from.
        target: bits per weight to allocate; None otherwise.
        nbytes: of its weight files, by forecast; None where ``refused``.
        bits: per quantized weight.
        running: bytes of RAM that it needs to run.
        refused: why it is not tried.
    """

    name: str
    stage: str
    recipe: Recipe
    target: float | None = None
    nbytes: int | None = None
    bits: float | None = None
    running: int | None = None
    refused: str | None = None

    @property
    def folder(self) -> str:
        """A name for files: a recipe's path has slashes."""
        return re.sub(r"[^\w.-]+", "-", self.name).strip("-.") or "rung"

    def hopeless_after(self, failed: Step) -> bool:
        """Whether a candidate that lost too much says that this one will: it has more bits and a
        method that is no weaker, or as many bits and a stronger one."""
        if failed.bits is None or self.bits is None:
            return False
        stronger = STRENGTH[failed.stage] - STRENGTH[self.stage]
        more = failed.bits - self.bits
        return (more > 1e-9 and stronger >= 0) or (more > -1e-9 and stronger > 0)


def stage_of(recipe: Recipe) -> str:
    """The strongest thing that a recipe does."""
    if recipe.qat is not None:
        return "qat"
    if recipe.tune is not None:
        return "tune"
    if recipe.method == "gptq":
        return "gptq"
    return "rtn" if recipe.awq is None and recipe.smooth is None else "awq"


def make_ladder(request: AutoRequest, calibration: dict[str, object]) -> list[Step]:
    """Every rung with its forecast, in the order in which they are tried.

    Args:
        request: rungs, limits and format.
        calibration: changes of each recipe: source, windows and their length.

    Raises:
        UsageError: a rung that does not exist, is given twice, or of which none is possible.
        CheckpointError, ArchitectureError: the model cannot be quantized at all.
    """
    names = request.rungs or LADDER
    steps = [_planned(_step(name, request, calibration), request) for name in names]
    folders = [step.folder for step in steps]
    twice = next((n for n, f in zip(names, folders, strict=True) if folders.count(f) > 1), None)
    if twice is not None:
        raise UsageError(f"--rung {twice} is given twice, or another one has the same file name")
    return steps


def _step(name: str, request: AutoRequest, calibration: dict[str, object]) -> Step:
    mixed = _MIXED.fullmatch(name)
    try:
        recipe = llmquant.load_recipe(_MIXED_FROM if mixed else name)
    except RecipeError as e:
        raise RecipeError(f"--rung {name}: {e}; or mixed:BITS, such as mixed:5") from e
    changes = dict(calibration)
    if request.layout is not None:
        changes["format"] = request.layout
    if not recipe.needs_text:
        changes = {k: v for k, v in changes.items() if not k.startswith("calibration.")}
    recipe = recipe.updated(changes | _training(recipe, calibration))
    if mixed:
        return Step(name, "mixed", recipe, float(mixed[1]))
    return Step(name, stage_of(recipe), recipe)


def _training(recipe: Recipe, calibration: dict[str, object]) -> dict[str, object]:
    """What training must be told of a text: it is the calibration's, and no larger."""
    if recipe.qat is None:
        return {}
    windows, length = calibration["calibration.nsamples"], calibration["calibration.seqlen"]
    assert isinstance(windows, int)
    assert isinstance(length, int)
    heldout = min(recipe.qat.heldout, max(1, windows // 8))
    size = max(1, min(recipe.qat.batch_size, windows - heldout))
    return {
        "qat.source": calibration["calibration.source"],
        "qat.seqlen": min(recipe.qat.seqlen, length),
        "qat.heldout": heldout,
        "qat.batch_size": size,
        "qat.micro_batch": min(recipe.qat.micro_batch, size),
    }


def _planned(step: Step, request: AutoRequest) -> Step:
    """With its forecast, or why it is refused."""
    try:
        plan = llmquant.make_plan(request.model, step.recipe, "auto")
    except (ArchitectureError, LayoutError, SpecError, RecipeError) as e:
        asks_more = step.recipe.needs_text or step.recipe.rotation is not None
        if isinstance(e, ArchitectureError) and not asks_more:
            raise  # no other rung could be made either
        return replace(step, refused=f"cannot be made: {e}")
    nbytes, bits = _size(plan, step.target)
    dtype = llmquant.compute_dtype(request.model, request.dtype, request.device).dtype
    loaded = llmquant.loaded_bytes(plan, dtype) + nbytes - plan.bytes_on_disk
    running = llmquant.running_bytes(request.model, loaded, dtype=dtype)
    step = replace(step, nbytes=nbytes, bits=bits, running=running)
    return replace(step, refused=_why_not(step, plan, request))


def _size(plan: Plan, target: float | None) -> tuple[int, float]:
    """Bytes of the weight files and bits per weight; an allocation's are its budget."""
    if target is None:
        return plan.bytes_on_disk, plan.bits_per_weight
    packed = sum(m.nbytes for m in plan.modules)
    weights = 8 * packed / plan.bits_per_weight
    return round(plan.bytes_on_disk - packed + target * weights / 8), target


def _why_not(step: Step, plan: Plan, request: AutoRequest) -> str | None:
    assert step.nbytes is not None
    assert step.running is not None
    if request.max_bytes is not None and step.nbytes > request.max_bytes:
        return (
            f"{step.nbytes:,} bytes of weight files are more than --max-bytes {request.max_bytes:,}"
        )
    if request.fit is not None and step.running > request.fit:
        return f"{step.running:,} bytes to run with a whole context are more than --fit {request.fit:,}"
    if step.target is not None:
        return None  # allocation leaves out what the engine refuses
    reasons = list(plan.engines.get(request.engine, ()))
    if request.engine == "vllm" and (other := _widths(plan) - set(VLLM_WIDTHS)):
        reasons.append(f"its GPU kernels take 4 and 8 bits, not {', '.join(map(str, other))}")
    return f"{request.engine} refuses it: {'; '.join(reasons)}" if reasons else None


def _widths(plan: Plan) -> set[int]:
    return {module.scheme.spec.bits for module in plan.modules}


def expected(request: AutoRequest, steps: Sequence[Step]) -> dict[str, tuple[float, float]]:
    """Rung → KL and perplexity ratio that its recipe had on a measured model of this size; empty
    where none was measured."""
    try:
        default = llmquant.choose_recipe(request.model, steps[0].recipe.format)
    except LlmquantError:
        return {}
    costs = default.size_class.costs
    return {
        s.name: (costs[s.name].kl, costs[s.name].perplexity_ratio) for s in steps if s.name in costs
    }
