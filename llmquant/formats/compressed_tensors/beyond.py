"""What a label says beyond how weights are packed: what else an engine computes with them.

Whoever leaves a label out (weights in small floats are read as numbers, :mod:`llmquant.checkpoint`)
or writes another one (``convert``) asks here first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llmquant.errors import LayoutError

# How keys and values are rounded: compressed-tensors' and ModelOpt's name for it.
KV_CACHE = "kv_cache_scheme"
_KV_CACHES = (KV_CACHE, "kv_cache_quant_algo")
_TRANSFORMS = "transform_config"
_SPARSITY = "sparsity_config"


def refuse_computing(label: Mapping[str, Any]) -> None:
    """Refuse a label whose weights are not what the model multiplies by.

    Raises:
        LayoutError: it rotates activations, or stores weights without their zeros.
    """
    if label.get(_TRANSFORMS):
        raise LayoutError(
            "the config's transform_config rotates activations as the model runs, which llmquant does not do"
        )
    sparsity = label.get(_SPARSITY)
    form = sparsity.get("format") if isinstance(sparsity, Mapping) else sparsity
    if form not in (None, "dense"):
        raise LayoutError(
            f"the config's sparsity_config stores weights as {form!r}, which llmquant does not read; "
            "give the model with dense weights"
        )


def kv_cache(label: Mapping[str, Any]) -> str | None:
    """The key under which a label quantizes keys and values; None where it does not."""
    return next((key for key in _KV_CACHES if label.get(key)), None)
