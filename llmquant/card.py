"""The model card of a quantized folder: what it is, what it came from, how to load it, and room for measured figures.

The block between the two markers is where ``llmquant eval --card`` writes its table; until then it says that nothing was
measured. Every other number comes from the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmquant.manifest import Manifest

MEASURED_START = "<!-- llmquant:measured:start -->"
MEASURED_END = "<!-- llmquant:measured:end -->"
# Front matter that stays true of a quantized copy.
_INHERITED = ("license", "license_name", "license_link", "language", "datasets", "pipeline_tag")


def front_matter(readme: Path) -> dict[str, Any]:
    """The YAML block at the head of a model card; empty when there is none or it does not parse."""
    if not readme.is_file():
        return {}
    parts = readme.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        data = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def model_card(manifest: Manifest, recipe_yaml: str, scheme: str, inherited: Mapping[str, Any]) -> str:
    """README.md of the quantized model."""
    head = {k: inherited[k] for k in _INHERITED if k in inherited}
    head |= {
        "base_model": manifest.base_model,
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["llmquant", "compressed-tensors", "int4" if " W4" in f" {scheme}" else "quantized"],
    }
    worst = max(manifest.modules, key=lambda n: manifest.modules[n].output_error or manifest.modules[n].weight_error)
    error = manifest.modules[worst].output_error
    kind = "output" if error is not None else "weight"
    value = error if error is not None else manifest.modules[worst].weight_error
    skipped = "\n".join(f"- `{n}`: {reason}" for n, reason in manifest.skipped.items()) or "- none"
    name = manifest.base_model.rstrip("/").rpartition("/")[2]
    return f"""---
{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---

# {name}, {scheme}

Quantized from `{manifest.base_model}` with llmquant {manifest.versions["llmquant"]}:
{len(manifest.modules)} linear layers, {manifest.bits_per_weight:.3f} bits per quantized weight, the rest as in the original.
The largest relative {kind} error of a layer is {value:.3g} (`{worst}`). `manifest.json` has them all, with the hashes of what
went in and came out; `llmquant inspect --verify` checks them.

## Measured

{MEASURED_START}
Nothing was measured yet. Run `llmquant eval THIS_FOLDER --reference BASE_MODEL --text SOURCE --card`.
{MEASURED_END}

## Use

```python
import llmquant
model = llmquant.load("THIS_FOLDER")   # linears stay packed in memory
```

The files are compressed-tensors `pack-quantized`: vLLM and transformers read them too.

## Left unquantized

{skipped}

## Recipe

```yaml
{recipe_yaml}```
"""
