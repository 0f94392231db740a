"""Models that also see, with the names and configs that published ones have and transformers no
longer writes; and text parts for which transformers has no causal class."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from safetensors.torch import load_file, save_file
from small_wholes import small_whole
from sweep import ALL, IDS, built, kl, logits
from tiny_models import EXAMPLE, TOKENIZER
from transformers import AutoModelForMultimodalLM, PreTrainedModel

from llmquant import inspect, load
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.models.reading.fit import fitted
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe

RTN = Recipe.model_validate({"method": "rtn", "weights": {"bits": 8, "group_size": 16}})


def whole(folder: Path) -> PreTrainedModel:
    model, info = AutoModelForMultimodalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    result: PreTrainedModel = model.eval()
    return result


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    tensors = {change(n): t for n, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """The first level has the text part's numbers, as Qwen2-VL's and Qwen2.5-VL's own configs do,
    and the position indices' split is under an older name."""
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    left = {k: v for k, v in text.items() if k != "model_type"}
    return {**left, **config, "rope_scaling": scaling, "rope_theta": rope["rope_theta"]}


def check(source: Path, packed: Path) -> None:
    """The text part is quantized and the model otherwise what it was."""
    wanted = logits(whole(source))
    assert torch.allclose(logits(load(source, dtype="float32")), wanted, rtol=1e-4, atol=1e-4)
    quantize(source, packed, RTN)
    ours = logits(load(packed, dtype="float32", kernel="reference"))
    assert kl(wanted, ours) < 1e-3
    assert inspect(packed).engines["transformers"] == ()
    torch.testing.assert_close(logits(whole(packed)), ours, rtol=1e-4, atol=1e-4)
    before, after = CheckpointReader(source), CheckpointReader(packed)
    outside = fitted(before).outside
    assert outside
    assert all(torch.equal(before.read(n), after.read(n)) for n in outside)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_config_whose_text_part_is_its_first_level(kind: str, tmp_path: Path, run: Run) -> None:
    source, packed = tmp_path / "source", tmp_path / "packed"
    assert built(kind, source, ALL) is None
    file = source / "config.json"
    file.write_text(json.dumps(flat(json.loads(file.read_text()))))
    check(source, packed)
    config = json.loads((packed / "config.json").read_text())
    config.pop("quantization_config")
    assert config == json.loads(file.read_text())
    for command in ("inspect", "verify"):
        assert run(command, packed).code == 0
    planned = run("plan", source, "--method", "rtn", "--group-size", "16")
    assert "carried over byte for byte" in " ".join((planned.out + planned.err).split())


@pytest.mark.parametrize("tied", [False, True])
def test_a_text_part_two_levels_down(tied: bool, tmp_path: Path) -> None:
    """HyperCLOVA X keeps a causal model in ``model.language_model``, its head beside its blocks."""
    source = tmp_path / "source"
    torch.manual_seed(0)
    config = small_whole("hyperclovax_vision_v2", tie_word_embeddings=tied)
    AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).save_pretrained(source)
    for name in TOKENIZER:
        shutil.copyfile(EXAMPLE / name, source / name)
    blocks = "model.language_model."
    parts = ("layers.", "embed_tokens.", "norm.")

    def published(name: str) -> str:
        inside = name.removeprefix(blocks)
        return f"{blocks}model.{inside}" if inside.startswith(parts) else name

    renamed(source, published)
    assert any(n.startswith(f"{blocks}model.layers.0.") for n in CheckpointReader(source).tensors)
    check(source, tmp_path / "packed")


@pytest.mark.parametrize("kind", ["glm4v", "paddleocr_vl", "granite_docling"])
def test_a_text_part_without_a_causal_class_generates(kind: str, tmp_path: Path) -> None:
    """What the whole model's class generates of text."""
    assert built(kind, tmp_path, ALL) is None
    settings: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    ids = IDS[:1]
    mask = torch.ones_like(ids)
    wanted = whole(tmp_path).generate(input_ids=ids, attention_mask=mask, **settings)
    model = load(tmp_path, dtype="float32")
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), wanted)
    kept = model(IDS, logits_to_keep=1).logits
    torch.testing.assert_close(kept, model(IDS).logits[:, -1:])


def test_eyes_beside_the_layers_are_no_part_of_the_text(tmp_path: Path) -> None:
    """Files of this type have both under ``model.``."""
    assert built("unlimited_ocr", tmp_path, ALL) is None
    outside = fitted(CheckpointReader(tmp_path)).outside
    assert {n.split(".")[1] for n in outside} >= {"sam_model", "vision_model", "projector"}
    assert not any(n.startswith("model.layers.") for n in outside)


def test_a_part_that_speaks_is_not_the_one_that_thinks(tmp_path: Path) -> None:
    """Qwen's omni models have two text models; the one of the larger vocabulary is quantized."""
    from llmquant.models.from_folder import read_config
    from llmquant.models.reading.tower import tower_of

    config = small_whole("qwen2_5_omni_thinker").to_dict()
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "qwen2_5_omni", "thinker_config": config})
    )
    vocabulary = {"thinker.model": 4096, "talker.model": 64}
    tensors = {f"{b}.embed_tokens.weight": torch.zeros(n, 64) for b, n in vocabulary.items()}
    tensors |= {f"{b}.layers.{i}.x.weight": torch.zeros(1) for b in vocabulary for i in range(2)}
    tensors["thinker.lm_head.weight"] = torch.zeros(4096, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    tower = tower_of(CheckpointReader(tmp_path), read_config(tmp_path))
    assert tower is not None
    assert (tower.base, tower.head) == ("thinker.model", "thinker.lm_head")
