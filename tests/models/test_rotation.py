"""A rotated checkpoint computes what the original does, in float64 to the last digits; slips in it
are noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import random_model
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM

from llmquant.algorithms.hadamard import Rotation
from llmquant.checkpoint.reader import SINGLE, CheckpointReader
from llmquant.errors import ArchitectureError, LlmquantError, SpecError
from llmquant.models.rotation import rotated as rotation
from llmquant.models.rotation.rotated import RotatedReader, rotated
from llmquant.recipe import Recipe

IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(5))
RESIDUAL = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "opt",
    "starcoder2",
    "qwen2 mixed windows",
    "mixtral",
    "qwen3_moe",
)
BOTH = {"residual": "hadamard"}


def source(kind: str, folder: Path, **changes: Any) -> Path:
    """A random float64 model whose norms and biases are far from ones and zeros, which would hide
    slips."""
    model = random_model(kind, **changes).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(
                    torch.rand(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
                    + 0.5
                )
    model.save_pretrained(folder)
    return folder


def reader_of(folder: Path, **wanted: Any) -> CheckpointReader:
    return rotated(CheckpointReader(folder), Recipe.model_validate({"rotation": wanted}))


class Exact(TorchFunctionMode):
    """Keeps float64 where transformers asks for float32: norms and softmax would otherwise round
    what is compared."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        wide = [torch.float64 if a is torch.float32 else a for a in args]
        return func(
            *wide,
            **{k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()},
        )


def logits(folder: Path) -> Tensor:
    # The fused product over experts has no float64.
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()
    with torch.no_grad(), Exact():
        return model(IDS).logits


def written(reader: CheckpointReader, folder: Path) -> Path:
    folder.mkdir()
    save_file(
        {name: reader.read(name) for name in reader.tensors},
        folder / SINGLE,
        metadata={"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(reader.config))
    return folder


def change(before: Path, after: Path) -> float:
    wanted, got = logits(before), logits(after)
    return float((got - wanted).abs().max() / wanted.std())


CASES = [
    *(pytest.param(kind, BOTH, id=f"{kind}") for kind in RESIDUAL),
    pytest.param("llama", {"residual": "random"}, id="random"),
    pytest.param("opt", {"residual": "random"}, id="random that keeps the mean"),
    pytest.param("qwen2", {"residual": "hadamard", "heads": False}, id="residual alone"),
    *(
        pytest.param(kind, {"residual": "off"}, id=f"heads alone: {kind}")
        for kind in ("qwen3", "gemma2", "gemma3_text")
    ),
]


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize(("kind", "wanted"), CASES)
def test_a_rotated_model_computes_the_same(kind, wanted, tied, tmp_path):
    before = source(kind, tmp_path / "before", tie_word_embeddings=tied)
    reader = reader_of(before, **wanted)
    assert change(before, written(reader, tmp_path / "after")) < 1e-11
    same = [
        n
        for n in CheckpointReader(before).tensors
        if torch.equal(reader.read(n), CheckpointReader(before).read(n))
    ]
    untouched = (
        "q_norm.weight",
        "k_norm.weight",
        "q_proj.bias",
        "k_proj.bias",
        "fc1.bias",
        "c_fc.bias",
    )
    if wanted["residual"] == "off":
        assert {n.split(".")[-2] for n in reader.tensors if n not in same} == {"v_proj", "o_proj"}
    elif wanted.get("heads", True):
        assert all(n.endswith(untouched) for n in same)
    assert isinstance(reader, RotatedReader)
    assert reader.report.untied == (tied and wanted["residual"] != "off")
    assert ("lm_head.weight" in reader) == (not tied or wanted["residual"] != "off")


def test_a_vocabulary_rotated_in_slices_is_the_whole_one(tmp_path, monkeypatch):
    reader = reader_of(source("llama", tmp_path / "m"), **BOTH)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    whole = [reader.read(n) for n in names]
    monkeypatch.setattr(rotation, "_ROWS", 24)
    for name, wanted in zip(names, whole, strict=True):
        assert torch.allclose(reader.read(name), wanted, atol=1e-14, rtol=0)


def test_norms_become_ones_and_the_config_says_that_the_head_is_its_own(tmp_path):
    reader = reader_of(source("llama", tmp_path / "m", tie_word_embeddings=True), **BOTH)
    norms = [n for n in reader.tensors if "norm" in n]
    assert len(norms) == 5
    assert all(bool((reader.read(n) == 1).all()) for n in norms)
    assert reader.config["tie_word_embeddings"] is False
    assert reader.info("lm_head.weight").shape == (64, 32)
    assert reader.report.norms == 5
    assert (reader.report.residual, reader.report.heads) == ("hadamard 32", "hadamard 8")
    assert reader.digest() == CheckpointReader(tmp_path / "m").digest()


# --- slips ------------------------------------------------------------------


def wrong_head_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of a head taken with a stride, as if heads were interleaved."""
    apply = Rotation.apply

    def interleaved(self: Rotation, x: Tensor) -> Tensor:
        if x.dim() == 3 and self.size == 8 and x.shape[0] == 32:
            return apply(self, x.transpose(1, 2).reshape(x.shape)).reshape(32, 8, 4).transpose(1, 2)
        return apply(self, x)

    monkeypatch.setattr(Rotation, "apply", interleaved)


def norms_not_absorbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RotatedReader, "_absorbing", lambda self, norm, matrix: matrix.apply)


def writer_bias_left(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RotatedReader._rotate_residual

    def forgetful(self: RotatedReader, matrix: Rotation) -> int:
        count = original(self, matrix)
        for name in [n for n in self._changes if n.endswith("out_proj.bias")]:
            del self._changes[name]
        return count

    monkeypatch.setattr(RotatedReader, "_rotate_residual", forgetful)


def value_bias_left(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RotatedReader._rotate_heads

    def forgetful(self: RotatedReader, matrix: Rotation, count: int) -> None:
        original(self, matrix, count)
        for name in [n for n in self._changes if n.endswith("v_proj.bias")]:
            del self._changes[name]

    monkeypatch.setattr(RotatedReader, "_rotate_heads", forgetful)


def wrong_rows_of_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half as many key-value heads as there are: the last rows only."""
    original = RotatedReader._rotate_heads
    monkeypatch.setattr(
        RotatedReader,
        "_rotate_heads",
        lambda self, matrix, count: original(self, matrix, count // 2),
    )


def transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """``Q W`` for ``Q^T W``."""
    dense = lambda self: Rotation.apply(self, torch.eye(self.size, dtype=torch.float64))  # noqa: E731
    monkeypatch.setattr(Rotation, "apply_to_rows", lambda self, w: dense(self) @ w)


def mean_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    original = RotatedReader._matrix
    monkeypatch.setattr(
        RotatedReader,
        "_matrix",
        lambda self, kind, size, seed, _, what: original(self, kind, size, seed, False, what),
    )


@pytest.mark.parametrize(
    ("kind", "slip"),
    [
        pytest.param("llama", wrong_head_order, id="wrong head order"),
        pytest.param("llama", norms_not_absorbed, id="norms not absorbed"),
        pytest.param("opt", writer_bias_left, id="a writer's bias not rotated"),
        pytest.param("qwen2", value_bias_left, id="a value's bias not rotated"),
        pytest.param("phi3", wrong_rows_of_values, id="wrong rows of a fused matrix"),
        pytest.param("llama", transposed, id="the wrong side"),
        pytest.param("starcoder2", mean_not_kept, id="a LayerNorm's mean not kept"),
    ],
)
def test_a_slip_changes_what_the_model_computes(kind, slip, tmp_path, monkeypatch):
    before = source(kind, tmp_path / "before")
    slip(monkeypatch)
    assert change(before, written(reader_of(before, residual="random"), tmp_path / "after")) > 0.01


# --- refusals ---------------------------------------------------------------


def renamed_norm(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.0.extra.weight"] = tensors.pop("model.layers.0.input_layernorm.weight")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def dead_norm(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.1.input_layernorm.weight"][3] = 0
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def said(key: str, value: object) -> Any:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {key: value}))

    return edit


@pytest.mark.parametrize(
    ("kind", "edit", "wanted", "error", "message"),
    [
        pytest.param(
            "gemma2",
            None,
            BOTH,
            ArchitectureError,
            "'gemma2' cannot be rotated: its norms on the outputs",
            id="gemma",
        ),
        pytest.param(
            "gpt_neox",
            None,
            BOTH,
            ArchitectureError,
            "not known for model type 'gpt_neox', only",
            id="unknown",
        ),
        pytest.param(
            "opt",
            said("do_layer_norm_before", False),
            BOTH,
            ArchitectureError,
            "config.json has do_layer_norm_before: False",
            id="norms behind",
        ),
        pytest.param(
            "llama",
            renamed_norm,
            BOTH,
            ArchitectureError,
            r"how model\.layers\.0\.extra\.weight use",
            id="tensor",
        ),
        pytest.param(
            "starcoder2",
            dead_norm,
            BOTH,
            ArchitectureError,
            "has channels of weight 0",
            id="norm of 0 with a bias",
        ),
        pytest.param(
            "llama",
            said("num_key_value_heads", 4),
            BOTH,
            ArchitectureError,
            "16 rows, and config.json has 4 key-value heads",
            id="heads",
        ),
    ],
)
def test_what_cannot_be_rotated_is_refused(kind, edit, wanted, error, message, tmp_path):
    folder = source(kind, tmp_path / "m")
    if edit is not None:
        edit(folder)
    with pytest.raises(error, match=message):
        reader_of(folder, **wanted)


def test_a_width_without_a_hadamard_matrix_is_refused_and_a_random_rotation_taken(tmp_path):
    folder = source("llama", tmp_path / "m", hidden_size=52)  # heads of 13
    with pytest.raises(
        SpecError, match=r"rotation of hidden_size 52: no Hadamard matrix .* residual: random"
    ) as refused:
        reader_of(folder, **BOTH)
    assert isinstance(refused.value, LlmquantError)
    assert change(folder, written(reader_of(folder, residual="random"), tmp_path / "after")) < 1e-11
