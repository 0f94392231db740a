"""The whole way from a model to a proved folder: what it holds, that it repeats, and that a failure
leaves nothing.

The heart is the proof: one bit flipped between the algorithm and the finished folder, in any file,
and the run must fail.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tolerances import ROUNDOFF
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.checkpoint.manifest import read_manifest, verify
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import INDEX, SINGLE, CheckpointReader, read_json
from llmquant.checkpoint.shards import ShardWriter
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.errors import (
    CheckpointError,
    LlmquantError,
    ProofError,
    QuantizationError,
    SpecError,
    UsageError,
)
from llmquant.models.load import load
from llmquant.quantization import prepare as preparation
from llmquant.quantization import run as pipeline
from llmquant.quantization.options import Events, QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe, load_recipe
from llmquant.weight import QuantizedWeight

Q = "model.layers.0.self_attn.q_proj"
IDS = torch.randint(6, 4096, (2, 24), generator=torch.Generator().manual_seed(1))


def every_file(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def empty(folder: Path) -> bool:
    """Hidden files count."""
    return not any(folder.iterdir())


def weights_of(folder: Path) -> dict[str, QuantizedWeight]:
    reader = CheckpointReader(folder)
    packed = PackedCheckpoint(reader)
    return {n: packed.weight(n) for n in packed.schemes}


def dense_twin(source: Path, packed: Path, destination: Path) -> Path:
    """The source with every quantized weight replaced by its dequantized numbers, made by the
    plainest means."""
    shutil.copytree(source, destination)
    tensors = load_file(destination / SINGLE)
    for name, weight in weights_of(packed).items():
        tensors[f"{name}.weight"] = weight.dequantize(tensors[f"{name}.weight"].dtype)
    save_file(tensors, destination / SINGLE, metadata={"format": "pt"})
    return destination


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(IDS).logits.float()
    return result


def through_transformers(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


# --- what a run gives -------------------------------------------------------

SPECS = [
    pytest.param({}, 4.5, id="W4 g32 sym"),
    pytest.param({"weights.symmetric": False}, 4.625, id="W4 g32 asym"),
    pytest.param({"weights.bits": 3}, 3.5, id="W3 g32"),
    pytest.param({"weights.bits": 2, "weights.symmetric": False}, 2.5625, id="W2 g32 asym"),
    pytest.param({"weights.bits": 8, "weights.group_size": -1}, None, id="W8 row"),
]


@pytest.mark.parametrize(("changes", "bits"), SPECS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_grid_is_written_and_proved(
    model: Path,
    gptq: Recipe,
    tmp_path: Path,
    method: str,
    changes: dict[str, Any],
    bits: float | None,
) -> None:
    result = quantize(model, tmp_path / "q", gptq.updated({"method": method, **changes}))
    assert len(result.modules) == 14
    assert bits is None or result.bits_per_weight == bits
    assert verify(tmp_path / "q").bits_per_weight == result.bits_per_weight
    reader, source = CheckpointReader(tmp_path / "q"), CheckpointReader(model)
    for name in source.tensors:
        module = name.removesuffix(".weight")
        if module not in {m.name for m in result.modules}:
            assert torch.equal(reader.read(name), source.read(name)), name
    loaded = load(tmp_path / "q", dtype="float32")
    assert bool(torch.isfinite(logits(loaded)).all())


@pytest.mark.parametrize(
    ("dtype", "store"),
    [
        pytest.param(torch.float16, "auto", id="fp16"),
        pytest.param(torch.bfloat16, "auto", id="bf16"),
        pytest.param(torch.float32, "source", id="fp32"),
    ],
)
def test_the_sources_dtype_is_that_of_scales_and_of_what_is_left(
    make_model: Callable[..., Path], rtn: Recipe, tmp_path: Path, dtype: torch.dtype, store: str
) -> None:
    quantize(make_model(dtype=dtype), tmp_path / "q", rtn, QuantizeOptions(store_dtype=store))
    reader = CheckpointReader(tmp_path / "q")
    assert reader.info(f"{Q}.weight_scale").dtype == dtype
    assert reader.info("model.embed_tokens.weight").dtype == dtype
    assert read_json(tmp_path / "q" / "config.json")["dtype"] == str(dtype).removeprefix("torch.")


def test_the_same_numbers_whatever_dtype_holds_them(
    make_model: Callable[..., Path], rtn: Recipe, tmp_path: Path
) -> None:
    """bf16 widened to fp32 is the same weights, and portable scales are exact in both."""
    narrow = make_model(dtype=torch.bfloat16)
    wide = Path(shutil.copytree(narrow, tmp_path / "wide"))
    save_file(
        {n: t.float() for n, t in load_file(narrow / SINGLE).items()},
        wide / SINGLE,
        metadata={"format": "pt"},
    )
    quantize(narrow, tmp_path / "a", rtn)
    quantize(wide, tmp_path / "b", rtn)
    digests = [{n: w.digest() for n, w in weights_of(tmp_path / f).items()} for f in ("a", "b")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_our_folder_through_transformers_is_the_dense_model(
    make_model: Callable[..., Path], gptq: Recipe, tmp_path: Path, dtype: torch.dtype
) -> None:
    """from_pretrained reads what we wrote, and the logits are those of the dequantized weights
    within the dtype's rounding.

    Both multiply by the same numbers, so only the order of the additions can differ: some roundoffs
        of the largest logit.
    """
    source = make_model(dtype=dtype)
    quantize(source, tmp_path / "q", gptq)
    theirs = logits(through_transformers(tmp_path / "q", dtype))
    dense = logits(
        through_transformers(dense_twin(source, tmp_path / "q", tmp_path / "dense"), dtype)
    )
    assert float((theirs - dense).abs().max()) <= 4 * ROUNDOFF[dtype] * float(dense.abs().max())
    assert not torch.equal(dense, logits(through_transformers(source, dtype)))


def test_our_loader_in_fp32_is_the_dense_model(
    quantized: Path, model: Path, tmp_path: Path
) -> None:
    dense = logits(
        through_transformers(dense_twin(model, quantized, tmp_path / "dense"), torch.float32)
    )
    packed = logits(load(quantized, dtype="float32", kernel="reference"))
    # fp16 rounds a dequantized weight once; the packed one is exact.
    assert float((packed - dense).abs().max()) <= 32 * ROUNDOFF[torch.float16] * float(
        dense.abs().max()
    )


def test_the_tokenizer_and_its_template_come_along(quantized: Path, model: Path) -> None:
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        assert (quantized / name).read_bytes() == (model / name).read_bytes()
    config, original = read_json(quantized / "config.json"), read_json(model / "config.json")
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    assert config == original


def test_events_are_told_in_order(model: Path, gptq: Recipe, tmp_path: Path) -> None:
    told: list[Any] = []
    events = Events(
        on_calibration=lambda c: told.append(len(c.windows)),
        on_progress=lambda p: told.append(p.block),
        on_phase=told.append,
    )
    quantize(model, tmp_path / "q", gptq, events=events)
    assert told == [6, *[0] * 7, *[1] * 7, "writing", "proving"]


# --- shards, tied embeddings, the head --------------------------------------


def test_shards_in_and_out_hold_the_same(
    make_model: Callable[..., Path], model: Path, rtn: Recipe, tmp_path: Path
) -> None:
    sharded = make_model(max_shard_size="300KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    quantize(model, tmp_path / "one", rtn)
    quantize(sharded, tmp_path / "many", rtn, QuantizeOptions(max_shard_size=200_000))
    one, many = CheckpointReader(tmp_path / "one"), CheckpointReader(tmp_path / "many")
    assert len(many.files()) > 2
    assert (tmp_path / "many" / INDEX).is_file()
    assert one.tensors.keys() == many.tensors.keys()
    assert all(torch.equal(one.read(n), many.read(n)) for n in one.tensors)
    packed = {many.info(f"{Q}.{s}").file for s in ("weight_packed", "weight_scale", "weight_shape")}
    assert len(packed) == 1
    verify(tmp_path / "many")
    assert torch.equal(logits(load(tmp_path / "many")), logits(load(tmp_path / "one")))


def test_tied_embeddings_stay_tied_and_unquantized(
    make_model: Callable[..., Path], gptq: Recipe, tmp_path: Path
) -> None:
    source = make_model(tie_word_embeddings=True)
    quantize(source, tmp_path / "q", gptq)
    assert "lm_head.weight" not in CheckpointReader(tmp_path / "q")
    loaded = load(tmp_path / "q", dtype="bfloat16")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    with pytest.raises(UsageError, match="lm_head shares its weights with the embeddings"):
        quantize(source, tmp_path / "head", gptq.updated({"ignore": ()}))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_untied_head_can_be_quantized(
    model: Path, gptq: Recipe, tmp_path: Path, method: str
) -> None:
    result = quantize(model, tmp_path / "q", gptq.updated({"method": method, "ignore": ()}))
    assert result.modules[-1].name == "lm_head"
    assert "lm_head.weight" not in CheckpointReader(tmp_path / "q")
    assert type(load(tmp_path / "q").get_output_embeddings()).__name__ == "PackedLinear"
    theirs = through_transformers(tmp_path / "q", torch.float16)
    dense = through_transformers(
        dense_twin(model, tmp_path / "q", tmp_path / "dense"), torch.float16
    )
    bound = 4 * ROUNDOFF[torch.float16] * float(logits(dense).abs().max())
    assert float((logits(theirs) - logits(dense)).abs().max()) <= bound


# --- the same command gives the same bytes ----------------------------------


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_twice_is_byte_identical(model: Path, gptq: Recipe, tmp_path: Path, method: str) -> None:
    recipe = gptq.updated({"method": method})
    for name in ("a", "b"):
        torch.manual_seed(hash(name))  # what happened before must not matter
        quantize(model, tmp_path / name / "same", recipe)
    assert every_file(tmp_path / "a" / "same") == every_file(tmp_path / "b" / "same")


def test_the_recipe_that_was_written_repeats_the_run(
    quantized: Path, model: Path, gptq: Recipe, tmp_path: Path
) -> None:
    written = load_recipe(quantized / "recipe.yaml")
    assert written == gptq
    quantize(model, tmp_path / quantized.name, written)
    assert every_file(tmp_path / quantized.name) == every_file(quantized)


def test_another_seed_is_another_draw(
    model: Path, gptq: Recipe, quantized: Path, tmp_path: Path
) -> None:
    quantize(model, tmp_path / "q", gptq.updated({"seed": 1}))
    assert (tmp_path / "q" / SINGLE).read_bytes() != (quantized / SINGLE).read_bytes()


def test_the_random_state_is_the_callers(model: Path, rtn: Recipe, tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    quantize(model, tmp_path / "q", rtn)
    assert torch.equal(torch.get_rng_state(), before)


# --- the proof --------------------------------------------------------------


def flip(path: Path, byte: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte % len(data)] ^= 0x10
    path.write_bytes(data)


FILES = [
    SINGLE,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "recipe.yaml",
    "manifest.json",
    "README.md",
]


def fails_and_leaves_nothing(
    model: Path, recipe: Recipe, folder: Path, error: type[LlmquantError], words: str = ""
) -> None:
    with pytest.raises(error, match=words):
        quantize(model, folder / "q", recipe)
    assert empty(folder)


def test_the_list_of_files_is_complete(quantized: Path) -> None:
    assert sorted(FILES) == sorted(p.name for p in quantized.iterdir())


@pytest.mark.parametrize("place", [0.0, 0.002, 0.3, 0.6, 0.97], ids=lambda p: f"at {p:.1%}")
@pytest.mark.parametrize("name", FILES)
def test_a_bit_flipped_on_the_way_to_the_disk_is_caught(
    model: Path,
    rtn: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    place: float,
) -> None:
    """The disk lies as soon as the file is written: weights after finish_weights, others after
    their own write."""
    finish, text, copy = (
        CheckpointWriter.finish_weights,
        CheckpointWriter.write_text,
        CheckpointWriter.copy_side_files,
    )

    def corrupt(writer: CheckpointWriter, *written: str) -> None:
        path = writer.partial / name
        if name in written:
            flip(path, int(place * path.stat().st_size))

    def finish_weights(self: CheckpointWriter) -> None:
        finish(self)
        corrupt(self, SINGLE)

    def write_text(self: CheckpointWriter, file: str, value: str) -> None:
        text(self, file, value)
        corrupt(self, file)

    def copy_side_files(self: CheckpointWriter, source: Path) -> list[str]:
        names = copy(self, source)
        corrupt(self, *names)
        return names

    monkeypatch.setattr(CheckpointWriter, "finish_weights", finish_weights)
    monkeypatch.setattr(CheckpointWriter, "write_text", write_text)
    monkeypatch.setattr(CheckpointWriter, "copy_side_files", copy_side_files)
    with pytest.raises((ProofError, CheckpointError)):
        quantize(model, tmp_path / "q", rtn)
    assert empty(tmp_path)


Rewrite = Callable[[dict[str, Tensor]], object]
WRONG_TENSORS = [
    pytest.param(
        lambda t: t[f"{Q}.weight_scale"].mul_(2),
        f"{Q} does not hold the numbers",
        id="a scale doubled",
    ),
    pytest.param(
        lambda t: t[f"{Q}.weight_packed"].bitwise_xor_(1),
        f"{Q} does not hold the numbers",
        id="codes changed",
    ),
    pytest.param(
        lambda t: t[f"{Q}.weight_scale"].fill_(float("inf")),
        "what was written cannot be read back",
        id="a scale infinite",
    ),
    pytest.param(
        lambda t: t.pop(f"{Q}.weight_packed"), f"missing on disk: ['{Q}']", id="a module lost"
    ),
    pytest.param(
        lambda t: t.pop(f"{Q}.weight_scale"),
        f"{Q}: weight_scale missing",
        id="a scale lost",
    ),
    pytest.param(
        lambda t: t.pop("model.norm.weight"),
        "model.norm.weight is not what was to be written",
        id="a norm lost",
    ),
    pytest.param(
        lambda t: t["model.norm.weight"].add_(1),
        "model.norm.weight is not what was to be written",
        id="a norm off",
    ),
    pytest.param(
        lambda t: t.update(extra=torch.zeros(2)),
        "tensors that nobody wrote: extra",
        id="a tensor more",
    ),
]


@pytest.mark.parametrize(("rewrite", "words"), WRONG_TENSORS)
def test_a_well_formed_file_with_other_tensors_is_caught(
    model: Path,
    rtn: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rewrite: Rewrite,
    words: str,
) -> None:
    finish = ShardWriter.finish

    def finish_otherwise(self: ShardWriter) -> bytes:
        finish(self)
        tensors = load_file(self.path)
        rewrite(tensors)
        save_file(tensors, self.path, metadata={"format": "pt"})
        data = self.path.read_bytes()
        return data[: 8 + int.from_bytes(data[:8], "little")]  # even the head agrees

    monkeypatch.setattr(ShardWriter, "finish", finish_otherwise)
    fails_and_leaves_nothing(model, rtn, tmp_path, ProofError, re.escape(words))


def test_a_truncated_shard_is_caught(
    model: Path, rtn: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = ShardWriter.finish

    def finish_short(self: ShardWriter) -> bytes:
        head = finish(self)
        self.path.write_bytes(self.path.read_bytes()[:-1])
        return head

    monkeypatch.setattr(ShardWriter, "finish", finish_short)
    fails_and_leaves_nothing(model, rtn, tmp_path, CheckpointError, "truncated, damaged")


# --- failures leave nothing -------------------------------------------------


def test_an_error_in_the_middle_leaves_nothing(
    model: Path, gptq: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = pipeline.walk

    def broken(*args: Any) -> Iterator[Any]:
        blocks = walk(*args)
        yield next(blocks)
        raise QuantizationError("boom")

    monkeypatch.setattr(pipeline, "walk", broken)
    fails_and_leaves_nothing(model, gptq, tmp_path, QuantizationError, "boom")


def test_an_old_model_survives_a_failed_overwrite(
    model: Path, rtn: Recipe, tampered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = every_file(tampered)
    monkeypatch.setattr(pipeline, "prove", lambda *args: (_ for _ in ()).throw(ProofError("no")))
    with pytest.raises(ProofError, match="no"):
        quantize(model, tampered, rtn, QuantizeOptions(overwrite=True))
    assert every_file(tampered) == before
    assert [p.name for p in tampered.parent.iterdir()] == [tampered.name]


def test_overwrite_replaces_the_whole_folder(model: Path, rtn: Recipe, tampered: Path) -> None:
    (tampered / "stale.safetensors").write_bytes(b"")
    quantize(model, tampered, rtn, QuantizeOptions(overwrite=True))
    assert sorted(p.name for p in tampered.iterdir()) == sorted(FILES)
    verify(tampered)


def edited(folder: Path, change: Rewrite) -> None:
    tensors = {n: t.clone() for n, t in load_file(folder / SINGLE).items()}
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def one(name: str, value: float) -> Rewrite:
    """Set one number of a tensor."""
    return lambda tensors: tensors[name].view(-1).__setitem__(70 % tensors[name].numel(), value)


NAN, INF = float("nan"), float("inf")
BAD_NUMBERS = [
    (f"{Q}.weight", NAN),
    ("model.embed_tokens.weight", NAN),
    ("model.layers.1.input_layernorm.weight", INF),
    ("model.norm.weight", NAN),
    ("lm_head.weight", -INF),
]


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize(("name", "value"), BAD_NUMBERS, ids=[n for n, _ in BAD_NUMBERS])
def test_nan_in_the_original_is_an_error_that_names_the_tensor(
    model: Path, gptq: Recipe, tmp_path: Path, method: str, name: str, value: float
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    edited(folder, one(name, value))
    with pytest.raises(
        QuantizationError,
        match=f"{re.escape(name.removesuffix('.weight'))}.*NaN or Inf.*is the checkpoint",
    ):
        quantize(folder, tmp_path / "out" / "q", gptq.updated({"method": method}))
    assert not (tmp_path / "out").exists()


MISFITS = [
    pytest.param(lambda t: t.pop(f"{Q}.weight"), f"lacks {Q}.weight", id="a linear lost"),
    pytest.param(lambda t: t.pop("model.norm.weight"), "lacks model.norm.weight", id="a norm lost"),
    pytest.param(
        lambda t: t.update({f"{Q}.weight": torch.zeros(32, 64)}),
        "[32, 64] in the checkpoint, config.json makes it [64, 64]",
        id="another shape",
    ),
    pytest.param(
        lambda t: t.update({f"{Q}.weight": torch.zeros(64, 64, dtype=torch.int32)}),
        "is torch.int32",
        id="integers",
    ),
]


@pytest.mark.parametrize(("change", "words"), MISFITS)
def test_a_folder_that_does_not_fit_its_config_is_refused(
    model: Path, rtn: Recipe, tmp_path: Path, change: Rewrite, words: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    edited(folder, change)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        quantize(folder, tmp_path / "q", rtn)


CONFIGS = [
    pytest.param(
        {"num_hidden_layers": 3}, CheckpointError, "lacks model.layers.2", id="layers invented"
    ),
    pytest.param(
        {"model_type": "nope"}, LlmquantError, "transformers cannot read", id="unknown type"
    ),
    pytest.param(
        {"hidden_size": 63},
        LlmquantError,
        "not a multiple of the number of attention heads",
        id="odd width",
    ),
    pytest.param({"hidden_size": "a"}, LlmquantError, "expected int, got str", id="width a word"),
    pytest.param({"hidden_act": "zzz"}, LlmquantError, "'zzz' (KeyError)", id="unknown activation"),
    pytest.param({"num_attention_heads": 0}, LlmquantError, "cannot read", id="no heads"),
    pytest.param({"dtype": "zzz"}, LlmquantError, "has no attribute 'zzz'", id="unknown dtype"),
    pytest.param(
        {"quantization_config": {"quant_method": "awq"}},
        CheckpointError,
        "announces awq weights but no tensor is packed",
        id="a label without packed tensors",
    ),
]


@pytest.mark.parametrize(("changes", "error", "words"), CONFIGS)
def test_a_config_that_cannot_be_right_is_refused(
    model: Path,
    rtn: Recipe,
    tmp_path: Path,
    edit_json: Any,
    changes: dict[str, Any],
    error: type[Exception],
    words: str,
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    edit_json(folder / "config.json", lambda config: config.update(changes))
    with pytest.raises(error, match=re.escape(words)):
        quantize(folder, tmp_path / "q", rtn)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
def test_a_file_that_would_be_carried_along_must_parse(
    model: Path, rtn: Recipe, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    (folder / name).write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=f"{name} cannot be read as JSON"):
        quantize(folder, tmp_path / "q", rtn)


@pytest.mark.parametrize(
    "json_", ["{}", '{"added_tokens": [], "model": {}}'], ids=["empty", "bare exception inside"]
)
def test_a_tokenizer_that_is_none_is_an_error(
    model: Path, gptq: Recipe, tmp_path: Path, json_: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    (folder / "tokenizer.json").write_text(json_, encoding="utf-8")
    with pytest.raises(CheckpointError, match="has no tokenizer that transformers can read"):
        quantize(folder, tmp_path / "q", gptq)


def test_what_is_misuse_is_known_before_any_work(
    model: Path, gptq: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group size that does not divide, a destination that is taken: no text is read, no
    weight."""

    def worked(*args: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr(preparation, "read_documents", worked)
    monkeypatch.setattr(CheckpointReader, "read", worked)
    strict = {"weights.group_size": 64, "weights.strict_groups": True, "include": ("*.mlp.*",)}
    with pytest.raises(
        SpecError,
        match=r"down_proj: group_size=64 does not divide its 96 .* sizes that do: 8, 16, 32",
    ):
        quantize(model, tmp_path / "q", gptq.updated(strict))
    with pytest.raises(UsageError, match="already exists and is not empty"):
        quantize(model, model, gptq)
    with pytest.raises(UsageError, match="is the model itself"):
        quantize(model, model, gptq, QuantizeOptions(overwrite=True))
    assert empty(tmp_path)


def test_a_destination_that_holds_the_model_is_refused(
    model: Path, rtn: Recipe, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "outer")
    inner = Path(shutil.copytree(model, tmp_path / "outer" / "inner"))
    with pytest.raises(UsageError, match="which --overwrite would delete"):
        quantize(inner, tmp_path / "outer", rtn, QuantizeOptions(overwrite=True))
    assert (inner / SINGLE).is_file()


@pytest.mark.parametrize("name", [SINGLE, "tokenizer.json", "extra/words.txt"])
def test_a_destination_to_which_a_file_of_the_model_leads_is_refused(
    model: Path, rtn: Recipe, tmp_path: Path, name: str
) -> None:
    folder, out = shutil.copytree(model, tmp_path / "m"), shutil.copytree(model, tmp_path / "out")
    for path in (folder / name, out / name):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (folder / name).unlink()
    (folder / name).symlink_to(out / name)
    before = (out / SINGLE).read_bytes()
    with pytest.raises(
        UsageError, match=rf"{name} leads into it\), which --overwrite would delete"
    ):
        quantize(folder, out, rtn, QuantizeOptions(overwrite=True))
    assert (out / SINGLE).read_bytes() == before


def test_a_folder_inside_the_model_may_be_replaced(
    model: Path, rtn: Recipe, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    for _ in range(2):
        quantize(folder, folder / "q", rtn, QuantizeOptions(overwrite=True))


@pytest.mark.parametrize("judged", [False, True], ids=["calibration", "evaluation"])
def test_a_destination_that_holds_a_text_is_refused(
    model: Path, gptq: Recipe, text: Path, tmp_path: Path, judged: bool
) -> None:
    out = Path(shutil.copytree(model, tmp_path / "out"))
    source = f"file:{shutil.copy(text, out)}"
    recipe = gptq if judged else gptq.updated({"calibration.source": source})
    options = QuantizeOptions(overwrite=True, evaluation=source if judged else None)
    with pytest.raises(UsageError, match=f"holds the text {source}, which --overwrite would"):
        quantize(model, out, recipe, options)
    assert (out / text.name).is_file()


def test_an_evaluation_text_needs_a_calibration_text(
    model: Path, rtn: Recipe, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"--eval-text .* this run has none"):
        quantize(model, tmp_path / "q", rtn, QuantizeOptions(evaluation=f"file:{text}"))


def test_the_manifest_names_no_folder_of_this_machine_and_no_time(
    quantized: Path, model: Path, text: Path
) -> None:
    manifest = (quantized / "manifest.json").read_text(encoding="utf-8")
    for folder in (quantized.parent, model.parent, text.parent, Path.home()):
        assert str(folder) not in manifest
    assert json.loads(manifest)["calibration"]["source"] == "file:calibration.txt"
    assert not re.search(r"20\d\d-\d\d-\d\d|\d\d:\d\d:\d\d|seconds", manifest)
    assert read_manifest(quantized).base_model == "small"
