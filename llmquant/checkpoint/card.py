"""The model card of a quantized folder: what it is, what it came from, how to load it, and room for
measured figures.

The block between the two markers is where ``llmquant eval --card`` writes its table; until then it
says that nothing was measured. Every other number comes from the manifest. A converted folder holds
the same numbers, so it keeps the table that was measured before.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llmquant.checkpoint.manifest import Manifest
from llmquant.formats.base import is_embedding
from llmquant.records import OnnxRecord

MEASURED_START = "<!-- llmquant:measured:start -->"
MEASURED_END = "<!-- llmquant:measured:end -->"
_NOTHING = "Nothing was measured yet. Run `llmquant eval THIS_FOLDER --reference BASE_MODEL --text SOURCE --card`."
_METHODS = {"awq": "AWQ", "smooth": "SmoothQuant"}
_BEFORE = "Measured before the conversion"
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


def measured(readme: Path) -> str | None:
    """What stands between the markers of a card, unless it says that nothing was measured."""
    if not readme.is_file():
        return None
    _, _, rest = readme.read_text(encoding="utf-8", errors="replace").partition(MEASURED_START)
    found, end, _ = rest.partition(MEASURED_END)
    return found.strip() if end and found.strip() not in ("", _NOTHING) else None


def model_card(
    manifest: Manifest, recipe_yaml: str, scheme: str, layout: str, inherited: Mapping[str, Any]
) -> str:
    """README.md of a model that was quantized here, in the byte layout ``layout``."""
    errors = {n: m.output_error or m.weight_error or 0.0 for n, m in manifest.modules.items()}
    worst = max(errors, key=errors.__getitem__)
    kind = "weight" if manifest.modules[worst].output_error is None else "output"
    name = (manifest.base_model or "model").rstrip("/").rpartition("/")[2]
    return f"""{_head(manifest, scheme, layout, inherited)}
# {name}, {scheme}

Quantized from `{manifest.base_model}` with llmquant {manifest.versions["llmquant"]}:
{_packed(manifest)}, {manifest.bits_per_weight:.3f} bits per quantized weight, {_rest(manifest)}.
The largest relative {kind} error of a layer is {errors[worst]:.3g} (`{worst}`). `manifest.json` has them all, with the
hashes of what went in and came out; `llmquant inspect --verify` checks them.
{_scaled(manifest)}{_measured_and_use(_NOTHING, layout)}
## Left unquantized

{_skipped(manifest)}

## Recipe

```yaml
{recipe_yaml}```
"""


def converted_card(
    manifest: Manifest,
    scheme: str,
    name: str,
    recipe_yaml: str | None,
    before: str | None,
    inherited: Mapping[str, Any],
    others: str = "Every other tensor was carried over byte for byte.",
    rounding: str | None = None,
) -> str:
    """README.md of a folder that was converted from another layout.

    Args:
        name: for the title.
        before: the table that was measured on the folder it was converted from.
        others: what became of the tensors of no quantized linear.
        rounding: which numbers of the source the result does not hold as they were, if any.
    """
    step = manifest.conversions[-1]
    same = "the weights' numbers are the same" if rounding is None else rounding
    table = before or _NOTHING
    if before and not before.startswith(_BEFORE):
        table = f"{_BEFORE} as `{step.source_format}`; {same}.\n\n{before}"
    rounded = "" if rounding is None else f" at that dtype ({rounding})"
    recipe = f"\n## Recipe\n\n```yaml\n{recipe_yaml}```\n" if recipe_yaml else ""
    return f"""{_head(manifest, scheme, step.format, inherited)}
# {name}, {scheme}, {step.format}

Converted from `{step.source_format}` to `{step.format}` with llmquant {step.versions["llmquant"]}. The linear layers were
read back and their dequantized weights compared with the source's: all are equal{rounded}. {others}
`manifest.json` has the hashes of what went in and came out; `llmquant inspect --verify` checks them.
{_measured_and_use(table, step.format)}
## Left unquantized

{_skipped(manifest)}
{recipe}"""


def exported_card(manifest: Manifest, name: str, inherited: Mapping[str, Any]) -> str:
    """README.md of an ONNX export."""
    record, step = manifest.onnx, manifest.conversions[-1]
    assert record is not None  # it is the record of one
    level = "" if record.accuracy_level is None else f", accuracy level {record.accuracy_level}"
    rounded = "".join(f"- `{n}`: {what}\n" for n, what in record.requantized.items())
    altered = "".join(f"- `{n}`: {why}\n" for n, why in record.altered.items())
    return f"""{_head(manifest, record.scheme, "onnx", inherited).replace("library_name: transformers", "library_name: onnxruntime-genai")}
# {name}, {record.scheme}, ONNX for {record.provider}

Exported from `{step.source_format}` with llmquant {step.versions["llmquant"]} and the model builder of
onnxruntime-genai {record.tools["onnxruntime-genai"]}: {record.weights} weights, the rest in {record.dtype}{level}. The graph was read
back: {len(record.nodes)} linears and {record.unchanged} other tensors are in it. `manifest.json` has the hashes.
{_checked(record)}
## Measured

{MEASURED_START}
{_NOTHING}
{MEASURED_END}

## Use

```python
import onnxruntime_genai as og
model = og.Model("THIS_FOLDER")
```

or `llmquant chat THIS_FOLDER`, `llmquant serve THIS_FOLDER --engine onnx`.

## Rounded by the tools

{rounded or "- nothing"}

## Otherwise than in the folder

{altered or "- nothing"}
"""


def _checked(record: OnnxRecord) -> str:
    check = record.check
    if check is None:
        return ""
    return (
        f"Of {check.tokens} random tokens its logits are at most {check.max_difference:.3g} from the folder's in float32 "
        f"(the largest is {check.largest_logit:.3g}), mean KL {check.kl_mean:.3g} nats.\n"
    )


def trained_card(
    manifest: Manifest,
    scheme: str,
    layout: str,
    name: str,
    recipe_yaml: str | None,
    inherited: Mapping[str, Any],
) -> str:
    """README.md of a folder whose quantized weights were trained; ``name`` is for the title."""
    qat = manifest.qat
    assert qat is not None  # it is what the card tells of
    recipe = f"\n## Recipe\n\n```yaml\n{recipe_yaml}```\n" if recipe_yaml else ""
    what = {
        "scales": "the scales were trained, the codes are those of the start",
        "codes": "codes and scales were trained",
        "lora": "codes were trained through adapters, which are merged, and scales",
    }[str(qat.options["size"])]
    if qat.codes and qat.options["size"] != "scales":
        what += f" ({qat.codes_changed:,} of {qat.codes:,} codes changed)"
    norms = f" {qat.norms} norms were trained too." if qat.norms else ""
    return f"""{_head(manifest, scheme, layout, inherited)}
# {name}, {scheme}, trained

Quantized from `{qat.reference}`, then trained with quantized weights towards its logits (llmquant
{manifest.versions["llmquant"]}): {what}.{norms}
{_packed(manifest)}, {manifest.bits_per_weight:.3f} bits per quantized weight.
On {qat.heldout} held-out windows of the training text the KL to the original fell from {qat.before:.4g} to
{qat.after:.4g} nats a token (step {qat.step} of {qat.steps}). The text was `{qat.source}`; a judgement
needs another one. `manifest.json` has the hashes of what went in and came out; `llmquant inspect --verify` checks them.
{_measured_and_use(_NOTHING, layout)}
## Left unquantized

{_skipped(manifest)}
{recipe}"""


def _head(manifest: Manifest, scheme: str, layout: str, inherited: Mapping[str, Any]) -> str:
    head = {k: inherited[k] for k in _INHERITED if k in inherited}
    if manifest.base_model:
        head |= {"base_model": manifest.base_model, "base_model_relation": "quantized"}
    width = "int4" if " W4" in f" {scheme}" else "quantized"
    head |= {"library_name": "transformers", "tags": ["llmquant", layout, width]}
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n"


def _measured_and_use(table: str, layout: str) -> str:
    comment, files = (
        "",
        "The files are an ordinary unquantized checkpoint that holds the quantized numbers.",
    )
    if layout != "dense":
        comment = "   # linears stay packed in memory"
        files = f"The files' layout is `{layout}`; llmquant's docs/formats.md says which engines read it."
    return f"""
## Measured

{MEASURED_START}
{table}
{MEASURED_END}

## Use

```python
import llmquant
model = llmquant.load("THIS_FOLDER"){comment}
```

{files}
"""


def _packed(manifest: Manifest) -> str:
    """How many layers, and whether the token embeddings are among what is packed."""
    linears = sum(not is_embedding(name) for name in manifest.modules)
    more = " and the token embeddings" if linears < len(manifest.modules) else ""
    return f"{linears} linear layers{more}"


def _scaled(manifest: Manifest) -> str:
    """What AWQ or SmoothQuant changed beside the linears; nothing for a run without them."""
    every = [pair for block in manifest.scaled.values() for pair in block]
    pairs = [pair for pair in every if pair.method in _METHODS]
    moved = _moved(len(every) - len(pairs))
    if not pairs:
        return moved
    done = sum(pair.reason is None for pair in pairs)
    method = _METHODS[pairs[0].method]
    return moved + (
        f"\nInput channels were scaled before rounding ({method}) in {done} of {len(pairs)} places, the inverse folded into the "
        "norm or linear before:\nthose norms and biases differ from the original's on purpose.\n"
    )


def _moved(places: int) -> str:
    """That powers of two were moved between layers, if any were."""
    if not places:
        return ""
    return (
        f"\nPowers of two were moved between layers in {places} places, so that 16 bits hold the scales: the function is the "
        "same, bit for\nbit, and norms and biases there differ from the original's on purpose.\n"
    )


def _rest(manifest: Manifest) -> str:
    """What became of the other tensors."""
    turned = manifest.rotation
    if turned is None:
        return "the rest as in the original"
    parts = [
        f"{what} ({name})"
        for what, name in (("residual stream", turned.residual), ("value heads", turned.heads))
        if name
    ]
    head = ", the head has weights of its own" if turned.untied else ""
    return (
        f"after a rotation of the {' and '.join(parts)}\nthat leaves the function alone: norms and embeddings differ from the "
        f"original's on purpose{head}"
    )


def _skipped(manifest: Manifest) -> str:
    return "\n".join(f"- `{n}`: {reason}" for n, reason in manifest.skipped.items()) or "- none"
