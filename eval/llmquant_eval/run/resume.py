"""What an evaluation keeps until it is done: one file for a command, its models and its text.

The file is named by the hash of everything that its values depend on, so a change of the command, a
weight, a config, a tokenizer, the text or a version begins a new one. What a server answers is kept
elsewhere (:mod:`llmquant_eval.models.kept_answers`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from llmquant_eval.models.journal import key_of
from llmquant_eval.models.kept_work import KeptWork, kept_work
from llmquant_eval.run.plan import EvaluationPlan
from llmquant_eval.run.request import Request

_PACKAGES = ("llmquant", "torch", "transformers")


@contextmanager
def work_of(
    request: Request, plan: EvaluationPlan, tell: Callable[[str], None]
) -> Iterator[KeptWork]:
    """What an unfinished run of the same command left, to be added to; nothing where all models are
    servers."""
    if not plan.local:
        yield KeptWork()
        return
    identity = key_of(
        request.command(),
        {label: known.weights_sha256 for label, known in plan.inspections.items()},
        {model.label: _configs_sha256(model.path) for model in plan.local},
        plan.tokenizers_sha256,
        plan.text_sha256,
        asdict(plan.computing),
        torch.get_num_threads(),
        [importlib.metadata.version(package) for package in _PACKAGES],
    )
    with kept_work(request.kept, identity, tell) as kept:
        yield kept


def _configs_sha256(folder: Path) -> str:
    """Over the JSON files of a model, which its weights' hash leaves out."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.json")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
