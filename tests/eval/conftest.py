"""What the evaluation tests share: two small random models on disk, and a text that their tokenizer
knows."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "tests" / "golden" / "base"  # 64 words, hidden 64, two layers, context 256, no BOS
WORDS = 700


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    return ROOT / "examples" / "tiny-llama"


@pytest.fixture(scope="session")
def base_model() -> Path:
    return BASE


@pytest.fixture(autouse=True)
def cache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for each test: what a server answered one test is not kept for the next."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def altered(tmp_path: Path) -> Callable[..., Path]:
    """``altered(name, change)``: a copy of the base model whose every projection went through
    ``change``."""

    def make(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Path:
        folder = tmp_path / name
        shutil.copytree(BASE, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors = {k: change(v).contiguous() if "proj" in k else v for k, v in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """A text of 700 words, each one token of the base model."""
    path = tmp_path / "words.txt"
    draw = random.Random(0)
    path.write_text(" ".join(f"w{draw.randrange(3, 64)}" for _ in range(WORDS)), encoding="utf-8")
    return path
