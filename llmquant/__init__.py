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
    from llmquant.loading import compute_dtype, load
    from llmquant.manifest import verify
    from llmquant.modules import describe
    from llmquant.pipeline import QuantizeOptions, QuantizeResult, quantize
    from llmquant.recipe import Recipe, load_recipe, shipped_recipes
    from llmquant.repetition import Comparison, rerun
    from llmquant.runtime.computing import Computing
    from llmquant.runtime.devices import ChosenDtype, parse_device, parse_dtype
    from llmquant.runtime.processor import Processor, this_processor
    from llmquant.runtime.threads import set_threads
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
    "ChosenDtype": "runtime.devices",
    "Computing": "runtime.computing",
    "Processor": "runtime.processor",
    "compute_dtype": "loading",
    "parse_device": "runtime.devices",
    "parse_dtype": "runtime.devices",
    "set_threads": "runtime.threads",
    "this_processor": "runtime.processor",
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
    "ChosenDtype",
    "Comparison",
    "Computing",
    "ConvertOptions",
    "ConvertResult",
    "Documents",
    "Inspection",
    "Processor",
    "QuantSpec",
    "QuantizeOptions",
    "QuantizeResult",
    "QuantizedWeight",
    "Recipe",
    "allocate",
    "calibrate",
    "compute_dtype",
    "convert",
    "describe",
    "inspect",
    "load",
    "load_recipe",
    "parse_device",
    "parse_dtype",
    "peak_resident_bytes",
    "quantize",
    "read_documents",
    "register_with_transformers",
    "rerun",
    "resident_bytes",
    "resolve",
    "set_threads",
    "shipped_recipes",
    "this_processor",
    "unregister_from_transformers",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llmquant' has no attribute {name!r}")
    value = getattr(import_module(f"llmquant.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
