"""A plan's numbers are those of the run, and a 70B plan needs headers only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from large_layout import seventy_billion
from tiny_models import CONFIGS, save
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from llmquant import QuantizeOptions, load_recipe, quantize
from llmquant.errors import ArchitectureError, FormatError, SpecError, UsageError
from llmquant.planning.forecast import forecast
from llmquant.planning.preview import make_plan
from llmquant.recipe import Recipe

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"
RTN = Recipe(method="rtn")

CASES = [
    pytest.param({}, id="W4 g128 sym"),
    pytest.param({"weights.symmetric": False, "weights.group_size": 64}, id="W4 g64 asym"),
    pytest.param({"weights.bits": 3, "weights.group_size": 32}, id="W3 g32"),
    pytest.param({"weights.bits": 8, "weights.group_size": -1}, id="W8 row"),
    pytest.param(
        {"weights.bits": 8, "weights.group_size": -1, "weights.activations": "int8-dynamic"},
        id="W8A8",
    ),
    pytest.param({"format": "gptq"}, id="gptq"),
    pytest.param({"format": "gptq_v2", "weights.symmetric": False}, id="gptq_v2 asym"),
    pytest.param({"format": "awq", "weights.symmetric": False}, id="awq asym"),
    pytest.param(
        {
            "overrides": (
                {"match": "*.down_proj", "bits": 8},
                {"match": "*.self_attn.*", "group_size": 32},
            )
        },
        id="mixed",
    ),
    pytest.param({"include": ("*.mlp.*",)}, id="mlp only"),
    pytest.param({"rotation": {}}, id="rotated: a head of its own"),
    pytest.param({"rotation": {}, "ignore": ()}, id="rotated: the head quantized"),
]


@pytest.mark.parametrize("changes", CASES)
def test_the_planned_bytes_are_the_bytes_written(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    recipe = RTN.updated(changes)
    plan = make_plan(TINY, recipe)
    result = quantize(TINY, tmp_path / "q", recipe, QuantizeOptions())
    assert plan.bytes_on_disk == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert plan.bits_per_weight == result.bits_per_weight
    assert {m.name for m in plan.modules} == {m.name for m in result.modules}
    assert plan.skipped == result.skipped


@pytest.mark.parametrize("kind", ["gpt_neox", "mixtral", "qwen3_moe"])
def test_a_plan_of_other_names_is_the_run(kind: str, tmp_path: Path) -> None:
    source, recipe = save(kind, tmp_path / "source"), RTN.updated({"weights.group_size": 16})
    plan, result = make_plan(source, recipe), quantize(source, tmp_path / "q", recipe)
    assert plan.bytes_on_disk == (tmp_path / "q" / "model.safetensors").stat().st_size
    assert {m.name for m in plan.modules} == {m.name for m in result.modules}
    assert plan.skipped == result.skipped


def seeing(folder: Path) -> Path:
    """A random model with eyes."""
    text = CONFIGS["mistral"].to_dict() | {"intermediate_size": 64}
    eyes = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}  # fmt: skip
    config = CONFIG_MAPPING["mistral3"](
        text_config=text,
        vision_config=eyes | {"num_attention_heads": 2, "head_dim": 16, "image_size": 28},
        tie_word_embeddings=False,
    )
    AutoModelForImageTextToText.from_config(config, dtype=torch.float16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda folder: save("llama", folder, intermediate_size=64), id="llama"),
        pytest.param(lambda folder: save("gpt2", folder, n_inner=64), id="gpt2: n_embd, n_head"),
        pytest.param(seeing, id="mistral3: in text_config"),
    ],
)
def test_widths_and_heads_are_known_by_whatever_key(
    make: Callable[[Path], Path], tmp_path: Path
) -> None:
    recipe = RTN.updated({"method": "gptq", "weights.group_size": 16})
    plan = make_plan(make(tmp_path / "source"), recipe)
    assert (plan.hidden, plan.tensor_parallel) == (32, (1,))
    tokens = recipe.calibration.nsamples * recipe.calibration.seqlen
    assert forecast(plan, recipe).states >= tokens * 32 * 4


def test_a_70b_layout_is_planned_from_headers(tmp_path: Path) -> None:
    plan = make_plan(seventy_billion(tmp_path / "llama-70b"), RTN)
    assert len(plan.modules) == 560
    assert plan.bits_per_weight == 4.125
    assert plan.tensor_parallel == (
        1,
        2,
        4,
        8,
        16,
    )  # engines repeat the 8 key-value heads over 16 GPUs
    # 68.45e9 weights in blocks at 4.125 bits, embeddings and head at 16.
    assert plan.bytes_on_disk == pytest.approx(
        68_451_041_280 * 4.125 / 8 + 2 * 128256 * 8192 * 2, rel=1e-3
    )


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        pytest.param(
            {"weights.group_size": 96, "weights.strict_groups": True},
            SpecError,
            "sizes that do: 8, 16",
            id="group size",
        ),
        pytest.param({"format": "nope"}, UsageError, "choose one of", id="format"),
        pytest.param({"format": "awq", "weights.bits": 3}, FormatError, "awq", id="awq has 4 bits"),
        pytest.param({"include": ("nothing",)}, UsageError, "matches none", id="pattern"),
        pytest.param({"ignore": ()}, UsageError, "shares its weights", id="tied head"),
        pytest.param(
            {"overrides": ({"match": "q_proj", "bits": 8},)},
            UsageError,
            "engines fuse",
            id="fused layers differ",
        ),
        pytest.param(
            {"format": "awq", "overrides": ({"match": "down_proj", "group_size": 32},)},
            FormatError,
            "mix",
            id="awq mix",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_work(
    changes: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        make_plan(TINY, RTN.updated(changes))


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "strange"}')
    (tmp_path / "model.safetensors").write_bytes((TINY / "model.safetensors").read_bytes())
    with pytest.raises(ArchitectureError, match="strange"):
        make_plan(tmp_path, RTN)


def test_a_quantized_model_is_not_planned(tmp_path: Path) -> None:
    quantize(TINY, tmp_path / "q", load_recipe("rtn-w4g128"))
    with pytest.raises(UsageError, match="already quantized"):
        make_plan(tmp_path / "q", RTN)
