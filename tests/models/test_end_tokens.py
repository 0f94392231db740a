"""What ends an answer, wherever a checkpoint says it, and the same in every command."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from children import Run
from sweep import built
from tiny_models import EXAMPLE
from transformers import GenerationConfig, LlamaConfig
from typer.testing import CliRunner

import llmquant
from llmquant.cli import app
from llmquant_eval.models.resolve import ModelFolder
from llmquant_eval.validate.engines.engine import Generation
from llmquant_eval.validate.engines.local import LocalEngine
from llmquant_serve.build import build_service
from llmquant_serve.engines.options import ModelOptions
from llmquant_serve.service import Limits

PROMPT = "Once upon a time there was"


@pytest.mark.parametrize(
    ("config", "generation", "tokenizer", "ends"),
    [
        (2, None, None, {2}),
        (2, 3, None, {3}),  # the generation config's stand for the config's
        (2, [3, 4], 5, {3, 4, 5}),
        ([2, 3], None, 3, {2, 3}),
        (2, "none in it", 5, {2, 5}),
        (0, None, None, {0}),
        (None, None, None, set()),
        (None, None, 0, {0}),
    ],
)
def test_sources(config: Any, generation: Any, tokenizer: Any, ends: set[int]) -> None:
    given = None
    if generation is not None:
        given = GenerationConfig(eos_token_id=None if generation == "none in it" else generation)
    found = llmquant.end_tokens(
        LlamaConfig(eos_token_id=config),
        given,
        None if tokenizer is None else SimpleNamespace(eos_token_id=tokenizer),
    )
    assert found == ends


def answer(folder: Path) -> dict[str, Any]:
    given = ["--raw", "--json", "--max-new-tokens", "12", "--dtype", "float32"]
    ran = CliRunner().invoke(app, ["generate", str(folder), PROMPT, *given], catch_exceptions=False)
    assert ran.exit_code == 0, ran.output
    return json.loads(ran.stdout)


def test_a_token_that_only_the_tokenizer_names(tmp_path: Path) -> None:
    """The third new token becomes the tokenizer's end: a chat model whose config was left as it was
    before it learned to chat."""
    folder = tmp_path / "chat"
    shutil.copytree(EXAMPLE, folder)
    tokenizer = llmquant.load_tokenizer(folder)
    before = answer(folder)
    assert before["new_tokens"] == 12
    ids = tokenizer(PROMPT + before["text"], add_special_tokens=False)["input_ids"]
    first = len(tokenizer(PROMPT, add_special_tokens=False)["input_ids"])
    end = next(i for i in range(first + 2, len(ids)) if ids[i] not in ids[first:i])
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = tokenizer.convert_ids_to_tokens(ids[end])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    assert answer(folder)["new_tokens"] == end - first + 1
    service = build_service(ModelOptions(model=str(folder), dtype="float32"), Limits())
    found = ModelFolder(str(folder), folder, "chat")
    validate = LocalEngine(found, Generation(), ("float32", "cpu", "auto"), 1)
    assert ids[end] in service.engine.info.eos
    assert service.engine.info.eos == validate._ends


def test_a_type_that_cannot_generate_is_said_so(tmp_path: Path, run: Run) -> None:
    """By transformers' own code; not with a traceback."""
    folder, data = tmp_path / "model", tmp_path / "data.jsonl"
    assert built("bart", folder) is None
    data.write_text(json.dumps({"prompt": PROMPT, "expect": "x"}) + "\n")
    told = (
        "error: transformers cannot generate with a model of type 'bart': list index out of range"
    )
    said = run("generate", folder, PROMPT, "--raw", "--max-new-tokens", "3")
    assert (said.code, told in said.err) == (2, True), said
    said = run("validate", folder, "--data", data, "--raw", "--max-tokens", "3", "-o", "o.json")
    assert (said.code, told in said.err) == (2, True), said
