"""Rotary scaling from a GGUF file's metadata and tensors.

llama.cpp takes a factor without a type as linear, and knows ``rope.scale_linear`` as an older name
of it (llama-model.cpp, load_hparams). Llama 3's scaling is in no metadata: llama.cpp stores what
each frequency is divided by (``rope_freqs.weight``), and :func:`_llama3` finds the four numbers
that give these factors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmquant.checkpoint.gguf.header import GgufFile
from llmquant.checkpoint.gguf.stated import Stated
from llmquant.errors import LayoutError

ROPE_FACTORS = "rope_freqs.weight"
# (factor, low, high, original context) as Llama 3.1 and 3.2 have them.
_LLAMA3_KNOWN = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


def rope_of(model: GgufFile, stated: Stated, config: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` where the rotary frequencies are scaled.

    Raises:
        LayoutError: a scaling that no config says here.
        CheckpointError: a factor that is no positive number.
    """
    kind = stated.get("rope.scaling.type") or "linear"
    if kind not in ("none", "linear", "yarn") or any("rope_factors_" in n for n in model.tensors):
        said = kind if kind not in ("none", "linear") else "long and short factors"
        raise LayoutError(
            f"{model.path}: rotary scaling {said!r} is not imported; none, linear, yarn and Llama 3's are"
        )
    older = stated.number("rope.scale_linear")
    factor = stated.number("rope.scaling.factor") or older
    scaled = kind != "none" and factor not in (None, 1)
    if ROPE_FACTORS in model.tensors and (_factors(model) != 1).any():
        if scaled:
            raise LayoutError(
                f"{model.path}: {ROPE_FACTORS} and {kind} rotary scaling together are not imported; either alone is"
            )
        return {"rope_scaling": _llama3(model, config)}
    if not scaled:
        return {}
    if kind == "linear":
        return {"rope_scaling": {"rope_type": kind, "factor": factor}}
    return {"rope_scaling": _yarn(model, stated, float(factor))}


def _yarn(model: GgufFile, stated: Stated, factor: float) -> dict[str, Any]:
    """YaRN's numbers. The converter writes HF's ``attention_factor`` as ``yarn_attn_factor``;
    ``attn_factor`` multiplies whatever that is, or YaRN's own 0.1 ln(factor) + 1."""
    scaling: dict[str, Any] = {"rope_type": "yarn", "factor": factor}
    original = stated.count("rope.scaling.original_context_length")
    if original:
        scaling["original_max_position_embeddings"] = original
    attention = stated.number("rope.scaling.yarn_attn_factor")
    times = stated.number("rope.scaling.attn_factor")
    if attention is not None or times not in (None, 1):
        own = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        scaling["attention_factor"] = (attention or own) * (times or 1.0)
    extrapolated = stated.get("rope.scaling.yarn_ext_factor")
    if extrapolated not in (None, 1, -1):
        raise LayoutError(
            f"{model.path}: {stated.name('rope.scaling.yarn_ext_factor')} is {extrapolated}, which no config says; YaRN's own is 1"
        )
    for name in ("beta_fast", "beta_slow"):
        value = stated.number(f"rope.scaling.yarn_{name}")
        if value is not None:
            scaling[name] = value
    return scaling


def _factors(model: GgufFile) -> np.ndarray:
    """What each frequency is divided by; all ones scale nothing."""
    return model.tensors[ROPE_FACTORS].values().reshape(-1).astype(np.float64)


def _llama3(model: GgufFile, config: Mapping[str, Any]) -> dict[str, Any]:
    """Llama 3's four numbers, from what the frequencies are divided by.

    Between the two wavelengths ``context / high`` and ``context / low`` the inverse factor is
    linear in ``context / wavelength``. Only ``context / (high - low)`` and ``low / (high - low)``
    can be seen in factors, so where no known model fits, low is 1.

    Raises:
        LayoutError: other factors than Llama 3's.
    """
    factors = _factors(model)
    theta = float(config.get("rope_theta") or 10000.0)
    frequencies = 1.0 / theta ** (np.arange(len(factors)) / len(factors))
    longest = round(float(factors.max()), 4)
    tried = [k for k in _LLAMA3_KNOWN if k[0] == longest]
    inside = (factors > 1.0) & (factors < factors.max())
    smooth = (1 / factors[inside] - 1 / longest) / (1 - 1 / longest) if longest > 1 else factors[:0]
    turning = frequencies[inside] / (2 * math.pi)
    if len(smooth) > 1:
        slope, offset = np.polyfit(turning, smooth, 1)
        high = 1.0 - 1.0 / offset  # smooth = (context * f - low) / (high - low), low = 1
        tried.append((longest, 1.0, round(high, 3), round(slope * (high - 1.0))))
    elif len(smooth) == 1:  # of a small head: as wide as Llama's own
        tried.append((longest, 1.0, 4.0, round((1 + 3 * smooth[0]) / turning[0])))
    elif longest > 1 and factors.min() == 1:
        least = frequencies[factors == 1].min() / (2 * math.pi)
        tried.append((longest, 1.0, 4.0, math.ceil(4 / least)))
    for known in tried:
        if np.allclose(llama3_factors(frequencies, *known), factors, rtol=1e-4):
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # fmt: skip
            return {"rope_type": "llama3", **dict(zip(names, known, strict=True))}
    raise LayoutError(
        f"{model.path}: {ROPE_FACTORS} divides the rotary frequencies as no Llama 3 does, and no config says so"
    )


def llama3_factors(
    frequencies: np.ndarray, factor: float, low: float, high: float, context: float
) -> np.ndarray:
    """What Llama 3.1's scaling divides each frequency by, ``[head_dim / 2]``.

    Source: transformers' ``_compute_llama3_parameters``.
    """
    turns = context * frequencies / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: np.ndarray = 1.0 / ((1 - smooth) / factor + smooth)
    return factors
