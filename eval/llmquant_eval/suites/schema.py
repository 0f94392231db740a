"""Suites: which models are measured on which texts by which protocols, as YAML.

A suite names models with labels. Each is a folder, a hub name, a server, or a recipe that is
applied to ``base`` (the reference, if left out) on the way. Paths are relative to the current
directory, as on the command line. Unknown keys are errors. ``quick`` and ``standard`` come with the
package and take the reference from the command line. A name in ``recipes`` may be a pattern over
the shipped ones (``"*"``, ``"gptq-*"``).

    description: what it is for
    reference: examples/tiny-llama
    recipes: [rtn-w4g128, gptq-w4g128]   # short for models with the recipe's name as label
    models:
      - {label: another tool 1.2, model: out/other, made_by: "other-tool --w4 …"}
      - {label: coarse, recipe: my-recipe.yaml, base: some/model}
    calibration: {source: "file:calibration.txt", nsamples: 64, seqlen: 512}
    texts:
      - {name: heldout, source: "file:heldout.txt", max_windows: 120}
    protocols: [ppl/gptq-512]
    outputs: {results: results, markdown: LEADERBOARD.md, html: leaderboard.html, plots: plots}
"""

from __future__ import annotations

import re
from collections.abc import Collection
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import llmquant
from llmquant.errors import UsageError

FOLDER = Path(__file__).parent / "shipped"
LONGEST_LABEL = 100


class _Strict(BaseModel):
    """Unknown keys are errors; a key whose value is null, or left out below it, is not given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        return {k: v for k, v in data.items() if v is not None or k not in cls.model_fields}


class SuiteModel(_Strict):
    """``model`` is there already, ``recipe`` is applied to ``base``. ``made_by`` is the command
    that made ``model``, to show."""

    label: str = Field(min_length=1, max_length=LONGEST_LABEL)
    model: str | None = None
    recipe: str | None = None
    base: str | None = None
    made_by: str | None = None

    @field_validator("label")
    @classmethod
    def _printable(cls, label: str) -> str:
        if not label.isprintable() or not label.strip():
            raise ValueError(f"a label is one line of printable text, and {label!r} is not")
        return label

    @model_validator(mode="after")
    def _one_origin(self) -> SuiteModel:
        if (self.model is None) == (self.recipe is None):
            raise ValueError(f"{self.label}: give either model or recipe")
        if self.model is not None and self.base is not None:
            raise ValueError(f"{self.label}: base belongs to recipe; leave it out beside model")
        if self.recipe is not None and self.made_by is not None:
            raise ValueError(
                f"{self.label}: made_by belongs to model; leave it out, the command of a recipe is known"
            )
        return self


class SuiteCalibration(_Strict):
    """What the suite's recipes are calibrated on; what is not given is as in the recipe."""

    source: str
    nsamples: int | None = Field(None, ge=1)
    seqlen: int | None = Field(None, ge=8)


class SuiteText(_Strict):
    """An evaluation text; ``name`` goes into file names. Fewer windows than there are make a
    partial run."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    source: str
    max_windows: int | None = Field(None, ge=1)


class SuiteTasks(_Strict):
    """lm-eval tasks, named as for ``--tasks``; ``include_path`` and ``limit`` are those options."""

    names: tuple[str, ...] = Field(min_length=1)
    include_path: str | None = None
    limit: int | None = Field(None, ge=1)


class Outputs(_Strict):
    """Where things go; ``results`` gets one report per model and protocol, the others are rendered
    from that folder."""

    results: str
    markdown: str | None = None
    html: str | None = None
    plots: str | None = None


class Suite(_Strict):
    """One suite; the module text describes its keys."""

    description: str = ""
    reference: str | None = None
    reference_label: str | None = None
    models: tuple[SuiteModel, ...] = ()
    recipes: tuple[str, ...] = ()
    calibration: SuiteCalibration | None = None
    texts: tuple[SuiteText, ...] = ()
    protocols: tuple[str, ...] = ()
    tasks: SuiteTasks | None = None
    dtype: str = "auto"
    device: str = "auto"
    kernel: str = "auto"
    threads: int | None = Field(None, ge=1)
    batch_size: int | None = Field(None, ge=1)
    cost: bool = True
    noise_floor: bool = True
    cache_form: str | None = None
    outputs: Outputs | None = None

    @field_validator("recipes")
    @classmethod
    def _patterns(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        """Replaces each pattern by the shipped recipes that it matches."""
        return tuple(name for entry in names for name in _matching(entry))

    @field_validator("protocols")
    @classmethod
    def _one_each(cls, protocols: tuple[str, ...]) -> tuple[str, ...]:
        if any("," in p for p in protocols):
            raise ValueError("write one protocol per list entry, without commas")
        return protocols

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        if not self.texts and self.tasks is None:
            raise ValueError("there is nothing to measure: give texts, tasks or both")
        if bool(self.texts) != bool(self.protocols):
            raise ValueError("texts and protocols need each other; give both or neither")
        labels, texts = [m.label for m in self.all_models()], [t.name for t in self.texts]
        slugs = [slug(label) for label in labels]
        for what, names, written in (
            ("label", labels, slugs),
            ("text", texts, texts),
            ("protocol", self.protocols, self.protocols),
        ):
            twice = next(
                (n for n, w in zip(names, written, strict=True) if written.count(w) > 1), None
            )
            if twice is not None:
                raise ValueError(
                    f"the {what} {twice!r} is given twice; file names are made of them, so each must be another"
                )
        return self

    def all_models(self) -> tuple[SuiteModel, ...]:
        """The models in order: recipes, each labelled by its name, then ``models``."""
        return (
            *(SuiteModel(label=Path(name).stem, recipe=name) for name in self.recipes),
            *self.models,
        )

    def only(self, labels: Collection[str]) -> Suite:
        """A copy with the models of these labels alone."""
        return self.model_copy(
            update={
                "recipes": (),
                "models": tuple(m for m in self.all_models() if m.label in labels),
            }
        )

    def changed(self, **changes: object) -> Suite:
        """A copy with keys replaced, validated anew; None leaves a key as it is.

        Raises:
            UsageError: the values cannot be.
        """
        given = {key: value for key, value in changes.items() if value is not None}
        return _validate({**self.model_dump(), **given}, "the command line's options")


def _matching(entry: str) -> list[str]:
    if not set(entry) & set("*?["):
        return [entry]
    names = [name for name in llmquant.shipped_recipes() if fnmatchcase(name, entry)]
    if not names:
        raise ValueError(f"no shipped recipe matches {entry!r}; `llmquant recipes` lists them")
    return names


def slug(label: str) -> str:
    """A label as a file name: letters, digits, dots and dashes."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-.").lower() or "model"


def file_name(label: str, text: str | None, protocol: str) -> str:
    """Of a report: model, text and protocol, or model and ``tasks``."""
    parts = [slug(label), "tasks"] if text is None else [slug(label), text, slug(protocol)]
    return "--".join(parts) + ".json"


def shipped_suites() -> dict[str, Path]:
    """Suites that come with the package, by name."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_suite(name_or_path: str) -> Suite:
    """Read a suite from a file, or by the name of a shipped one.

    Raises:
        UsageError: no such suite, not YAML, or values that cannot be; says where.
    """
    path = Path(name_or_path)
    if not path.is_file():
        known = shipped_suites()
        if name_or_path not in known:
            raise UsageError(
                f"--suite {name_or_path} is no file and no suite of llmquant's own ({', '.join(known)}); "
                "give a YAML file or one of these names"
            )
        path = known[name_or_path]
    data = llmquant.read_yaml(path)
    return _validate(data if data is not None else {}, str(path))


def _validate(data: object, origin: str) -> Suite:
    try:
        return Suite.model_validate(data)
    except ValidationError as e:
        problems = "; ".join(
            f"{'.'.join(map(str, p['loc'])) or 'suite'}: {_problem(p['type'], p['msg'])}"
            for p in e.errors()
        )
        raise UsageError(f"{origin}: {problems}") from e


def _problem(kind: str, message: str) -> str:
    return (
        "there is no such key"
        if kind == "extra_forbidden"
        else message.removeprefix("Value error, ")
    )
