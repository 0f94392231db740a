"""verify --rerun: the same inputs give the same bytes, and other inputs are refused before any
work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmquant.checkpoint.manifest import MANIFEST, file_hashes
from llmquant.cli import main
from llmquant.errors import ProofError, UnfitModelError, UsageError
from llmquant.quantization.rerun import demand_same, rerun
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe


def test_a_run_repeated_gives_the_same_bytes(quantized: Path, model: Path) -> None:
    before = sorted(quantized.parent.iterdir())
    found = rerun(str(quantized), str(model))
    assert (found.files, found.modules, found.circumstances) == ((), (), ())
    demand_same(quantized, found)
    assert sorted(quantized.parent.iterdir()) == before  # nothing is left of the second run


def test_another_model_is_refused_before_any_work(
    quantized: Path, make_model: Callable[..., Path]
) -> None:
    other = make_model(dtype=torch.bfloat16)
    with pytest.raises(UsageError, match=r"does not hold the weights that .* was made from"):
        rerun(quantized, other)


def test_a_model_that_is_not_found_by_its_name_is_asked_for(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was a folder elsewhere, or a GGUF file, of which the manifest has the name alone."""

    def unreachable(name: str) -> Path:
        raise UnfitModelError(f"{name} is no folder here")

    copied = Path(shutil.copytree(quantized, tmp_path / "out"))
    manifest = json.loads((copied / MANIFEST).read_text(encoding="utf-8"))
    (copied / MANIFEST).write_text(json.dumps({**manifest, "base_model": "mine"}))
    monkeypatch.setattr("llmquant.quantization.rerun.resolve", unreachable)
    told = r"out was made from mine, which is not found by that name; give that model with --model"
    with pytest.raises(UsageError, match=told):
        rerun(copied)
    with pytest.raises(UnfitModelError, match="nowhere is no folder"):
        rerun(copied, "nowhere")


def test_another_text_is_told_apart_from_another_result(
    quantized: Path, model: Path, tmp_path: Path, gptq: Recipe
) -> None:
    assert gptq.calibration.source is not None
    source = Path(gptq.calibration.source.partition(":")[2])
    moved, other = tmp_path / "moved.txt", tmp_path / "other.txt"
    shutil.copyfile(source, moved)
    other.write_text(source.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    assert rerun(quantized, model, calibration=f"file:{moved}").same
    with pytest.raises(UsageError, match="calibration windows are not those"):
        rerun(quantized, model, calibration=f"file:{other}")


def test_numbers_that_the_recipe_does_not_give_are_found_and_named(
    tampered: Path, model: Path
) -> None:
    """A folder that is whole by its own manifest, but whose manifest tells of other numbers."""
    manifest = json.loads((tampered / MANIFEST).read_text(encoding="utf-8"))
    name = "model.layers.0.self_attn.q_proj"
    manifest["modules"][name]["digest"] = "0" * 64
    manifest["threads"] += 1
    (tampered / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    found = rerun(tampered, model)
    assert (found.files, found.modules) == ((), (name,))
    told = rf"linears {name} differ \(also different: {manifest['threads']} threads then, {manifest['threads'] - 1} now\)"
    with pytest.raises(ProofError, match=told):
        demand_same(tampered, found)


def test_a_recipe_from_before_a_key_was_there_is_repeated_as_it_was(
    model: Path, gptq: Recipe, tmp_path: Path
) -> None:
    """A folder of a version that knew no share of first tokens."""
    windows = {"calibration.seqlen": 128, "calibration.nsamples": 2}
    off = gptq.updated({**windows, "calibration.first_token_share": 0.0})
    folder = quantize(model, tmp_path / "off", off).path
    path = folder / "recipe.yaml"
    before = path.read_text(encoding="utf-8")
    after = before.replace("  first_token_share: 0.0\n", "")
    assert before != after
    path.write_text(after, encoding="utf-8")
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = file_hashes(folder)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert rerun(folder, model).same


def test_a_recipe_that_was_edited_afterwards_shows(tampered: Path, model: Path) -> None:
    text = (tampered / "recipe.yaml").read_text(encoding="utf-8")
    assert "damping: 0.01" in text
    (tampered / "recipe.yaml").write_text(
        text.replace("damping: 0.01", "damping: 0.5"), encoding="utf-8"
    )
    manifest = json.loads((tampered / MANIFEST).read_text(encoding="utf-8"))
    manifest["files"] = file_hashes(tampered)
    (tampered / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    found = rerun(tampered, model)
    assert found.modules
    assert "model.safetensors" in found.files


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        pytest.param(("{q}",), 0, "verified   ", id="hashes"),
        pytest.param(
            ("{q}", "--rerun", "--model", "{m}"),
            0,
            "rerun      the same bytes in every file",
            id="rerun",
        ),
        pytest.param(("{q}", "--model", "{m}"), 2, "belong to --rerun", id="model without rerun"),
        pytest.param(("{m}/nothing",), 2, "is not there", id="no folder"),
        pytest.param(("{m}",), 2, "has no manifest.json", id="not ours"),
    ],
)
def test_the_command(
    quantized: Path, model: Path, args: tuple[str, ...], code: int, words: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(
        "sys.argv", ["llmquant", "verify", *(a.format(q=quantized, m=model) for a in args)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code == code, err
    assert words in (err if code else out)
