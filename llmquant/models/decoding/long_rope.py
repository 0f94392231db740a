"""Positions whose frequencies depend on how long a sequence is: "longrope", as in Phi-3's 128k.

Behind the length that such a model was first trained on, transformers turns *all* positions of a
pass by other frequencies. So a short sequence that shares its pass with a long one is computed by
the long one's, and keys that were cached before are no longer those of their sequence.
"""

from __future__ import annotations

from typing import Any


def longrope_switch(config: Any) -> int | None:
    """Tokens behind which a model turns all positions of a pass by other frequencies; None where
    none does. ``config``: a transformers config."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    lengths = [
        kind["original_max_position_embeddings"]
        for kind in kinds
        if kind.get("rope_type") == "longrope"
    ]
    return min(lengths, default=None)
