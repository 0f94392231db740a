"""llmquant: quantize a Hugging Face LLM, prove what it cost, and serve it.

The names below are the public API. They are loaded on first use, so that ``import llmquant`` and
``llmquant --help`` do not pay for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmquant.checkpoint.hub import resolve
    from llmquant.checkpoint.inspect import Inspection, inspect
    from llmquant.checkpoint.manifest import verify
    from llmquant.conversion import ConvertOptions, ConvertResult, convert
    from llmquant.data.calibration import Calibration, calibrate
    from llmquant.data.sources import Documents, read_documents
    from llmquant.kernels.packed_linear import describe
    from llmquant.models.load import compute_dtype, load
    from llmquant.models.transformers import (
        register_with_transformers,
        unregister_from_transformers,
    )
    from llmquant.planning.allocate import Allocation, allocate
    from llmquant.planning.candidates import AllocateOptions
    from llmquant.quantization.rerun import Comparison, rerun
    from llmquant.quantization.run import QuantizeOptions, QuantizeResult, quantize
    from llmquant.recipe import Recipe, load_recipe, shipped_recipes
    from llmquant.runtime.computing import Computing
    from llmquant.runtime.devices import ChosenDtype, parse_device, parse_dtype
    from llmquant.runtime.memory import peak_resident_bytes, resident_bytes
    from llmquant.runtime.processor import Processor, this_processor
    from llmquant.runtime.threads import set_threads
    from llmquant.spec import QuantSpec
    from llmquant.weight import QuantizedWeight

_HOMES = {
    "AllocateOptions": "planning.candidates",
    "Allocation": "planning.allocate",
    "allocate": "planning.allocate",
    "Calibration": "data.calibration",
    "calibrate": "data.calibration",
    "ConvertOptions": "conversion",
    "ConvertResult": "conversion",
    "convert": "conversion",
    "resolve": "checkpoint.hub",
    "Inspection": "checkpoint.inspect",
    "inspect": "checkpoint.inspect",
    "describe": "kernels.packed_linear",
    "register_with_transformers": "models.transformers",
    "unregister_from_transformers": "models.transformers",
    "load": "models.load",
    "verify": "checkpoint.manifest",
    "QuantizeOptions": "quantization.run",
    "QuantizeResult": "quantization.run",
    "quantize": "quantization.run",
    "Recipe": "recipe",
    "load_recipe": "recipe",
    "Comparison": "quantization.rerun",
    "rerun": "quantization.rerun",
    "shipped_recipes": "recipe",
    "ChosenDtype": "runtime.devices",
    "Computing": "runtime.computing",
    "Processor": "runtime.processor",
    "compute_dtype": "models.load",
    "parse_device": "runtime.devices",
    "parse_dtype": "runtime.devices",
    "set_threads": "runtime.threads",
    "this_processor": "runtime.processor",
    "Documents": "data.sources",
    "read_documents": "data.sources",
    "QuantSpec": "spec",
    "peak_resident_bytes": "runtime.memory",
    "resident_bytes": "runtime.memory",
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
