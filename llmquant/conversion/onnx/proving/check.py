"""A few tokens through the exported graph and through the folder: that equal numbers stand in a
graph does not say that it computes the model.

An export that changes no number and rounds no activation must give the folder's logits but for
rounding in float32. Of the others the distance is recorded, and is a figure, not a verdict; what an
export costs is for ``llmquant eval`` to say.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from llmquant.checkpoint.reader import CheckpointReader
from llmquant.conversion.onnx.options import FP32, PACKED
from llmquant.conversion.onnx.proving.proof import Found
from llmquant.conversion.onnx.worker import OnnxWorker
from llmquant.errors import ProofError
from llmquant.models.load import load
from llmquant.records import GraphCheck

TOKENS = 64
# Of the largest logit. Measured on examples/tiny-llama and SmolLM2-135M: 1e-6 to 4e-6.
TOLERANCE = 1e-3
_SEED = 0


def check_graph(
    model: Path, built: Path, reader: CheckpointReader, python: str | os.PathLike[str]
) -> GraphCheck:
    """Compare logits of random tokens.

    Raises:
        ProofError: the export gives NaN or infinite ones.
        LlmquantError: it cannot be run.
    """
    vocabulary = int(reader.config["vocab_size"])
    seeded = torch.Generator().manual_seed(_SEED)
    ids = torch.randint(0, vocabulary, (1, TOKENS), generator=seeded)
    with OnnxWorker(built, torch.get_num_threads(), python) as worker:
        exported = worker.logits(ids[0].tolist())
    loaded = load(model, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        wanted = loaded(input_ids=ids, use_cache=False).logits[0].to(torch.float32)
    if not bool(torch.isfinite(exported).all()):
        raise ProofError(f"{built}: the exported graph computes logits that are NaN or infinite")
    p, q = torch.log_softmax(wanted.double(), -1), torch.log_softmax(exported.double(), -1)
    return GraphCheck(
        tokens=TOKENS,
        largest_logit=float(wanted.abs().max()),
        max_difference=float((exported - wanted).abs().max()),
        kl_mean=max(0.0, float((p.exp() * (p - q)).sum(-1).mean())),
        top1_agreement=float((exported.argmax(-1) == wanted.argmax(-1)).double().mean()),
    )


def demand_same(check: GraphCheck, found: Found, kind: str, level: int, built: Path) -> None:
    """Raises ProofError where a graph that rounds nothing computes other logits than the folder."""
    rounded = [why for why in found.altered.values() if why.startswith("rounded")]
    if kind not in (PACKED, FP32) or level or found.requantized or rounded:
        return
    if check.max_difference > TOLERANCE * check.largest_logit:
        raise ProofError(
            f"{built}: the graph holds the folder's numbers and computes other logits: "
            f"{check.max_difference:.3g} apart where the largest is {check.largest_logit:.3g}; "
            "the builder does not know this model as it is"
        )
