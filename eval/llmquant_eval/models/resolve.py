"""The models that the user named: folders and hub names, dense or packed, through llmquant's public
API, and running servers.

The reference and the candidates are loaded at the *same* dtype and scored by the same code, so that
a difference between them is the quantization's. What ``auto`` means is llmquant's to say
(``llmquant.compute_dtype``): on a CPU the faster of bfloat16 and float32, elsewhere the first
model's own. ``--dtype float32`` takes the rounding of activations out of the comparison everywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmquant.errors import UsageError
from llmquant_eval.models.endpoint import Contact, Endpoint, is_url


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A model as the user named it, where it lies, and the short unique name it goes by in
    tables."""

    source: str
    path: Path
    label: str


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel:
    """A model that another process serves."""

    source: str
    endpoint: Endpoint
    label: str


AnyModel = ModelFolder | ServedModel


def resolve_models(sources: Sequence[str], contact: Contact | None = None) -> list[AnyModel]:
    """Find every model and give each a short name: the folder's, or the whole source where two
    would be the same.

    Args:
        sources: as the user named them.
        contact: how servers are dealt with.

    Raises:
        UsageError: the same model twice, or one that a server does not have.
        CheckpointError: one that is not a model.
        LlmquantError: a server that does not answer.
    """
    import llmquant

    models: list[Path | Endpoint] = [
        Endpoint(s, contact) if is_url(s) else llmquant.resolve(s) for s in sources
    ]
    places = [m.resolve() if isinstance(m, Path) else (m.url, m.model) for m in models]
    twice = [s for i, s in enumerate(sources) if places[i] in places[:i]]
    if twice:
        raise UsageError(f"{twice[0]} is given twice; name each model once")
    names = [
        source.rstrip("/").rsplit("/", 1)[-1]
        if isinstance(model, Path)
        else f"{model.model.rsplit('/', 1)[-1]} (served)"
        for source, model in zip(sources, models, strict=True)
    ]
    seen = Counter(names)
    labels = [
        name if seen[name] == 1 else source for source, name in zip(sources, names, strict=True)
    ]
    return [
        ModelFolder(source, model, label)
        if isinstance(model, Path)
        else ServedModel(source, model, label)
        for source, model, label in zip(sources, models, labels, strict=True)
    ]


def other_dtype(dtype: str) -> str:
    """The dtype whose rounding sets the noise floor: float32 for the short ones, bfloat16 for
    float32."""
    return "bfloat16" if dtype == "float32" else "float32"


def load_model(path: Path, dtype: str, device: str, kernel: str) -> Any:
    """A model ready to score: loaded, on its device, in evaluation mode; an ONNX export in ONNX
    Runtime, whatever the dtype, device and kernel of the others."""
    import llmquant

    if llmquant.is_onnx(path):
        return llmquant.OnnxModel(path)
    return llmquant.load(path, dtype=dtype, device=device, kernel=kernel)


def max_positions(path: Path) -> int | None:
    """The longest input the model was made for, in tokens, or None where its config does not say.

    Raises:
        CheckpointError, ArchitectureError: the folder has no config that transformers can read.
    """
    import llmquant

    return llmquant.context_length(llmquant.read_config(path))


def vocabulary_size(path: Path) -> int:
    """Tokens that the model's config gives its logits; raises as :func:`max_positions`."""
    import llmquant

    return int(llmquant.read_config(path).get_text_config().vocab_size)


def kernels_used(model: Any) -> dict[str, int]:
    """Kernel name → how many linears it multiplies; empty for a dense model."""
    import llmquant

    if isinstance(model, llmquant.OnnxModel):
        return model.kernels
    return dict(llmquant.describe(model).kernels)
