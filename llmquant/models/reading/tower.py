"""The text part of a model that also sees or hears, as a text model of its own.

A run reads and quantizes it under the names that the checkpoint has (``language_model.model.…``);
everything else (vision and audio towers, projectors, further prediction heads) has no place in it
and is carried over as it is read. Text alone gives the whole model and its text part the same
numbers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
)

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ArchitectureError
from llmquant.formats.base import is_expert
from llmquant.models.architectures import Architecture
from llmquant.models.naming.causal_class import causal_class, reading_as
from llmquant.models.naming.whole import own_logits
from llmquant.models.rows.table import ARCHITECTURES
from llmquant.models.rows.towers import EMBEDDINGS, FIXED, TEXT_AS

OUTSIDE_TEXT = "not part of the text model"
_IN_MEMORY = ("model", "lm_head")
_PREFIXES = ("", "model", "language_model", "text_model")


@dataclass(frozen=True, slots=True)
class Tower:
    """Where a checkpoint keeps its text model.

    Attributes:
        config: the text model's.
        kind: its row's name in the table of architectures.
        base, head: the checkpoint's names of ``model`` and ``lm_head``.
        causal: a class for the config where transformers has none.
    """

    config: PreTrainedConfig
    kind: str
    base: str
    head: str
    causal: type[PreTrainedModel] | None = None

    @property
    def moved(self) -> tuple[tuple[str, str], ...]:
        """Modules of the text model and the checkpoint's names for them, where they differ."""
        pairs = zip(_IN_MEMORY, (self.base, self.head), strict=True)
        return tuple((old, new) for old, new in pairs if old != new)

    def text_name(self, name: str) -> str | None:
        """What the text model calls a tensor of the checkpoint."""
        for new, old in ((self.head, "lm_head"), (self.base, "model")):
            if name.startswith(f"{new}."):
                return f"{old}{name.removeprefix(new)}"
        return None

    def alone(self, module: str) -> str | None:
        """What the text model by itself calls a module of the checkpoint: transformers' class of
        the text model reads some whole folders too (Llama 3.2 Vision)."""
        inside = self.text_name(f"{module}.")
        return None if inside is None else inside.removesuffix(".")

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
        inside = self.alone(module)
        if inside is None:
            return None
        rest = inside.removeprefix("model.")
        place = "" if rest == inside else r"(language|text)_model\.(model\.)?"
        pattern = f"re:.*{place}{re.escape(rest)}$"
        # transformers takes a group for the experts' if a pattern of it has that word.
        return pattern if is_expert(module) else pattern.replace("experts", "exper[t]s")

    def patterns(self, modules: Iterable[str]) -> list[str]:
        """Regular expressions for modules outside the text model: engines put prefixes of their own
        before their names, so the first part that is no such prefix has to do: of what is inside
        such a module, or of a linear by itself. A tensor beside the modules has none
        (``model.image_newline``)."""
        before = {*_PREFIXES, *self.base.split(".")}
        own = ([p for p in name.split(".") if p not in before] for name in modules)
        found = {(parts[0], len(parts) > 1) for parts in own if parts}
        return [
            rf"re:.*{part}\..*" if holds else rf"re:(.*\.)?{part}$" for part, holds in sorted(found)
        ]


def parts_beside(config: PreTrainedConfig) -> list[str]:
    """Which keys of a config describe more than its text model, if that is a part of it."""
    text = config.get_text_config()
    if text is config:
        return []
    parts = {key: getattr(config, key, None) for key in type(config).sub_configs}
    return [key for key, part in parts.items() if part is not None and part is not text]


def owner_of(config: PreTrainedConfig) -> PreTrainedConfig:
    """The innermost config that has the text model as a part: of Qwen's omni models that of their
    thinker, of others the whole."""
    text = config.get_text_config()
    for key in type(config).sub_configs:
        part = getattr(config, key, None)
        if part is not None and part is not text and part.get_text_config() is text:
            return owner_of(part)
    return config


@dataclass(frozen=True, slots=True)
class TextPart:
    """What computes the text part of a model that also sees or hears.

    Attributes:
        config: the text model's.
        kind: its type, or that of the model that computes the same.
        causal: a class for the config where transformers has none.
    """

    config: PreTrainedConfig
    kind: str
    causal: type[PreTrainedModel] | None


def text_part(config: PreTrainedConfig, path: str | os.PathLike[str]) -> TextPart | None:
    """The text part of a model; None of a text model.

    Args:
        config: of the whole.
        path: of its folder, for errors.

    Raises:
        ArchitectureError: transformers cannot compute its text part by itself.
    """
    if config.is_encoder_decoder or not parts_beside(config):
        return None
    owner = owner_of(config)
    text = config.get_text_config()
    own = text.model_type
    kind = TEXT_AS.get(own, own)
    known = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    causal = None if known else causal_class(owner)
    if not known and causal is None:
        raise ArchitectureError(
            f"{path}: the text part of model type {config.model_type!r} is a {own!r}, for which transformers has "
            "no causal model; quantize a text-only checkpoint of the family"
        )
    if kind != own:
        text = CONFIG_MAPPING[kind].from_dict(_plain(text.to_dict()) | FIXED.get(own, {}))
    for key, value in own_logits(owner, text).items() if known else ():
        # Not by setting it: a class may allow no value that does nothing.
        vars(text)[text.attribute_map.get(key, key)] = value
    return TextPart(text, own if own in ARCHITECTURES else kind, causal)


def tower_of(reader: CheckpointReader, config: PreTrainedConfig) -> Tower | None:
    """The text part of a checkpoint; None of a text model.

    Raises:
        ArchitectureError: transformers cannot compute its text part by itself, or it is not found
            among the tensors.
    """
    text = text_part(config, reader.path)
    if text is None:
        return None
    text.config.tie_word_embeddings = _tied(reader, config)
    base = _base(reader, text.config)
    if base is None:
        raise ArchitectureError(
            f"{reader.path}: the text part of model type {config.model_type!r} is not among its tensors: none of its modules has "
            "layers and token embeddings; quantize a text-only checkpoint of the family"
        )
    tower = Tower(text.config, text.kind, base, _head(reader, base), text.causal)
    names = [n for n in map(tower.text_name, reader.tensors) if n is not None]
    plain: Any = text.causal or MODEL_FOR_CAUSAL_LM_MAPPING[type(text.config)]
    causal = reading_as(plain, owner_of(config), names)
    return tower if causal is plain else replace(tower, causal=causal)


def _tied(reader: CheckpointReader, config: PreTrainedConfig) -> bool:
    """Whether head and embeddings are one, as the config around the text part's says."""
    owner = owner_of(config)
    said = reader.config.get("tie_word_embeddings") if owner is config else None
    return bool(getattr(owner, "tie_word_embeddings", False) if said is None else said)


def _base(reader: CheckpointReader, text: PreTrainedConfig) -> str | None:
    """What a checkpoint calls the module with the text model's layers and token embeddings. Of
    several, as in models that also speak, the one of the text model's vocabulary; embeddings that
    are stored as the head alone are in none."""
    layers: dict[str, set[str]] = {}
    rows: dict[str, int] = {}
    embeddings = "|".join(EMBEDDINGS)
    heads = {n.partition("lm_head.")[0] for n in reader.tensors if "lm_head." in n}
    for name in reader.tensors:
        if place := re.match(r"(.+?)\.layers\.(\d+)\.", name):
            layers.setdefault(place[1], set()).add(place[2])
        elif place := re.fullmatch(rf"(.+)\.(?:{embeddings})\.\w+", name):
            shape = reader.info(name).shape
            rows[place[1]] = max(rows.get(place[1], 0), *shape[:1])

    def fitness(base: str) -> tuple[bool, bool, bool, bool, int]:
        named = base.rpartition(".")[2] in _PREFIXES
        headed = base.removesuffix(base.rpartition(".")[2]) in heads
        fits = rows.get(base, 0) >= getattr(text, "vocab_size", 0) > 0
        return fits, base in rows, named, headed, len(layers[base])

    best = max(layers, key=fitness, default=None)
    return best if best is not None and any(fitness(best)[:3]) else None


def _head(reader: CheckpointReader, base: str) -> str:
    """What a checkpoint calls the head: the nearest one, or, if none is stored, where engines look
    for it."""
    parts = base.split(".")
    places = [".".join((*parts[:n], "lm_head")) for n in range(len(parts), -1, -1)]
    stored = (p for p in places if any(n.startswith(f"{p}.") for n in reader.tensors))
    beside = places[1] if parts[-2:-1] != ["model"] else "lm_head"
    return next(stored, beside)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A text part's config without what only a model with images has."""
    rope = dict(config.get("rope_parameters") or {})
    for key in ("mrope_section", "mrope_interleaved"):
        rope.pop(key, None)
    if rope.get("rope_type") == "mrope":
        rope["rope_type"] = "default"
    kept = {k: v for k, v in config.items() if k not in ("model_type", "architectures")}
    return {**kept, **({"rope_parameters": rope} if rope else {})}
