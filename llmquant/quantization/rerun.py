"""Repeat a run from what its folder records, and compare: is this checkpoint what its recipe gives?

The recipe, the seed and the dtype come from the folder; the original model, and the calibration
text where its path has changed, from the caller. Both are checked against the recorded hashes
*before* the work, so that a difference in the result cannot come from another input. What may still
differ is the software and the number of threads (floating-point sums are ordered by both); those
are named beside the verdict.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from llmquant.checkpoint.hub import resolve
from llmquant.checkpoint.manifest import Manifest, read_manifest, versions
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ProofError, UnfitModelError, UsageError
from llmquant.models.reading.stored_dtype import SOURCE
from llmquant.quantization.options import Events, QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe, load_recipe

Run = Callable[[Path, Path, Recipe, QuantizeOptions, Events | None], object]


@dataclass(frozen=True, slots=True)
class Comparison:
    """A run and its repetition.

    Attributes:
        files: names of hashed files with other bytes.
        modules: linears whose numbers differ.
        circumstances: what differs around the run, as ``"torch 2.12.0 then, 2.13.0 now"``.
    """

    files: tuple[str, ...]
    modules: tuple[str, ...]
    circumstances: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not self.files and not self.modules


def recorded_recipe(folder: Path, manifest: Manifest) -> Recipe:
    """The recipe that a run wrote into its folder.

    One from before ``calibration.first_token_share`` does not name it, and in that run it was off:
    the manifest's hash tells.

    Raises:
        RecipeError: as :func:`llmquant.load_recipe`.
    """
    recipe = load_recipe(folder / "recipe.yaml")
    off = recipe.updated({"calibration.first_token_share": 0.0})
    before = recipe.sha256() != manifest.recipe_sha256 == off.sha256()
    return off if before else recipe


def rerun(
    folder: str | os.PathLike[str],
    model: str | os.PathLike[str] | None = None,
    *,
    calibration: str | None = None,
    device: str | None = None,
    max_shard_size: int = 5_000_000_000,
    events: Events | None = None,
    run: Run = quantize,
) -> Comparison:
    """Quantize again, beside ``folder`` and for the length of the call, and compare every file and
    every linear.

    Args:
        folder: written by ``llmquant quantize``.
        model: the original; default: the name that the manifest gives.
        calibration: its calibration text, if it is not where the recipe says.
        device: default: the recorded one.
        max_shard_size: as in the first run.
        events: callbacks of the run.
        run: what repeats it.

    Raises:
        UsageError: the folder was converted or has no recipe, or the model or the text is not the
            recorded one.
    """
    folder = Path(folder)
    then = read_manifest(folder)
    if then.conversions or then.recipe_sha256 is None or not (folder / "recipe.yaml").is_file():
        raise UsageError(
            f"{folder} was not written by a run of quantize (it is a conversion); rerun the folder it came from"
        )
    recipe = recorded_recipe(folder, then)
    if calibration is not None:
        if recipe.calibration.source is None:
            raise UsageError(
                f"{folder} was made without a calibration text; leave --calibration out"
            )
        recipe = recipe.updated({"calibration.source": calibration})
    source = _original(folder, then, model)
    options = QuantizeOptions(
        device=device or then.device,
        dtype=then.dtype,
        store_dtype=then.store_dtype or SOURCE,
        max_shard_size=max_shard_size,
        base_model=then.base_model,
        resume=False,
    )
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.rerun-", dir=folder.resolve().parent
    ) as scratch:
        run(source, Path(scratch) / folder.name, recipe, options, events)
        now = read_manifest(Path(scratch) / folder.name)
    _same_text(folder, then, now)
    same = calibration is not None or then.recipe_sha256 == now.recipe_sha256  # in other words too
    return _compare(then, now, ignore=("recipe.yaml",) if same else ())


def _original(folder: Path, then: Manifest, model: str | os.PathLike[str] | None) -> Path:
    """The folder of the model that ``folder`` was made from."""
    try:
        source = resolve(then.base_model or "" if model is None else model)
    except (UsageError, UnfitModelError) as e:
        if model is not None:
            raise
        raise UsageError(
            f"{folder} was made from {then.base_model or 'a model without a name'}, which is not found by that name; "
            "give that model with --model"
        ) from e
    if CheckpointReader(source).digest() != then.base_weights_sha256:
        raise UsageError(
            f"{source} does not hold the weights that {folder} was made from; give that model with --model"
        )
    return source


def _same_text(folder: Path, then: Manifest, now: Manifest) -> None:
    if then.calibration is not None and now.calibration is not None:
        key = "ids_sha256"
        if then.calibration.get(key) != now.calibration.get(key):
            raise UsageError(
                f"the calibration windows are not those {folder} was made with; give its text with --calibration"
            )


def _compare(then: Manifest, now: Manifest, ignore: tuple[str, ...]) -> Comparison:
    names = sorted((then.files.keys() | now.files.keys()) - set(ignore))
    linears = sorted(then.modules.keys() | now.modules.keys())
    digests = [{n: m.digest for n, m in run.modules.items()} for run in (then, now)]
    return Comparison(
        files=tuple(n for n in names if then.files.get(n) != now.files.get(n)),
        modules=tuple(n for n in linears if digests[0].get(n) != digests[1].get(n)),
        circumstances=tuple(_circumstances(then)),
    )


def _circumstances(then: Manifest) -> list[str]:
    here = versions()
    differences = [
        f"{n} {v} then, {here.get(n, 'none')} now"
        for n, v in then.versions.items()
        if here.get(n) != v
    ]
    if then.threads != torch.get_num_threads():
        differences.append(f"{then.threads} threads then, {torch.get_num_threads()} now")
    if then.processes != 1:
        differences.append(f"{then.processes} processes then, 1 now")
    return differences


def demand_same(folder: Path, comparison: Comparison) -> None:
    """Raises ProofError for a comparison that found a difference; it names the first few."""
    if comparison.same:
        return
    parts = [f"files {_some(comparison.files)}"] if comparison.files else []
    parts += [f"linears {_some(comparison.modules)}"] if comparison.modules else []
    around = "; ".join(comparison.circumstances)
    circumstances = (
        f" (also different: {around})"
        if around
        else "; versions and thread count are the recorded ones"
    )
    raise ProofError(
        f"the rerun did not reproduce {folder}: {', '.join(parts)} differ{circumstances}"
    )


def _some(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
