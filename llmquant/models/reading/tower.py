"""The text part of a model that also sees or hears, as a text model of its own.

A run reads and quantizes it under the names that the checkpoint has (``language_model.model.…``);
everything else (vision and audio towers, projectors, further prediction heads) has no place in it
and is carried over as it is read. Text alone gives the whole model and its text part the same
numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ArchitectureError
from llmquant.formats.base import is_expert
from llmquant.models.architectures import Architecture
from llmquant.models.naming.whole import own_logits
from llmquant.models.rows.table import ARCHITECTURES
from llmquant.models.rows.towers import FIXED, PLACES, SENSES, TEXT_AS

OUTSIDE_TEXT = "not part of the text model"
_IN_MEMORY = ("model", "lm_head")
_PREFIXES = ("", "model", "language_model", "text_model")


@dataclass(frozen=True, slots=True)
class Tower:
    """Where a checkpoint keeps its text model.

    Attributes:
        config: the text model's, of a type that has a causal class.
        kind: its row's name in the table of architectures.
        base, head: the checkpoint's names of ``model`` and ``lm_head``.
    """

    config: PreTrainedConfig
    kind: str
    base: str
    head: str

    @property
    def moved(self) -> tuple[tuple[str, str], ...]:
        """Modules of the text model and the checkpoint's names for them, where they differ."""
        pairs = zip(_IN_MEMORY, (self.base, self.head), strict=True)
        return tuple((old, new) for old, new in pairs if old != new)

    def holds(self, name: str) -> bool:
        """Whether a tensor of the checkpoint is the text model's."""
        return self.text_name(name) is not None

    def text_name(self, name: str) -> str | None:
        """What the text model calls a tensor of the checkpoint."""
        for new, old in ((self.head, "lm_head"), (self.base, "model")):
            if name.startswith(f"{new}."):
                return f"{old}{name.removeprefix(new)}"
        return None

    def placed(self, architecture: Architecture) -> Architecture:
        """A row of the table under the checkpoint's names."""
        name = self._stored
        return replace(
            architecture,
            blocks=name(architecture.blocks),
            norm=name(architecture.norm),
            head=name(architecture.head),
            renamed=tuple((name(old), new) for old, new in architecture.renamed),
            outside=tuple(name(n) for n in architecture.outside),
        )

    def _stored(self, path: str) -> str:
        for old, new in self.moved:
            if path == old or path.startswith(f"{old}."):
                return f"{new}{path.removeprefix(old)}"
        return path

    def pattern(self, module: str) -> str | None:
        """A regular expression for what engines call a module of the text model; None of any
        other. All of them have a ``language_model`` or ``text_model``, in a place of their own."""
        inside = self.text_name(f"{module}.")
        if inside is None:
            return None
        rest = inside.removesuffix(".").removeprefix("model.")
        place = "" if rest == inside.removesuffix(".") else r"(language|text)_model\.(model\.)?"
        pattern = f"re:.*{place}{re.escape(rest)}$"
        # transformers takes a group for the experts' if a pattern of it has that word.
        return pattern if is_expert(module) else pattern.replace("experts", "exper[t]s")

    def patterns(self, modules: Iterable[str]) -> list[str]:
        """Regular expressions for modules outside the text model: engines put prefixes of their own
        before their names, so the first part that is no such prefix has to do: of what is inside
        such a module, or of a linear by itself. A tensor beside the modules has none
        (``model.image_newline``)."""
        own = ([p for p in name.split(".") if p not in _PREFIXES] for name in modules)
        found = {(parts[0], len(parts) > 1) for parts in own if parts}
        return [
            rf"re:.*{part}\..*" if holds else rf"re:(.*\.)?{part}$" for part, holds in sorted(found)
        ]


def senses_of(config: Mapping[str, Any]) -> list[str]:
    """Which keys of a config describe more than a text model."""
    return [key for key in SENSES if config.get(key)]


def tower_of(reader: CheckpointReader, config: PreTrainedConfig) -> Tower | None:
    """The text part of a checkpoint; None of a text model.

    Raises:
        ArchitectureError: its text part is of a type that no causal model computes, or is not found
            among the tensors.
    """
    if not senses_of(reader.config) or not isinstance(reader.config.get("text_config"), dict):
        return None
    text = config.get_text_config()
    own = text.model_type
    kind = TEXT_AS.get(own, own)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or text is config:
        raise ArchitectureError(
            f"{reader.path}: the text part of model type {config.model_type!r} is a {own!r}, for which transformers has "
            "no causal model; quantize a text-only checkpoint of the family"
        )
    if kind != own:
        text = CONFIG_MAPPING[kind].from_dict(_plain(text.to_dict()) | FIXED.get(own, {}))
    text.tie_word_embeddings = bool(
        reader.config.get("tie_word_embeddings", getattr(config, "tie_word_embeddings", False))
    )
    text.update(own_logits(config, text))
    base = next(
        (b for b, _ in PLACES if any(n.startswith(f"{b}.layers.0.") for n in reader.tensors)), None
    )
    if base is not None:
        heads = [head for place, head in PLACES if place == base]
        stored = (h for h in heads if f"{h}.weight" in reader)
        row = own if own in ARCHITECTURES else kind
        return Tower(text, row, base, next(stored, heads[0]))
    raise ArchitectureError(
        f"{reader.path}: the text part of model type {config.model_type!r} is not where checkpoints keep it "
        f"({', '.join(dict.fromkeys(base for base, _ in PLACES))}); quantize a text-only checkpoint of the family"
    )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A text part's config without what only a model with images has."""
    rope = dict(config.get("rope_parameters") or {})
    for key in ("mrope_section", "mrope_interleaved"):
        rope.pop(key, None)
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    kept = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    return {**kept, **({"rope_parameters": rope} if rope else {})}
