"""GPTQ's ``quantization_config``, and its twin ``quantize_config.json``: one scheme for all,
exceptions in ``dynamic``.

``dynamic`` is an ordered map of regular expressions, matched at the start of a module's full name,
the first match counts: ``+:`` (or nothing) overrides keys, ``-:`` leaves the module unquantized.
vLLM asks with the names of its *fused* layers (``qkv_proj`` for q, k and v), which no checkpoint
has: a pattern that covers all parts of one names the whole too.

Reading goes by the tensors: a module is quantized if it has a ``qweight``. A config that denies it
is refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from importlib.metadata import version
from typing import Any

from llmquant.errors import FormatError, LayoutError
from llmquant.formats.base import HEADS, Scheme
from llmquant.spec import QuantSpec

# What engines fuse in Llama-like models: parts → the name they ask for.
_FUSED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}
_KNOWN_FORMATS = ("gptq", "gptq_v2")


def build(
    schemes: Mapping[str, Scheme], ignore: Collection[str], checkpoint_format: str
) -> dict[str, Any]:
    """``quantization_config`` for modules (full name → scheme), with the linears left alone."""
    base = Counter(s.spec for s in schemes.values()).most_common(1)[0][0]
    exceptions: dict[QuantSpec, list[str]] = {}
    for module, scheme in schemes.items():
        if scheme.spec != base:
            exceptions.setdefault(scheme.spec, []).append(module)
    skipped = sorted(n for n in ignore if n not in HEADS)
    dynamic: dict[str, dict[str, Any]] = {f"-:{_pattern(skipped)}": {}} if skipped else {}
    dynamic |= {f"+:{_pattern(modules)}": _keys(spec) for spec, modules in exceptions.items()}
    config: dict[str, Any] = {
        "quant_method": "gptq",
        **_keys(base),
        # One g_idx that is not trivial is enough: a trivial one means the same with desc_act on or
        # off.
        "desc_act": any(s.g_idx for s in schemes.values()),
        "checkpoint_format": checkpoint_format,
        "lm_head": any(head in schemes for head in HEADS),
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"llmquant:{version('llmquant')}"]},
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def dumps(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def _keys(spec: QuantSpec) -> dict[str, Any]:
    return {
        "bits": spec.bits,
        "group_size": -1 if spec.group_size is None else spec.group_size,
        "sym": spec.symmetric,
    }


def _pattern(modules: Collection[str]) -> str:
    names = set(modules)
    for parent in {m.rpartition(".")[0] for m in modules}:
        for parts, whole in _FUSED.items():
            if all(f"{parent}.{p}" in names for p in parts):
                names.add(f"{parent}.{whole}")
    return f"^(?:{'|'.join(map(_expression, sorted(names)))})$"


def _expression(name: str) -> str:
    """A name, or with ``re:`` before it a regular expression, as one."""
    return name.removeprefix("re:") if name.startswith("re:") else re.escape(name)


def parse(config: Mapping[str, Any], tensor_names: Collection[str]) -> dict[str, Scheme]:
    """Module → scheme.

    Raises:
        FormatError: another layout under the same ``quant_method``, or a config that contradicts
            the tensors.
    """
    _refuse_others(config)
    names = frozenset(tensor_names)
    found: dict[str, Scheme] = {}
    for module in packed_modules(names):
        if module in HEADS and config.get("lm_head") is False:
            raise FormatError(
                f"{module} has a qweight but the config says lm_head: false; set it to true"
            )
        override = _override(config, module)
        if override is None:
            raise FormatError(
                f"{module} has a qweight but a '-:' pattern of the config's dynamic leaves it unquantized"
            )
        merged = {**config, **override}
        spec = spec_of(merged, module)
        desc_act = bool(merged.get("desc_act", False)) and spec.group_size is not None
        if desc_act and f"{module}.g_idx" not in names:
            raise FormatError(
                f"{module}: the config says desc_act: true but there is no g_idx to say which column is where"
            )
        found[module] = Scheme(spec, g_idx=desc_act)
    return found


def packed_modules(tensor_names: Iterable[str]) -> list[str]:
    """Modules that have a ``qweight``, sorted."""
    return sorted(n.removesuffix(".qweight") for n in tensor_names if n.endswith(".qweight"))


def spec_of(config: Mapping[str, Any], module: str) -> QuantSpec:
    """The grid that ``bits``, ``group_size`` and ``sym`` describe.

    Without ``sym`` the weight is read as asymmetric: the zero-points are stored, so nothing need be
        guessed.
    """
    bits, group_size, data_type = (
        config.get("bits"),
        config.get("group_size"),
        config.get("data_type", "int"),
    )
    if not isinstance(bits, int) or not isinstance(group_size, int) or data_type != "int":
        raise LayoutError(
            f"{module}: cannot read {data_type} weights of bits {bits!r}, group_size {group_size!r}"
        )
    return QuantSpec(bits, None if group_size == -1 else group_size, bool(config.get("sym", False)))


def _override(config: Mapping[str, Any], module: str) -> Mapping[str, Any] | None:
    """What ``dynamic`` changes for a module, or None where it is to be skipped."""
    for pattern, change in (config.get("dynamic") or {}).items():
        try:
            hit = re.match(pattern.removeprefix("-:").removeprefix("+:"), module)
        except re.error as e:
            raise FormatError(
                f"the config's dynamic has {pattern!r}, which is no regular expression: {e}"
            ) from e
        if hit:
            return None if pattern.startswith("-:") else dict(change)
    return {}


def _refuse_others(config: Mapping[str, Any]) -> None:
    """Layouts that travel under ``quant_method: gptq`` and hold other bytes."""
    if config.get("is_marlin_format"):
        raise LayoutError(
            "weights in Marlin's layout are tied to one GPU kernel; llmquant reads the plain GPTQ layout"
        )
    label = checkpoint_format(config)
    if label not in _KNOWN_FORMATS:
        raise LayoutError(
            f"checkpoint_format {label!r} is not one llmquant reads; it reads {', '.join(_KNOWN_FORMATS)}"
        )
    if config.get("pack_dtype", "int32") != "int32":
        raise LayoutError(
            f"pack_dtype {config['pack_dtype']!r} is not one llmquant reads; it reads int32"
        )


def checkpoint_format(config: Mapping[str, Any]) -> str:
    """``gptq`` where nothing is said: that is what every tool without the key writes.

    Raises:
        FormatError: ``checkpoint_format`` and its newer name ``format`` disagree.
    """
    names = {str(config[k]) for k in ("checkpoint_format", "format") if config.get(k)}
    if len(names) > 1:
        raise FormatError(f"the config names two checkpoint formats: {', '.join(sorted(names))}")
    return names.pop() if names else "gptq"
