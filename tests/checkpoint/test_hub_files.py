"""What is fetched of a repository, held against the hub client's own filter: the weights once, and
everything beside them. The lists are those of real kinds of repositories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from llmquant.checkpoint.hub import resolve
from llmquant.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARDS = [f"model-{i:05d}-of-00002.safetensors" for i in (1, 2)]
BASE = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "README.md",
]

# Kind → (fetched, left on the hub).
REPOSITORIES: dict[str, tuple[list[str], list[str]]] = {
    "llama 3: Meta's own copy beside": (
        [*BASE, INDEX, *SHARDS, "LICENSE", "USE_POLICY.md", "special_tokens_map.json"],
        [
            ".gitattributes",
            "original/consolidated.00.pth",
            "original/params.json",
            "original/tokenizer.model",
        ],
    ),
    "mistral: consolidated beside": (
        [
            *BASE,
            INDEX,
            *SHARDS,
            "params.json",
            "tekken.json",
            "tokenizer.model",
            "tokenizer.model.v3",
        ],
        [".gitattributes", "consolidated.safetensors"],
    ),
    "one file, variants and pickles": (
        [*BASE, "model.safetensors", "vocab.json", "merges.txt"],
        [
            "model.fp16.safetensors",
            "pytorch_model.bin",
            "tf_model.h5",
            "flax_model.msgpack",
            "rust_model.ot",
            "onnx/decoder_model.onnx",
            "onnx/config.json",
            "64.tflite",
        ],
    ),
    "one file, and older shards with their index": (
        [*BASE, "model.safetensors"],
        [INDEX, *SHARDS],
    ),
    "training left-overs": (
        [*BASE, "model.safetensors", "trainer_state.json", "all_results.json"],
        [
            "checkpoint-500/model.safetensors",
            "checkpoint-500/optimizer.pt",
            "checkpoint-500/config.json",
            "adapter_model.safetensors",
            "adapter_config.json",
            "training_args.bin",
            "optimizer.pt",
        ],
    ),
    "WordPiece and tiktoken": (
        [
            "config.json",
            "model.safetensors",
            "vocab.txt",
            "qwen.tiktoken",
            "tokenization_qwen.py",
            "tokenizer_config.json",
        ],
        ["pytorch_model.bin.index.json"],
    ),
    "named templates": (
        [
            *BASE,
            "model.safetensors",
            "chat_template.jinja",
            "additional_chat_templates/rag.jinja",
            "additional_chat_templates/tool_use.jinja",
        ],
        [".gitattributes"],
    ),
    "shards of another revision": (
        [*BASE, INDEX, *SHARDS],
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
        ],
    ),
    "names with brackets": (
        [*BASE, "model.safetensors", "notes [old].txt"],
        ["notes o.bin"],
    ),
    "quantized by GPTQ": (
        [*BASE, "gptq_model-4bit-128g.safetensors", "quantize_config.json"],
        ["adapter_model.safetensors"],
    ),
    "GGUF beside": ([*BASE, "model.safetensors"], ["model-Q4_K_M.gguf", "gguf/model-f16.gguf"]),
}


class Hub:
    """A hub with one repository, and what is asked of it."""

    def __init__(self, files: list[str], folder: Path) -> None:
        self.files, self.folder = files, folder
        self.fetched: list[str] = []
        self.config: dict[str, Any] = {"model_type": "llama"}
        self.asked: dict[str, Any] = {}

    def list_repo_files(self, repo: str, *, revision: str | None = None) -> list[str]:
        return self.files

    def hf_hub_download(self, repo: str, name: str, *, revision: str | None = None) -> str:
        if name not in self.files:
            raise EntryNotFoundError(name)
        path = self.folder / name
        if name == "config.json":
            path.write_text(json.dumps(self.config), encoding="utf-8")
            return str(path)
        shards = {"a.weight": SHARDS[0], "b.weight": SHARDS[1], "c.weight": SHARDS[1]}
        path.write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
        return str(path)

    def snapshot_download(self, repo: str, **options: Any) -> str:
        self.asked = {"repo": repo, **options}
        allowed = options.get("allow_patterns")
        self.fetched = list(filter_repo_objects(self.files, allow_patterns=allowed))
        return str(self.folder)


def hub_with(monkeypatch: pytest.MonkeyPatch, files: list[str], folder: Path) -> Hub:
    hub = Hub(files, folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


@pytest.mark.parametrize(("wanted", "left"), REPOSITORIES.values(), ids=REPOSITORIES)
def test_the_weights_are_fetched_once_and_everything_beside_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wanted: list[str], left: list[str]
) -> None:
    hub = hub_with(monkeypatch, sorted([*wanted, *left]), tmp_path)
    assert resolve("org/model@v1.0") == tmp_path
    assert sorted(hub.fetched) == sorted(wanted)
    assert (hub.asked["repo"], hub.asked["revision"]) == ("org/model", "v1.0")
    resolve("org/model")
    assert hub.asked["revision"] is None


REFUSED = {
    "pickles only": (
        [*BASE, "pytorch_model.bin"],
        r"holds only pickle files \(pytorch_model.bin\).*look for another branch",
    ),
    "GGUF only": (
        ["config.json", "m.Q4.gguf"],
        "has no safetensors weights; llmquant reads safetensors only",
    ),
    "no weights": (BASE, "has no safetensors weights; llmquant reads safetensors only"),
    "variants only": (
        [*BASE, "model.fp16.safetensors"],
        "only model.fp16.safetensors, which transformers does not load; llmquant",
    ),
    "a shard too few": (
        [*BASE, INDEX, SHARDS[0]],
        "names shards that are not there: model-00002-of",
    ),
}


@pytest.mark.parametrize(("files", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_before_it_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: list[str], words: str
) -> None:
    hub = hub_with(monkeypatch, files, tmp_path)
    with pytest.raises(CheckpointError, match=words):
        resolve("org/model")
    assert not hub.fetched


def test_the_file_that_the_config_names_is_the_one_that_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = hub_with(monkeypatch, [*BASE, "model.safetensors", "other.safetensors"], tmp_path)
    hub.config["transformers_weights"] = "other.safetensors"
    resolve("org/model")
    assert sorted(hub.fetched) == sorted([*BASE, "other.safetensors"])


def test_without_the_hub_the_cache_is_as_good(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = hub_with(monkeypatch, [*BASE, "model.safetensors"], tmp_path)

    def unreachable(repo: str, *, revision: str | None = None) -> list[str]:
        raise ConnectionError("no route")

    hub.list_repo_files = unreachable  # type: ignore[method-assign]
    assert resolve("org/model") == tmp_path
    assert hub.asked["local_files_only"] is True

    def nothing(repo: str, **options: Any) -> str:
        raise LocalEntryNotFoundError("x")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", nothing)
    with pytest.raises(CheckpointError, match="not in the local cache, and the hub cannot be"):
        resolve("org/model")
