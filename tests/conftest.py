"""What the tests of reading, writing and the command line share: small random Llamas on disk, and
quantized copies of them.

The models have tiny-llama's tokenizer and chat template, so real text can calibrate them; their
weights are drawn, so that nothing in them is special. Folders of session scope are read-only by
agreement: a test that tampers copies first.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run, run_here
from tiny_models import EXAMPLE, TOKENIZER
from transformers import LlamaConfig, LlamaForCausalLM

from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

# Every linear has 64 or 96 input columns, so groups of 32 fit and groups of 128 do not.
SMALL: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 5,
}
CARD = "---\nlicense: apache-2.0\nlanguage: [en]\ntags: [mine]\n---\n# A small random model\n"

MakeModel = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's cache folder without what llmquant keeps there (a server's answers, a suite's
    results): tests neither read nor write that. Browsers and models stay where they were."""
    folder = tmp_path_factory.mktemp("cache")
    users = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    for path in users.iterdir() if users.is_dir() else ():
        if path.name != "llmquant":
            (folder / path.name).symlink_to(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield


def write_model(
    folder: Path, dtype: torch.dtype = torch.float16, max_shard_size: str = "5GB", **changes: Any
) -> Path:
    """A random Llama as a folder; ``changes`` go into its config."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SMALL, **changes})).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, folder / name)
    (folder / "README.md").write_text(CARD, encoding="utf-8")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run an llmquant command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return run_here


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """Write another model: ``make_model(dtype=…, tie_word_embeddings=…)``."""

    def make(**options: Any) -> Path:
        return write_model(tmp_path_factory.mktemp("models") / "small", **options)

    return make


@pytest.fixture(scope="session")
def model(make_model: MakeModel) -> Path:
    """fp16, untied head, one file."""
    return make_model()


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some four thousand tokens of plain text."""
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(
        (EXAMPLE / "calibration.txt").read_text(encoding="utf-8")[:16000], encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def rtn() -> Recipe:
    return Recipe.model_validate(
        {"method": "rtn", "weights": {"group_size": 32}, "scales": {"steps": 0}}
    )


@pytest.fixture(scope="session")
def gptq(text: Path) -> Recipe:
    calibration = {"source": f"file:{text}", "nsamples": 6, "seqlen": 32}
    return Recipe.model_validate(
        {"weights": {"group_size": 32}, "scales": {"steps": 4}, "calibration": calibration}
    )


@pytest.fixture(scope="session")
def quantized(model: Path, gptq: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model by GPTQ, W4 g32 symmetric; read-only."""
    return quantize(model, tmp_path_factory.mktemp("quantized") / "small-w4", gptq).path


@pytest.fixture
def tampered(quantized: Path, tmp_path: Path) -> Path:
    """A copy of the quantized folder to damage."""
    return Path(shutil.copytree(quantized, tmp_path / "tampered"))


@pytest.fixture
def edit_json() -> Callable[[Path, Callable[[dict[str, Any]], object]], None]:
    """Change a JSON file in place."""

    def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        value = json.loads(path.read_text(encoding="utf-8"))
        change(value)
        path.write_text(json.dumps(value), encoding="utf-8")

    return edit
