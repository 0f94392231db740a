"""A whole run: proved, deterministic, atomic, and refused with a clear word whenever it cannot be right."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmquant import QuantizeOptions, Recipe, load, load_recipe, quantize, verify
from llmquant.checkpoint import CheckpointReader, CheckpointWriter
from llmquant.errors import CheckpointError, LlmquantError, ProofError, QuantizationError, SourceError, UsageError
from llmquant.recipe import shipped
from llmquant.shards import ShardWriter

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny-llama"
RTN = Recipe(method="rtn")
GPTQ = Recipe().updated(
    {
        "calibration.source": f"file:{TINY / 'calibration.txt'}",
        "calibration.nsamples": 2,
        "calibration.seqlen": 64,
        "include": ("model.layers.0.*",),
    }
)


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pipeline") / "q"
    quantize(TINY, out, RTN, QuantizeOptions(base_model="org/tiny"))
    return out


def nothing_left(out: Path) -> bool:
    return not any(p.name.endswith((out.name, f"{out.name}.partial")) for p in out.parent.iterdir())


def test_everything_a_served_model_needs_is_there(quantized: Path) -> None:
    names = {p.name for p in quantized.iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "recipe.yaml", "manifest.json", "README.md",
    }  # fmt: skip
    card = (quantized / "README.md").read_text(encoding="utf-8")
    assert "base_model: org/tiny" in card
    assert "base_model_relation: quantized" in card
    assert load_recipe(quantized / "recipe.yaml") == RTN


def test_the_manifest_speaks_of_no_place_and_no_time(quantized: Path) -> None:
    text = (quantized / "manifest.json").read_text(encoding="utf-8")
    assert str(TINY.parent) not in text
    assert str(quantized.parent) not in text
    manifest = json.loads(text)
    assert len(manifest["modules"]) == 42
    assert manifest["skipped"] == {"lm_head": "ignore pattern lm_head"}


def test_embeddings_stay_tied_and_as_they_were(quantized: Path) -> None:
    tensors, original = load_file(quantized / "model.safetensors"), load_file(TINY / "model.safetensors")
    assert torch.equal(tensors["model.embed_tokens.weight"], original["model.embed_tokens.weight"])
    assert "lm_head.weight" not in tensors
    model = load(quantized)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("recipe", [RTN, GPTQ], ids=["rtn", "gptq"])
def test_the_same_run_gives_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    for name in ("a", "b"):
        quantize(TINY, tmp_path / name, recipe)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in ("a", "b")]
    assert files[0] == files[1]


def test_shards_hold_the_same_tensors(quantized: Path, tmp_path: Path) -> None:
    quantize(TINY, tmp_path / "s", RTN, QuantizeOptions(max_shard_size=1_000_000))
    reader = CheckpointReader(tmp_path / "s")
    assert len(reader.files()) > 2
    one = CheckpointReader(quantized)
    assert reader.tensors.keys() == one.tensors.keys()
    assert all(torch.equal(reader.read(n), one.read(n)) for n in one.tensors)
    verify(tmp_path / "s")


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale"])
def test_the_proof_catches_one_flipped_bit_in_a_written_tensor(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is made to lie: one bit of one tensor changes between the algorithm and the file."""
    add = ShardWriter.add

    def lying(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        if name == f"model.layers.3.mlp.up_proj.{suffix}":
            tensor = tensor.clone()
            tensor.view(torch.uint8).view(-1)[0] ^= 1
        add(self, name, tensor)

    monkeypatch.setattr(ShardWriter, "add", lying)
    with pytest.raises(ProofError, match=r"model\.layers\.3\.mlp\.up_proj"):
        quantize(TINY, tmp_path / "q", RTN)
    assert nothing_left(tmp_path / "q")


def test_the_proof_catches_a_changed_unquantized_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add = ShardWriter.add
    monkeypatch.setattr(ShardWriter, "add", lambda self, n, t: add(self, n, t * 2 if n == "model.norm.weight" else t))
    with pytest.raises(ProofError, match=r"model\.norm\.weight"):
        quantize(TINY, tmp_path / "q", RTN)
    assert nothing_left(tmp_path / "q")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "recipe.yaml"])
def test_verify_names_the_file_with_a_flipped_bit(name: str, quantized: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    verify(copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ProofError, match=name.replace(".", r"\.")):
        verify(copy)


def test_verify_names_a_missing_file_and_allows_a_measured_card(quantized: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    (copy / "README.md").write_text("measured\n", encoding="utf-8")
    verify(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ProofError, match=r"tokenizer\.json"):
        verify(copy)


def test_a_truncated_shard_is_named(quantized: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load(copy)


def changed_model(folder: Path, name: str, value: float) -> Path:
    shutil.copytree(TINY, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][..., 0] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("name", ["model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("recipe", [RTN, GPTQ.updated({"include": ("*",)})], ids=["rtn", "gptq"])
def test_nan_in_the_original_is_an_error_that_names_the_tensor(name: str, recipe: Recipe, tmp_path: Path) -> None:
    model = changed_model(tmp_path / "nan", name, float("nan"))
    with pytest.raises(QuantizationError, match=name.removesuffix(".weight").replace(".", r"\.")):
        quantize(model, tmp_path / "q", recipe)
    assert nothing_left(tmp_path / "q")


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ShardWriter, "add", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        quantize(TINY, tmp_path / "q", RTN)
    assert nothing_left(tmp_path / "q")


def test_an_interrupted_run_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(CheckpointWriter, "finish_weights", interrupt)
    with pytest.raises(KeyboardInterrupt):
        quantize(TINY, tmp_path / "q", RTN)
    assert nothing_left(tmp_path / "q")


def occupied(folder: Path) -> Path:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine", encoding="utf-8")
    return folder


def test_a_folder_with_something_in_it_is_never_touched(tmp_path: Path) -> None:
    taken = occupied(tmp_path / "taken")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="taken"):
            quantize(TINY, taken, RTN, QuantizeOptions(overwrite=overwrite))
    assert (taken / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_overwrite_replaces_a_model_folder(quantized: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(quantized, copy)
    with pytest.raises(UsageError, match="--overwrite"):
        quantize(TINY, copy, RTN)
    quantize(TINY, copy, RTN.updated({"weights.bits": 8}), QuantizeOptions(overwrite=True))
    assert verify(copy).bits_per_weight == 8.125


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        pytest.param({"weights.group_size": 96}, UsageError, r"model\.layers\.0\..*sizes that do: 8, 16", id="group size"),
        pytest.param({"include": ("nothing",)}, UsageError, "matches none", id="pattern without a match"),
        pytest.param({"ignore": ("lm_head", "model.*")}, UsageError, "selects none", id="nothing selected"),
        pytest.param({"ignore": ()}, UsageError, "shares its weights", id="tied head"),
        pytest.param({"method": "gptq"}, SourceError, "--calibration", id="no calibration text"),
        pytest.param({"format": "nope"}, LlmquantError, "choose one of", id="format"),
        pytest.param(
            {"method": "gptq", "calibration.source": f"file:{TINY / 'calibration.txt'}", "calibration.nsamples": 9999},
            SourceError, "--nsamples", id="too little text",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_work(
    changes: dict[str, object], error: type[LlmquantError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words) as caught:
        quantize(TINY, tmp_path / "q", RTN.updated(changes))
    assert caught.value.exit_code == 2
    assert nothing_left(tmp_path / "q")


def test_a_quantized_model_is_not_quantized_again(quantized: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already quantized"):
        quantize(quantized, tmp_path / "q", RTN)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_what_their_names_say(name: str) -> None:
    recipe = load_recipe(name)
    assert name.startswith(f"{recipe.method}-w{recipe.weights.bits}")
    assert recipe.description


def test_an_untied_head_can_be_quantized(tmp_path: Path) -> None:
    model = tmp_path / "untied"
    shutil.copytree(TINY, model)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}), encoding="utf-8")
    tensors = load_file(model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    for method in ("rtn", "gptq"):
        recipe = GPTQ.updated({"method": method, "include": ("lm_head",), "ignore": ()})
        result = quantize(model, tmp_path / method, recipe)
        assert [m.name for m in result.modules] == ["lm_head"]
        assert load(tmp_path / method).lm_head.spec.bits == 4
