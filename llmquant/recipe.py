"""Recipe: everything needed to repeat a run, as YAML. Unknown keys are errors, so a typo cannot
change a result silently.

A recipe holds no torch objects: it is read by ``llmquant --help``-fast code and turned into the
algorithms' options where they are used. ``recipes/*.yaml`` can be named without folder or ending
(``--recipe gptq-w4g128``).
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from llmquant.errors import RecipeError, UsageError
from llmquant.recipe_sections import (
    AWQ,
    GPTQ,
    QAT,
    CalibrationOptions,
    Embeddings,
    Override,
    Rotation,
    Scales,
    Smooth,
    Strict,
    Tune,
    Weights,
)
from llmquant.runtime.yaml_files import read_yaml

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_SHIPPED = (Path(__file__).parent / "_recipes", Path(__file__).parent.parent / "recipes")


class Recipe(Strict):
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
    qat: QAT | None = None
    embeddings: Embeddings | None = None
    include: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ("lm_head",)
    calibration: CalibrationOptions = CalibrationOptions()
    format: str = "compressed-tensors"
    seed: int = Field(0, ge=0, le=2**63 - 1)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: object) -> object:
        """Null is what a key with nothing below it has in YAML."""
        if not isinstance(data, dict):
            return data
        if data.get("ignore", ()) is None:  # it could also mean that nothing is left out
            raise ValueError("nothing stands below ignore; write [] to quantize the head too")
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}

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
    def reads_text(self) -> bool:
        """Whether the result depends on a text: that of calibration, or that of training."""
        return self.needs_text or self.qat is not None

    @property
    def steps(self) -> str:
        """The method as the command line writes it: ``awq+gptq+tune``."""
        before = ("awq",) * (self.awq is not None) + ("smooth",) * (self.smooth is not None)
        after = ("tune",) * (self.tune is not None) + ("qat",) * (self.qat is not None)
        return "+".join((*before, self.method, *after))

    def weights_of(self, *names: str) -> Weights:
        """The grid of a linear: that of the first override whose pattern matches (one of) its full
        names, or the recipe's."""
        override = next(
            (o for o in self.overrides if any(matches(o.match, n) for n in names)), None
        )
        return self.weights if override is None else override.applied_to(self.weights)

    def giving(self, weights: Mapping[tuple[str, ...], Weights]) -> Recipe:
        """The recipe that gives linears (their names, the full one first → weights) exactly these,
        by overrides before its own ones where it gives others.

        An override is for all linears that differ in the numbers of blocks and experts alone;
        those that get something else than most of them have one by their full name.
        """
        changed = {names[0] for names, w in weights.items() if self.weights_of(*names) != w}
        if not changed:
            return self
        if not self.overrides and len(set(weights.values())) == 1:
            return self.updated({"weights": next(iter(weights.values())).model_dump()})
        kinds: dict[str, dict[str, Weights]] = {}
        for (name, *_), wanted in weights.items():
            kinds.setdefault(numberless(name), {})[name] = wanted
        single: list[Override] = []
        common: list[Override] = []
        for pattern, linears in kinds.items():
            if changed.isdisjoint(linears):
                continue
            most = Counter(linears.values()).most_common(1)[0][0]
            common.append(Override.between(pattern, self.weights, most))
            single += [
                Override.between(n, self.weights, w) for n, w in linears.items() if w != most
            ]
        overrides = (*single, *common, *self.overrides)
        return self.updated({"overrides": tuple(o.model_dump() for o in overrides)})

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

    def head_weights(self, *names: str) -> Weights | None:
        """The grid of a head that is a linear of its own, by its names; None where it stays as it
        is.

        A head that the patterns select has the grid of any linear, another one that of
        ``embeddings``.
        """
        if self.selects(*names):
            return self.weights_of(*names)
        wanted = self.embeddings
        return wanted.weights if wanted is not None and wanted.head else None

    def with_training_text(self) -> Recipe:
        """The same, its ``qat`` section with the calibration's text where it names none."""
        if self.qat is None or self.qat.source is not None:
            return self
        return self.updated({"qat.source": self.calibration.source})

    def to_yaml(self) -> str:
        """All that the recipe says. ``embeddings`` and ``qat`` are left out where there are none:
        earlier versions do not know the keys."""
        content = self.model_dump(mode="json")
        for later in ("embeddings", "qat"):
            if content[later] is None:
                del content[later]
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def sha256(self) -> str:
        """Of what the recipe says. What is off is left out, so that a later version's new sections
        and keys change no hash."""
        content = self.model_dump(mode="json", exclude_none=True)
        if not (self.needs_text and self.calibration.first_token_share):
            del content["calibration"]["first_token_share"]
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
                if not isinstance(place.get(part), dict):
                    place[part] = {}  # an optional section, or one that validation refuses
                place = place[part]
            place[last] = value
        return _validate(data, "the command line's options")


def matches(pattern: str, module: str) -> bool:
    """Shell-style match of a full module name; a pattern without wildcards also matches dotted name
    tails."""
    return fnmatch.fnmatchcase(module, pattern) or f".{module}".endswith(f".{pattern}")


def numberless(module: str) -> str:
    """A full module name with ``*`` for the numbers of its block and its expert: a pattern."""
    return _NUMBER.sub("*", module)


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
    if problem["type"] in ("model_type", "dict_type"):
        return f"it is {problem['input']!r:.60}, not a mapping of keys"
    return problem["msg"].removeprefix("Value error, ")


def _first(error: ValueError) -> str:
    return _said(error.errors()[0]) if isinstance(error, ValidationError) else str(error)


def shipped() -> dict[str, Path]:
    """Recipes that come with llmquant, by bare name."""
    return {p.stem: p for p in sorted(recipes_folder().glob("*.yaml"))}


def recipes_folder() -> Path:
    """Where the recipes are that come with llmquant, and what was measured of them."""
    return next((d for d in _SHIPPED if d.is_dir()), _SHIPPED[0])


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
