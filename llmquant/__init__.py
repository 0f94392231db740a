"""llmquant: quantize a Hugging Face LLM, prove what it cost, and serve it.

The names below are the public API. They are loaded on first use, so that ``import llmquant`` and ``llmquant --help`` do not
pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmquant.allocation import Allocation, allocate
    from llmquant.calibration import Calibration, calibrate
    from llmquant.choices import AllocateOptions
    from llmquant.conversion import ConvertOptions, ConvertResult, convert
    from llmquant.hub import resolve
    from llmquant.inspection import Inspection, inspect
    from llmquant.integration import register_with_transformers, unregister_from_transformers
    from llmquant.loading import load
    from llmquant.manifest import verify
    from llmquant.modules import describe
    from llmquant.pipeline import QuantizeOptions, QuantizeResult, quantize
    from llmquant.recipe import Recipe, load_recipe, shipped_recipes
    from llmquant.repetition import Comparison, rerun
    from llmquant.sources import Documents, read_documents
    from llmquant.spec import QuantSpec
    from llmquant.usage import peak_resident_bytes, resident_bytes
    from llmquant.weight import QuantizedWeight

_HOMES = {
    "AllocateOptions": "choices",
    "Allocation": "allocation",
    "allocate": "allocation",
    "Calibration": "calibration",
    "calibrate": "calibration",
    "ConvertOptions": "conversion",
    "ConvertResult": "conversion",
    "convert": "conversion",
    "resolve": "hub",
    "Inspection": "inspection",
    "inspect": "inspection",
    "describe": "modules",
    "register_with_transformers": "integration",
    "unregister_from_transformers": "integration",
    "load": "loading",
    "verify": "manifest",
    "QuantizeOptions": "pipeline",
    "QuantizeResult": "pipeline",
    "quantize": "pipeline",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Comparison": "repetition",
    "rerun": "repetition",
    "shipped_recipes": "recipe",
    "Documents": "sources",
    "read_documents": "sources",
    "QuantSpec": "spec",
    "peak_resident_bytes": "usage",
    "resident_bytes": "usage",
    "QuantizedWeight": "weight",
}

__all__ = [
    "AllocateOptions",
    "Allocation",
    "Calibration",
    "Comparison",
    "ConvertOptions",
    "ConvertResult",
    "Documents",
    "Inspection",
    "QuantSpec",
    "QuantizeOptions",
    "QuantizeResult",
    "QuantizedWeight",
    "Recipe",
    "allocate",
    "calibrate",
    "convert",
    "describe",
    "inspect",
    "load",
    "load_recipe",
    "peak_resident_bytes",
    "quantize",
    "read_documents",
    "register_with_transformers",
    "rerun",
    "resident_bytes",
    "resolve",
    "shipped_recipes",
    "unregister_from_transformers",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmquant' has no attribute {name!r}")
    value = getattr(import_module(f"llmquant.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
