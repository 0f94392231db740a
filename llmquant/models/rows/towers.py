"""The text part of models that also see or hear: which text model it is.

Where a family's text model has no causal class of its own in transformers, the model that computes
the same for text alone is named: the three position indices of Qwen's vision models are equal for
tokens of text, so theirs is Qwen's own rotation. How the checkpoint keeps it is in the table of
architectures under its own type, where it has a row there.
"""

from __future__ import annotations

from typing import Any

TEXT_AS = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}
# Keys of the named type's config in which such a text model has no choice.
FIXED: dict[str, dict[str, Any]] = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
SENSES = ("vision_config", "audio_config")
"""Keys of a config that describes more than a text model."""
EMBEDDINGS = ("embed_tokens", "embeddings", "word_embeddings", "embed", "wte")
"""What text models call their token embeddings, which lie beside their blocks."""
