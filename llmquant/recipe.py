"""Recipe: everything needed to repeat a run, as YAML. Unknown keys are errors, so a typo cannot
change a result silently.

A recipe holds no torch objects: it is read by ``llmquant --help``-fast code and turned into the
algorithms' options where they are used. ``recipes/*.yaml`` can be named without folder or ending
(``--recipe gptq-w4g128``).
"""

from __future__ import annotations

import fnmatch
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from llmquant.errors import RecipeError, UsageError
from llmquant.runtime.yaml_files import read_yaml
from llmquant.spec import QuantSpec

_SHIPPED = (Path(__file__).parent / "_recipes", Path(__file__).parent.parent / "recipes")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Weights(_Strict):
    """The grid. ``group_size: -1`` is one group per row; ``activations: int8-dynamic`` tells
    engines to quantize inputs too."""

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    activations: Literal["none", "int8-dynamic"] = "none"

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(
            self.bits, None if self.group_size == -1 else self.group_size, self.symmetric
        )

    @model_validator(mode="after")
    def _possible(self) -> Weights:
        _ = self.spec  # raises SpecError, a ValueError, which pydantic reports with its place
        return self


class Override(_Strict):
    """Other weights for the linears that ``match``; what is not given is as in ``Recipe.weights``.
    The first match counts."""

    match: str = Field(min_length=1)
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    activations: Literal["none", "int8-dynamic"] | None = None

    def applied_to(self, weights: Weights) -> Weights:
        changes = self.model_dump(exclude={"match"}, exclude_none=True)
        return Weights.model_validate({**weights.model_dump(), **changes})


class Scales(_Strict):
    """Scale search; see :class:`llmquant.algorithms.scale_search.ScaleSearch`. ``steps: 0`` is
    plain min-max."""

    steps: int = Field(48, ge=0, le=1000)
    smallest: float = Field(0.35, gt=0, le=1)
    norm: float = Field(2.0, gt=0, allow_inf_nan=False)
    weighted: bool = False


class GPTQ(_Strict):
    """See :class:`llmquant.algorithms.gptq.GPTQOptions`."""

    block_size: int = Field(128, ge=1)
    damping: float = Field(0.01, gt=0, le=1)
    act_order: Literal["static", "off", "group"] = "static"
    true_sequential: bool = True
    asymmetric: float = Field(0.0, ge=0, le=1)
    passes: int = Field(0, ge=0, le=100)

    @field_validator("act_order", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # what YAML makes of a bare word off


class Tune(_Strict):
    """Moves codes and scales of a whole block together; see
    :class:`llmquant.algorithms.block_tuning.TuneOptions`.

    ``batch_size`` is in calibration windows, and replaces ``calibration.batch_size`` for the whole
    run.
    """

    steps: int = Field(200, ge=1)
    lr: float = Field(0.002, gt=0, le=1)
    scale_lr: float = Field(0.001, ge=0, le=1)
    batch_size: int = Field(4, ge=1)
    checks: int = Field(4, ge=1)
    patience: int = Field(2, ge=1)
    target: Literal["original", "block"] = "original"


class AWQ(_Strict):
    """Scales input channels before rounding and folds the inverse into what comes before; see
    :mod:`llmquant.algorithms.awq`."""

    grid: int = Field(20, ge=1, le=1000)
    duo_scaling: Literal["both", "on", "off"] = "both"
    steps: int = Field(16, ge=0, le=1000)

    @field_validator("duo_scaling", mode="before")
    @classmethod
    def _word(cls, value: object) -> object:
        return (
            {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value
        )  # YAML's bare on and off


class Smooth(_Strict):
    """SmoothQuant: moves large activations into the weights before 8-bit rounding of both; see
    :mod:`llmquant.quantization.steps.smoothquant`.

    ``alpha: auto`` tries 0.1 … 0.9 at each place. ``pairs: norms`` folds into norms only, ``all``
    also from linear to linear.
    """

    alpha: Annotated[float, Field(ge=0, le=1)] | Literal["auto"] = 0.5
    pairs: Literal["norms", "all"] = "norms"


class Rotation(_Strict):
    """Rotates the model before anything else, without changing what it computes; see
    :mod:`llmquant.models.rotated`."""

    residual: Literal["hadamard", "random", "off"] = "hadamard"
    heads: bool = True
    seed: int = Field(0, ge=0, le=2**63 - 2)

    @field_validator("residual", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        return "off" if value is False else value  # what YAML makes of a bare word off

    @model_validator(mode="after")
    def _something(self) -> Rotation:
        if self.residual == "off" and not self.heads:
            raise ValueError("residual: off and heads: false rotate nothing; leave the section out")
        return self


class CalibrationOptions(_Strict):
    """Which text is shown to the model: ``nsamples`` windows of ``seqlen`` tokens of ``source``.

    ``all_experts`` shows every token to every expert of a mixture while statistics are taken, not
    only the routed ones.
    """

    source: str | None = None
    nsamples: int = Field(128, ge=1)
    seqlen: int = Field(2048, ge=8)
    packing: Literal["concat", "sample"] = "concat"
    batch_size: int = Field(8, ge=1)
    all_experts: bool | None = None

    @field_validator("all_experts")
    @classmethod
    def _off_is_unset(cls, value: bool | None) -> bool | None:
        return value or None  # a recipe that says no is one that says nothing, also in its hash


class Recipe(_Strict):
    """One quantization run. The same recipe, model, seed and versions give the same bytes."""

    description: str = ""
    method: Literal["rtn", "gptq"] = "gptq"
    weights: Weights = Weights()
    overrides: tuple[Override, ...] = ()
    scales: Scales = Scales()
    gptq: GPTQ = GPTQ()
    rotation: Rotation | None = None
    awq: AWQ | None = None
    smooth: Smooth | None = None
    tune: Tune | None = None
    include: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ("lm_head",)
    calibration: CalibrationOptions = CalibrationOptions()
    format: str = "compressed-tensors"
    seed: int = Field(0, ge=0, le=2**63 - 1)

    @field_validator("include", "ignore")
    @classmethod
    def _no_empty_pattern(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        if any(not p for p in patterns):
            raise ValueError("a module pattern is empty")
        return patterns

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        everything = [self.weights]
        for i, override in enumerate(self.overrides):
            try:
                everything.append(override.applied_to(self.weights))
            except ValueError as e:
                raise ValueError(f"overrides.{i}: {_first(e)}") from e
        if (
            self.method == "gptq"
            and self.gptq.act_order == "group"
            and any(w.group_size == -1 for w in everything)
        ):
            raise ValueError(
                "gptq.act_order: group needs a group size; with one group per row use static"
            )
        if self.smooth is not None and self.awq is not None:
            raise ValueError("awq and smooth both scale the same channels; switch one of them off")
        if self.smooth is not None and all(w.activations == "none" for w in everything):
            raise ValueError(
                "smooth is for quantized activations, and no linear has any; set weights.activations: int8-dynamic"
            )
        return self

    @property
    def asymmetric(self) -> bool:
        """Whether GPTQ aims at what the original's inputs give."""
        return self.method == "gptq" and self.gptq.asymmetric > 0

    @property
    def needs_text(self) -> bool:
        """Whether the model has to be run on a calibration text."""
        return self.method != "rtn" or any(
            s is not None for s in (self.tune, self.awq, self.smooth)
        )

    @property
    def steps(self) -> str:
        """The method as the command line writes it: ``awq+gptq+tune``."""
        before = ("awq",) * (self.awq is not None) + ("smooth",) * (self.smooth is not None)
        return "+".join((*before, self.method, *("tune",) * (self.tune is not None)))

    def weights_of(self, *names: str) -> Weights:
        """The grid of a linear: that of the first override whose pattern matches (one of) its full
        names, or the recipe's."""
        override = next(
            (o for o in self.overrides if any(matches(o.match, n) for n in names)), None
        )
        return self.weights if override is None else override.applied_to(self.weights)

    def selects(self, *names: str) -> bool:
        """Whether a linear's full name matches ``include`` and not ``ignore`` (shell patterns, or
        part of the name's tail).

        One that goes by several names is included by any of them, and ignored by any.
        """
        included, ignored = (
            any(matches(p, n) for p in patterns for n in names)
            for patterns in (self.include, self.ignore)
        )
        return included and not ignored

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """Of what the recipe says. A section that is off is left out, so that a later version's new
        ones change no hash."""
        content = self.model_dump(mode="json", exclude_none=True)
        return hashlib.sha256(
            yaml.safe_dump(content, sort_keys=False, allow_unicode=True).encode()
        ).hexdigest()

    def updated(self, changes: dict[str, Any]) -> Recipe:
        """A copy with dotted keys replaced (``{"weights.bits": 3}``), validated anew.

        Raises:
            RecipeError: an unknown key or an impossible value.
        """
        data = self.model_dump()
        for key, value in changes.items():
            *path, last = key.split(".")
            place = data
            for part in path:
                if place[part] is None:  # an optional section that the recipe leaves out
                    place[part] = {}
                place = place[part]
            place[last] = value
        return _validate(data, "the command line's options")


def matches(pattern: str, module: str) -> bool:
    """Shell-style match of a full module name; a pattern without wildcards also matches dotted name
    tails."""
    return (
        fnmatch.fnmatchcase(module, pattern) or module == pattern or module.endswith(f".{pattern}")
    )


def _validate(data: object, origin: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc'])) or 'recipe'}: {_said(p)}" for p in e.errors()
        )
        raise RecipeError(f"{origin}: {problems}") from e


def _said(problem: ErrorDetails) -> str:
    if problem["type"] == "extra_forbidden":
        return "there is no such key"
    return problem["msg"].removeprefix("Value error, ")


def _first(error: ValueError) -> str:
    return _said(error.errors()[0]) if isinstance(error, ValidationError) else str(error)


def shipped() -> dict[str, Path]:
    """Recipes that come with llmquant, by bare name."""
    folder = next((d for d in _SHIPPED if d.is_dir()), None)
    return {} if folder is None else {p.stem: p for p in sorted(folder.glob("*.yaml"))}


def shipped_recipes() -> tuple[str, ...]:
    """The bare names of the recipes that come with llmquant."""
    return tuple(shipped())


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a recipe from a file, or by the bare name of a shipped one.

    Raises:
        RecipeError: no such recipe, not YAML, or values that do not validate; says where.
    """
    path = Path(name_or_path)
    if not path.is_file():
        known = shipped()
        if str(name_or_path) not in known:
            raise RecipeError(
                f"no recipe {str(name_or_path)!r}: not a file, and the shipped ones are {', '.join(known)}"
            )
        path = known[str(name_or_path)]
    try:
        data = read_yaml(path)
    except UsageError as e:
        raise RecipeError(str(e)) from e
    return _validate(data if data is not None else {}, str(path))
