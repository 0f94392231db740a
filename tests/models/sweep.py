"""The sweep: a small random model of every causal decoder that transformers has, quantized three
ways, and what came of it.

``PYTHONPATH=tests python tests/models/sweep.py`` writes docs/models.md; with kinds as arguments
it runs those and keeps what it found of the others. A kind works where every method's model is the
original but for rounding (KL below ``LIMIT``), what is packed computes exactly what its
dequantized weights do, and transformers loads the folder to the same numbers, or is said not to
(with our quantizer it always does).
Everything else must be an error that says why.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from small_kinds import KINDS, small
from tiny_models import EXAMPLE, TOKENIZER
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmquant import inspect, load, register_with_transformers, unregister_from_transformers
from llmquant.errors import LlmquantError
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.load import put_module
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

VERSION = "5.23"  # of transformers, whose model types these are
LIMIT = 1e-3
LARGEST = 20_000_000  # weights of a model that counts as small
METHODS: Mapping[str, Mapping[str, Any]] = {
    "8-bit RTN": {"method": "rtn"},
    "GPTQ": {"method": "gptq"},
    "AWQ + GPTQ": {"method": "gptq", "awq": {"grid": 3}},
}
IDS = torch.randint(6, 4096, (2, 12), generator=torch.Generator().manual_seed(1))
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@dataclass(frozen=True)
class Outcome:
    """What came of one kind.

    Attributes:
        kind: the model type.
        works: methods whose result is right.
        why_not: why the others do not work, in the command's own words; or why it was not tried.
        linears: quantized ones of all.
        transformers: why transformers does not load the result; "" where it does.
        wrong: what is silently wrong; must be empty.
        tried: whether there was a small model.
    """

    kind: str
    works: tuple[str, ...] = ()
    why_not: str = ""
    linears: str = ""
    transformers: str = ""
    wrong: tuple[str, ...] = ()
    tried: bool = True
    kl: Mapping[str, float] = field(default_factory=dict)


def kl(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Mean divergence in nats per token."""
    p, q = reference.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(IDS, use_cache=False).logits
    return result


def with_our_quantizer(packed: Path) -> torch.Tensor:
    """What transformers' loading gives after ``register_with_transformers``."""
    register_with_transformers(kernel="reference")
    try:
        return logits(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval())
    finally:
        unregister_from_transformers()


def brief(message: str) -> str:
    """An error without what it lists of the table of model types, which would make every row of the
    page depend on every row of the table."""
    message = re.sub(r" \((\w+, ){9,}\w+\)", "", message)
    return re.sub(r"; the mixture-of-experts models that llmquant supports are .*", "", message)


def recipe(changes: Mapping[str, Any]) -> Recipe:
    text = {"source": f"file:{EXAMPLE / 'calibration.txt'}", "nsamples": 4, "seqlen": 24}
    weights = {"bits": 8, "group_size": 16}
    calibration = {} if changes["method"] == "rtn" else text
    return Recipe.model_validate({"weights": weights, "calibration": calibration, **changes})


def built(kind: str, folder: Path, **changes: Any) -> str | None:
    """Write a small model of the kind; why there is none."""
    try:
        config = small(kind, **changes)
        with torch.device("meta"):
            size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
        if size > LARGEST:
            return "no small model of this type can be built from its config alone"
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.eval().save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        before, after = logits(model), logits(again)
    except Exception as e:  # noqa: BLE001 - a hundred models' own code; what it raises is theirs
        return f"transformers cannot build and run a small one here ({type(e).__name__})"
    if not torch.equal(before, after):
        return "transformers does not read back what it saved"
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 7) % 4000 + 6
    with torch.no_grad():
        changed = again(other, use_cache=False).logits
    if not torch.allclose(changed[:, :-1], after[:, :-1], atol=1e-4):
        return "not a causal decoder: later tokens change what is said of earlier ones"
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, folder / name)
    return None


def found(kind: str) -> Outcome:
    """The outcome, whatever happens: a kind that fails other than by an error of ours is wrong."""
    try:
        return outcome_of(kind)
    except Exception as e:  # noqa: BLE001 - this is what the sweep looks for
        return Outcome(kind, wrong=(f"fails: {e!r}"[:200].replace("|", "/"),))


def outcome_of(
    kind: str, methods: Mapping[str, Mapping[str, Any]] = METHODS, **changes: Any
) -> Outcome:
    """Quantize a small model of the kind, with changes to its config, with each method."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        missing = built(kind, folder / "source", **changes)
        if missing:
            return Outcome(kind, why_not=missing, tried=False)
        original = logits(load(folder / "source", dtype="float32"))
        works: list[str] = []
        wrong: list[str] = []
        measured: dict[str, float] = {}
        reason, linears, theirs = "", "", ""
        for i, (method, said) in enumerate(methods.items()):
            packed = folder / str(i)
            try:
                result = quantize(folder / "source", packed, recipe(said))
            except LlmquantError as e:
                reason = reason or brief(str(e).replace(f"{folder}/source", "the folder"))
                if not works:
                    break
                continue
            linears = f"{len(result.modules)} of {len(result.modules) + len(result.skipped)}"
            theirs, faults, measured[method] = _checked(original, packed)
            wrong += [f"{method}: {fault}" for fault in faults]
            works += [method] * (not faults)
        return Outcome(kind, tuple(works), reason, linears, theirs, tuple(wrong), True, measured)


def _checked(original: torch.Tensor, packed: Path) -> tuple[str, list[str], float]:
    """Why transformers does not load it, what is wrong with it, and its distance."""
    model = load(packed, dtype="float32", kernel="reference")
    ours = logits(model)
    faults = []
    distance = kl(original, ours)
    if not distance < LIMIT:
        faults.append(f"KL {distance:.2g}")
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear)]:
        dense = nn.Linear(module.in_features, module.out_features, bias=False)
        dense.weight = nn.Parameter(module.dequantize(torch.float32), requires_grad=False)
        dense.bias = None if module.bias is None else nn.Parameter(module.bias, requires_grad=False)
        put_module(model, name, dense)
    if not torch.equal(logits(model), ours):
        faults.append("packed differs from dense")
    if not torch.equal(with_our_quantizer(packed), ours):
        faults.append("from_pretrained with our quantizer differs from load")
    refused = inspect(packed).engines["transformers"]
    if refused:
        return "; ".join(refused), faults, distance
    try:
        theirs = logits(AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32).eval())
    except Exception as e:  # noqa: BLE001 - whatever it is, it was not foretold
        return "", [*faults, f"transformers fails: {e!r}"[:200]], distance
    if not kl(ours, theirs) < LIMIT / 10:
        faults.append(f"transformers computes something else (KL {kl(ours, theirs):.2g})")
    return "", faults, distance


HEAD = f"""# Models

What llmquant makes of every model type for which transformers {VERSION} has a causal language model. For each type a small
random model was built, quantized to 8 bits by round-to-nearest, by GPTQ, and by AWQ followed by GPTQ, and compared with
the original: the KL divergence is below {LIMIT} nats per token, the packed model computes exactly what its dequantized
weights do, and transformers loads the folder to the same numbers, or the last column says why not; after
`llmquant.register_with_transformers()` it loads every one. A type that does not work is refused, with the reason. No checkpoint that anyone published was tried here.

Models that also see (`gemma3`, `qwen2_5_vl`, `qwen3_vl`, `qwen3_vl_moe`, `qwen3_5`, `mistral3`, `smolvlm`, `llama4`) are in `tests/models/test_towers.py`: the text part is
quantized, all else is carried over byte for byte, and transformers loads the result, but for `qwen3_vl_moe`, whose experts it reads only unquantized.
Further ones are in `tests/models/test_whole_models.py`: `aya_vision`, `llava`, `llava_next`, `paligemma`, `hyperclovax_vision_v2`, `gemma3n` and `gemma4_unified` without eyes. What the text part's own class would do to
the logits (a factor, a cap) is left out where transformers' class of the whole model leaves it out.

A `gemma3n_text` or `gemma4_text` whose later blocks read the keys and values of earlier ones (`num_kv_shared_layers`), as Gemma 3n and the small Gemma 4 models do, is rounded to nearest only.

`PYTHONPATH=tests python tests/models/sweep.py` writes this page; with model types as arguments it runs those alone and
keeps what `out/models.json` says of the others.
`pytest tests/models/test_sweep.py` holds it against some of them, and with `-m long` against all.

"""


def row(outcome: Outcome) -> str:
    """The page's line for one model type."""
    kind = f"`{outcome.kind}`"
    if outcome.wrong:
        return f"| {kind} | {'; '.join(outcome.wrong)} |"
    if not outcome.works:
        return f"| {kind} | {outcome.why_not} |"
    every = len(outcome.works) == len(METHODS)
    methods = "all" if every else f"{', '.join(outcome.works)} ({outcome.why_not})"
    theirs = outcome.transformers or "loads it"
    return f"| {kind} | {methods} | {outcome.linears} | {theirs} |"


def page(outcomes: Mapping[str, Outcome]) -> str:
    """docs/models.md."""
    wrong = [o for o in outcomes.values() if o.wrong]
    right = [o for o in outcomes.values() if not o.wrong]
    sections: dict[str, tuple[str, list[Outcome]]] = {
        "Works": ("model type | methods | linears | transformers", [o for o in right if o.works]),
        "Outside the limit": ("model type | what", wrong),
        "Refused": ("model type | reason", [o for o in right if o.tried and not o.works]),
        "Not tried": ("model type | why", [o for o in right if not o.tried]),
    }
    lines: list[str] = []
    for title, (columns, members) in sections.items():
        if members:
            rule = "|".join("---" for _ in columns.split("|"))
            lines += [f"## {title} ({len(members)})", "", f"| {columns} |", f"|{rule}|"]
            lines += [*map(row, members), ""]
    return HEAD + "\n".join(lines)


def main(kinds: list[str], store: Path) -> None:
    known = json.loads(store.read_text()) if store.is_file() else {}
    for kind in () if kinds == ["--page"] else kinds or KINDS:
        outcome = found(kind)
        known[kind] = vars(outcome)
        print(
            kind,
            *outcome.works,
            outcome.why_not,
            outcome.transformers,
            *outcome.wrong,
            dict(outcome.kl),
            sep=" | ",
            flush=True,
        )
        store.parent.mkdir(parents=True, exist_ok=True)
        store.write_text(json.dumps(known))
    later = "not in the run of the sweep that wrote this page"
    outcomes = {
        k: Outcome(**known[k]) if k in known else Outcome(k, why_not=later, tried=False)
        for k in KINDS
    }
    PAGE.write_text(page(outcomes), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:], Path("out/models.json"))
