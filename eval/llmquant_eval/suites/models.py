"""The models of a suite, made ready: looked up, or quantized into the cache folder by their recipe.

A recipe's folder is named by the hash of everything that its bytes depend on: the base's weights
and tokenizer, the recipe with its calibration, the calibration text and the versions. The same
suite finds it again; a change makes a new one beside it. Commands in reports do not show the cache:
they say ``llmquant quantize … -o out/LABEL`` and then evaluate that folder, so that they repeat the
row anywhere.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmquant.errors import CheckpointError, UsageError
from llmquant_eval.models.endpoint import is_url
from llmquant_eval.report import machine
from llmquant_eval.suites.schema import Suite, SuiteCalibration, SuiteModel, slug
from llmquant_eval.texts.tokens import tokenizer_sha256

if TYPE_CHECKING:
    from llmquant import Recipe


# Keys of a recipe that by themselves need no calibration text.
_TEXT_FREE = frozenset(
    {
        "description",
        "method",
        "weights",
        "overrides",
        "scales",
        "gptq",
        "include",
        "ignore",
        "calibration",
        "format",
        "seed",
    }
)


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model as it is measured and as it is shown.

    ``source`` is what is evaluated; ``shown`` stands for it in commands; ``made_by`` is the command
    that makes ``shown``. ``weights``, ``tokenizer`` and ``recipe`` are sha256, None for a server,
    whose results are never taken from the cache; ``recipe`` also where a folder has no record of
    one.
    """

    label: str
    source: str
    shown: str
    made_by: str | None
    weights: str | None
    tokenizer: str | None
    recipe: str | None


def digest(value: Any) -> str:
    """Hex sha256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, ensure_ascii=False).encode()
    ).hexdigest()


def prepare_models(
    suite: Suite, cache: Path, advance: Callable[[str, int, int], None]
) -> tuple[PreparedModel | None, list[PreparedModel]]:
    """The reference and the models, every recipe's folder made; ``advance`` is called with (label,
    made, to make).

    Everything that can be refused without reading weights is refused before the first recipe runs.

    Raises:
        UsageError: a suite without models, a recipe without a base, a folder that is not there.
        CheckpointError, QuantizationError, …: what finding and quantizing a model raise.
    """
    models = suite.all_models()
    if not models:
        raise UsageError(
            "the suite has no models to measure; give models or recipes in it, or MODEL on the command line"
        )
    bases = {
        source: _base(source)
        for source in dict.fromkeys(_base_of(m, suite) for m in models if m.recipe is not None)
    }
    jobs = {
        m.label: _job(m, suite, bases[_base_of(m, suite)]) for m in models if m.recipe is not None
    }
    prepared = {m.label: _find(m.label, m.model, m.made_by) for m in models if m.model is not None}
    reference = None
    if suite.reference is not None:
        label = suite.reference_label or Path(suite.reference.rstrip("/")).name
        if label in {m.label for m in models}:
            raise UsageError(
                f"the reference and a model are both called {label}; give reference_label"
            )
        reference = _find(label, suite.reference, None)
    for done, (label, job) in enumerate(jobs.items()):
        advance(label, done, len(jobs))
        prepared[label] = job.run(cache, suite.device)
    if jobs:
        advance("recipes", len(jobs), len(jobs))
    return reference, [prepared[m.label] for m in models]


def _find(label: str, source: str, made_by: str | None) -> PreparedModel:
    import llmquant

    if is_url(source):
        return PreparedModel(label, source, source, made_by, None, None, None)
    try:
        return _known(label, llmquant.resolve(source), source, source, made_by)
    except (CheckpointError, UsageError) as e:
        raise type(e)(f"{label}: {e}" + (f"; it is made by: {made_by}" if made_by else "")) from e


def _known(label: str, path: Path, source: str, shown: str, made_by: str | None) -> PreparedModel:
    import llmquant

    found = llmquant.inspect(path)
    tokenizer = tokenizer_sha256(llmquant.load_tokenizer(path))
    return PreparedModel(
        *(label, source, shown, made_by), found.weights_sha256, tokenizer, found.recipe_sha256
    )


@dataclass(frozen=True, slots=True)
class _RecipeJob:
    """One recipe to apply. ``calibration`` is what the suite laid over the recipe, None where it
    needs no text."""

    model: SuiteModel
    base: PreparedModel
    recipe: Recipe
    calibration: SuiteCalibration | None

    def run(self, cache: Path, device: str) -> PreparedModel:
        import llmquant

        folder = cache / "models" / f"{slug(self.model.label)}-{self._key()[:12]}"
        if not (folder / "config.json").is_file():
            folder.parent.mkdir(parents=True, exist_ok=True)
            # A suite has no --restart, so it keeps no half-made model that another thread count
            # could not continue.
            options = llmquant.QuantizeOptions(
                device=device, base_model=self.base.source, resume=False
            )
            llmquant.quantize(self.base.source, folder, self.recipe, options)
        shown = f"out/{slug(self.model.label)}"
        return _known(self.model.label, folder, str(folder), shown, self._command(shown))

    def _key(self) -> str:
        import llmquant

        read = (
            None
            if self.calibration is None
            else llmquant.read_documents(self.calibration.source).sha256
        )
        return digest(
            [self.base.weights, self.base.tokenizer, self.recipe.sha256(), read, machine.versions()]
        )

    def _command(self, output: str) -> str:
        words = [
            "llmquant",
            "quantize",
            self.base.source,
            "-o",
            output,
            "--recipe",
            str(self.model.recipe),
        ]
        if self.calibration is not None:
            words += ["--calibration", self.calibration.source]
            for option in ("nsamples", "seqlen"):
                value = getattr(self.calibration, option)
                words += [] if value is None else [f"--{option}", str(value)]
        return shlex.join(words)


def _base_of(model: SuiteModel, suite: Suite) -> str:
    base = model.base or suite.reference
    if base is None:
        raise UsageError(
            f"{model.label}: a recipe needs a model to work on; give base, or the suite's reference (--reference)"
        )
    if is_url(base):
        raise UsageError(
            f"{model.label}: {base} is a server, which a recipe cannot be applied to; give a folder as base"
        )
    return base


def _base(source: str) -> PreparedModel:
    """Looked up and hashed once, however many recipes work on it."""
    return _find(source, source, None)


def suite_recipe(model: SuiteModel, suite: Suite) -> Recipe:
    """The recipe of a suite's model with the suite's calibration laid over it.

    Raises:
        RecipeError: no such recipe, or one that cannot be.
    """
    import llmquant

    recipe = llmquant.load_recipe(str(model.recipe))
    if suite.calibration is None or _blind(recipe):
        return recipe
    given = suite.calibration.model_dump(exclude_none=True)
    return recipe.updated({f"calibration.{key}": value for key, value in given.items()})


def _blind(recipe: Recipe) -> bool:
    """Round-to-nearest looks at no text, unless its scales are weighted by it or a key beyond the
    grid's asks for more."""
    beyond = recipe.model_dump(exclude_defaults=True).keys() - _TEXT_FREE
    return recipe.method == "rtn" and not recipe.scales.weighted and not beyond


def _job(model: SuiteModel, suite: Suite, base: PreparedModel) -> _RecipeJob:
    recipe = suite_recipe(model, suite)
    return _RecipeJob(model, base, recipe, None if _blind(recipe) else suite.calibration)
