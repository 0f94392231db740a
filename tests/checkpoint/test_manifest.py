"""manifest.json: what it records, and that ``verify`` finds every change of a folder that
matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmquant.checkpoint.manifest import MANIFEST, UNHASHED, file_hashes, read_manifest, verify
from llmquant.checkpoint.reader import SINGLE, CheckpointReader, sha256_file
from llmquant.checkpoint.weights.exported import is_onnx
from llmquant.errors import CheckpointError, ProofError
from llmquant.recipe import Recipe

Q = "model.layers.0.self_attn.q_proj"
EditJson = Callable[[Path, Callable[[dict[str, Any]], object]], None]


def test_it_records_what_went_in_and_what_came_out(
    quantized: Path, model: Path, gptq: Recipe
) -> None:
    manifest = verify(quantized)
    assert manifest.base_model == "small"
    assert manifest.base_weights_sha256 == CheckpointReader(model).digest()
    assert manifest.recipe_sha256 == gptq.sha256()
    assert manifest.files == {
        p.name: sha256_file(p) for p in quantized.iterdir() if p.name not in UNHASHED
    }
    assert {"python", "llmquant", "torch", "transformers"} <= manifest.versions.keys()
    assert manifest.skipped == {"lm_head": "ignore pattern lm_head"}
    assert len(manifest.modules) == 14
    entry = manifest.modules[Q]
    assert (entry.spec, entry.shape, entry.damping, entry.tokens) == (
        "W4 g32 sym",
        (64, 64),
        0.01,
        6 * 32,
    )
    assert entry.output_error is not None
    assert 0 < entry.output_error < 0.1


def test_written_and_read_it_is_the_same(quantized: Path) -> None:
    manifest = read_manifest(quantized)
    assert manifest.to_json() == (quantized / MANIFEST).read_text(encoding="utf-8")


def test_every_file_but_card_and_manifest_is_hashed(quantized: Path) -> None:
    assert file_hashes(quantized).keys() == {p.name for p in quantized.iterdir()} - {
        "README.md",
        MANIFEST,
    }


HASHED = [
    SINGLE,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "recipe.yaml",
]


@pytest.mark.parametrize("place", [0.0, 0.5, 1.0], ids=["first", "middle", "last"])
@pytest.mark.parametrize("name", HASHED)
def test_one_flipped_bit_is_found_and_its_file_named(
    tampered: Path, name: str, place: float
) -> None:
    data = bytearray((tampered / name).read_bytes())
    data[int(place * (len(data) - 1))] ^= 1
    (tampered / name).write_bytes(data)
    with pytest.raises(ProofError, match=f"{name} is not the file that was written"):
        verify(tampered)


@pytest.mark.parametrize("name", HASHED)
def test_a_file_that_is_gone_is_named(tampered: Path, name: str) -> None:
    (tampered / name).unlink()
    with pytest.raises(ProofError, match=f"{name} is in the manifest but not in the folder"):
        verify(tampered)


@pytest.mark.parametrize(
    "name",
    [
        "other.safetensors",
        "model.safetensors.index.json",
        "modeling_small.py",
        "special_tokens_map.json",
    ],
)
def test_a_file_more_that_engines_would_load_is_named(tampered: Path, name: str) -> None:
    (tampered / name).write_bytes(b"{}")
    with pytest.raises(ProofError, match=f"not in the manifest: {name}"):
        verify(tampered)


def test_measured_tables_and_notes_may_be_added(tampered: Path) -> None:
    (tampered / "README.md").write_text("# measured", encoding="utf-8")
    (tampered / "notes.txt").write_text("mine", encoding="utf-8")
    verify(tampered)


def rehash(folder: Path, edit_json: EditJson) -> None:
    """What a careful forger would do."""
    digest = sha256_file(folder / SINGLE)
    edit_json(folder / MANIFEST, lambda m: m["files"].update({SINGLE: digest}))


def double(tensors: dict[str, Tensor]) -> None:
    tensors[f"{Q}.weight_scale"] *= 2


def lose(tensors: dict[str, Tensor]) -> None:
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        del tensors[f"{Q}.{suffix}"]


def duplicate(tensors: dict[str, Tensor]) -> None:
    for suffix in ("weight_packed", "weight_scale", "weight_shape"):
        tensors[f"model.layers.7.{suffix}"] = tensors[f"{Q}.{suffix}"].clone()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (double, f"{Q} does not hold the numbers"),
        (lose, rf"missing on disk: \['{Q}'\]"),
        (duplicate, r"unexpected: \['model.layers.7'\]"),
    ],
    ids=["a scale", "a module less", "a module more"],
)
def test_numbers_are_compared_even_where_the_hashes_were_made_to_fit(
    tampered: Path, edit_json: EditJson, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    tensors = {n: t.clone() for n, t in load_file(tampered / SINGLE).items()}
    change(tensors)
    save_file(tensors, tampered / SINGLE, metadata={"format": "pt"})
    rehash(tampered, edit_json)
    with pytest.raises(ProofError, match=words):
        verify(tampered)


NO_MANIFEST = [
    pytest.param(None, "has no manifest.json, so it cannot be checked", id="none"),
    pytest.param("{", "cannot be read as JSON", id="cut"),
    pytest.param("[]", "holds list", id="a list"),
    pytest.param("{}", "is not a manifest of this version", id="somebody else's"),
    pytest.param(
        '{"schema_version": 2}', "is not a manifest of this version", id="a later version"
    ),
]


@pytest.mark.parametrize(("text_", "words"), NO_MANIFEST)
def test_what_is_no_manifest(tampered: Path, text_: str | None, words: str) -> None:
    (tampered / MANIFEST).unlink()
    if text_ is not None:
        (tampered / MANIFEST).write_text(text_, encoding="utf-8")
    with pytest.raises(CheckpointError, match=words):
        verify(tampered)


def test_an_unknown_key_is_refused(tampered: Path, edit_json: EditJson) -> None:
    edit_json(tampered / MANIFEST, lambda m: m.update(verified=True))
    with pytest.raises(CheckpointError, match="not a manifest of this version"):
        read_manifest(tampered)


def test_a_folder_may_be_named_by_a_text(quantized: Path) -> None:
    assert verify(str(quantized)) == verify(quantized)
    assert not is_onnx(str(quantized))


def test_files_are_told_as_they_are_hashed(quantized: Path) -> None:
    told: list[str] = []
    verify(quantized, told.append)
    assert sorted(told) == sorted(
        json.loads((quantized / MANIFEST).read_text(encoding="utf-8"))["files"]
    )
