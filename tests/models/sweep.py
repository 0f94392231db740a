"""The sweep: a small random model of every causal decoder that transformers has, and of every model
that also sees or hears, quantized three ways, and what came of it.

``PYTHONPATH=tests python tests/models/sweep.py`` writes docs/models.md, and with ``--wholes`` as
first argument docs/multimodal.md; with kinds as arguments it runs those and keeps what it found of
the others. A kind works where every method's model is the
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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_kinds import KINDS, small
from small_wholes import WHOLES, small_whole
from tiny_models import EXAMPLE, TOKENIZER
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from llmquant import inspect, load, register_with_transformers, unregister_from_transformers
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.errors import ArchitectureError, LlmquantError
from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.load import put_module
from llmquant.models.reading.fit import fitted
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

VERSION = "5.23"  # of transformers, whose model types these are
LIMIT = 1e-3
METHODS: Mapping[str, Mapping[str, Any]] = {
    "8-bit RTN": {"method": "rtn"},
    "GPTQ": {"method": "gptq"},
    "AWQ + GPTQ": {"method": "gptq", "awq": {"grid": 3}},
}
IDS = torch.randint(6, 4096, (2, 12), generator=torch.Generator().manual_seed(1))
_LAYERS = "language_model.model.layers"
PUBLISHED = {
    "kimi_k25": ("language_model.model.blocks", _LAYERS),
    "qianfan_ocr": ("language_model.model.encoder.layers", _LAYERS),
}
DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass(frozen=True)
class Family:
    """What a sweep goes through.

    Attributes:
        kinds: model types.
        small: makes a small config of one.
        auto: transformers' class of such models.
        largest: weights of a model that counts as small.
        page: what the sweep writes.
        head: the beginning of that.
    """

    kinds: tuple[str, ...]
    small: Callable[..., PreTrainedConfig]
    auto: Any
    largest: int
    page: Path
    head: str


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


def logits(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Of text; models that also speak have a part that thinks."""
    part = getattr(model, "thinker", None)
    with torch.no_grad():
        thinking = part if isinstance(part, PreTrainedModel) else model
        result: torch.Tensor = thinking(input_ids=ids, use_cache=False).logits
    return result


def with_our_quantizer(packed: Path, family: Family | None = None) -> torch.Tensor:
    """What transformers' loading gives after ``register_with_transformers``."""
    register_with_transformers(kernel="reference")
    try:
        auto = (family or TEXTS).auto
        return logits(auto.from_pretrained(packed, dtype=torch.float32).eval())
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


def built(kind: str, folder: Path, family: Family | None = None, **changes: Any) -> str | None:
    """Write a small model of the kind; why there is none."""
    family = family or TEXTS
    try:
        config = family.small(kind, **changes)
        with torch.device("meta"):
            size = sum(p.numel() for p in family.auto.from_config(config).parameters())
        if size > family.largest:
            return "no small model of this type can be built from its config alone"
        torch.manual_seed(0)
        model: PreTrainedModel = family.auto.from_config(config, dtype=torch.float32)
        model.eval().save_pretrained(folder)
        _as_published(kind, folder)
        again = family.auto.from_pretrained(folder, dtype=torch.float32).eval()
        before, after = logits(model), logits(again)
    except Exception as e:  # noqa: BLE001 - a hundred models' own code; what it raises is theirs
        return f"transformers cannot build and run a small one here ({type(e).__name__})"
    if not torch.equal(before, after):
        return "transformers does not read back what it saved"
    other = IDS.clone()
    other[:, -1] = (other[:, -1] + 7) % 4000 + 6
    changed = logits(again, other)
    if changed.shape[:2] != IDS.shape:
        return "it does not predict the next token"
    if not torch.allclose(changed[:, :-1], after[:, :-1], atol=1e-4):
        return "not a causal decoder: later tokens change what is said of earlier ones"
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, folder / name)
    return None


def _as_published(kind: str, folder: Path) -> None:
    """Of two model types transformers calls the text part's blocks otherwise when it saves them
    than their makers do, since it takes them for those of the eye."""
    if kind in PUBLISHED:
        file = folder / "model.safetensors"
        tensors = {n.replace(*PUBLISHED[kind]): t for n, t in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def found(kind: str, family: Family) -> Outcome:
    """The outcome, whatever happens: a kind that fails other than by an error of ours is wrong."""
    try:
        return outcome_of(kind, family=family)
    except Exception as e:  # noqa: BLE001 - this is what the sweep looks for
        return Outcome(kind, wrong=(f"fails: {e!r}"[:200].replace("|", "/"),))


def outcome_of(
    kind: str,
    methods: Mapping[str, Mapping[str, Any]] = METHODS,
    family: Family | None = None,
    **changes: Any,
) -> Outcome:
    """Quantize a small model of the kind, with changes to its config, with each method."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        family = family or TEXTS
        missing = built(kind, folder / "source", family, **changes)
        if missing:
            return Outcome(kind, why_not=missing, tried=False)
        try:
            original = logits(load(folder / "source", dtype="float32"))
        except LlmquantError as e:
            return Outcome(kind, why_not=brief(str(e).replace(f"{folder}/source", "the folder")))
        whole = family.auto.from_pretrained(folder / "source", dtype=torch.float32).eval()
        works: list[str] = []
        wrong: list[str] = []
        if not torch.allclose(original, logits(whole), rtol=1e-4, atol=1e-4):
            wrong.append("the original is read otherwise than by transformers")
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
            theirs, faults, measured[method] = _checked(original, packed, family)
            faults += _carried(folder / "source", packed)
            wrong += [f"{method}: {fault}" for fault in faults]
            works += [method] * (not faults)
        return Outcome(kind, tuple(works), reason, linears, theirs, tuple(wrong), True, measured)


def _carried(source: Path, packed: Path) -> list[str]:
    """What is outside the text part and not as it was."""
    before, after = CheckpointReader(source), CheckpointReader(packed)
    outside = fitted(before).outside
    other = sorted(n for n in outside if not torch.equal(before.read(n), after.read(n)))
    return [f"{other[0]} and others are not as they were"] if other else []


def _checked(original: torch.Tensor, packed: Path, family: Family) -> tuple[str, list[str], float]:
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
    try:
        if not torch.equal(with_our_quantizer(packed, family), ours):
            faults.append("from_pretrained with our quantizer differs from load")
    except ArchitectureError as e:
        if "llmquant.load loads its text part" not in str(e):
            raise
    refused = inspect(packed).engines["transformers"]
    if refused:
        return "; ".join(refused), faults, distance
    try:
        model, info = family.auto.from_pretrained(
            packed, dtype=torch.float32, output_loading_info=True
        )
        theirs = logits(model.eval())
    except Exception as e:  # noqa: BLE001 - whatever it is, it was not foretold
        return "", [*faults, f"transformers fails: {e!r}"[:200]], distance
    if info["missing_keys"]:
        faults.append(f"transformers misses {min(info['missing_keys'])} and others")
    if not kl(ours, theirs) < LIMIT / 10:
        faults.append(f"transformers computes something else (KL {kl(ours, theirs):.2g})")
    return "", faults, distance


HEAD = f"""# Models

What llmquant makes of every model type for which transformers {VERSION} has a causal language model. For each type a small
random model was built, quantized to 8 bits by round-to-nearest, by GPTQ, and by AWQ followed by GPTQ, and compared with
the original: the KL divergence is below {LIMIT} nats per token, the packed model computes exactly what its dequantized
weights do, and transformers loads the folder to the same numbers, or the last column says why not; after
`llmquant.register_with_transformers()` it loads every one. A type that does not work is refused, with the reason. No checkpoint that anyone published was tried here.

Models that also see or hear have [a page of their own](multimodal.md).

A `gemma3n_text` or `gemma4_text` whose later blocks read the keys and values of earlier ones (`num_kv_shared_layers`), as Gemma 3n and the small Gemma 4 models do, is rounded to nearest only.

`PYTHONPATH=tests python tests/models/sweep.py` writes this page; with model types as arguments it runs those alone and
keeps what `out/models.json` says of the others.
`pytest tests/models/test_sweep.py` holds it against some of them, and with `-m long` against all.

"""
WHOLES_HEAD = f"""# Models that also see or hear

What llmquant makes of every model type for which transformers {VERSION} has a model of text and something else: the text
part is quantized, and all else (eyes, ears, projectors, further prediction heads, blocks that run beside an image alone) is carried over byte for byte. For each type a small
random model was built and quantized to 8 bits as in [Models](models.md), and compared, on text, with transformers' own
class of the whole: the KL divergence is below {LIMIT} nats per token, every tensor outside the text part is as it was, and transformers loads the folder to the same
numbers with no tensor missing, or the last column says why not. A type that does not work is refused, with the reason.
Where the whole model's class gives logits otherwise than the text part's own (a factor, a cap), they are those of the whole. No checkpoint that anyone published was tried here.

Tensors are named here as transformers {VERSION} saves them, but for {" and ".join(f"`{k}`" for k in PUBLISHED)}, which are as published.
`tests/models/test_published_wholes.py` has other names and older configs that published models have, and `tests/models/test_towers.py`
has further widths, embeddings and schemes for eight families.

`PYTHONPATH=tests python tests/models/sweep.py --wholes` writes this page; with model types as further arguments it runs those alone and
keeps what `out/multimodal.json` says of the others. `pytest tests/models/test_sweep.py` holds it against some of them, and with `-m long` against all.

"""
TEXTS = Family(KINDS, small, AutoModelForCausalLM, 20_000_000, DOCS / "models.md", HEAD)
ALL = Family(
    WHOLES, small_whole, AutoModelForMultimodalLM, 130_000_000, DOCS / "multimodal.md", WHOLES_HEAD
)


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


def page(outcomes: Mapping[str, Outcome], head: str) -> str:
    """What the sweep writes."""
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
    return head + "\n".join(lines)


def main(family: Family, kinds: list[str]) -> None:
    store = Path("out") / f"{family.page.stem}.json"
    known = json.loads(store.read_text()) if store.is_file() else {}
    for kind in () if kinds == ["--page"] else kinds or family.kinds:
        outcome = found(kind, family)
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
        for k in family.kinds
    }
    family.page.write_text(page(outcomes, family.head), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--wholes"]:
        main(ALL, sys.argv[2:])
    else:
        main(TEXTS, sys.argv[1:])
