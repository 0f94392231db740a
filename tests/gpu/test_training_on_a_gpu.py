"""On a GPU: training wins there what it wins on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from training_kit import SHORT

from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant.recipe_sections import QAT
from llmquant.training.options import QatOptions, QatResult
from llmquant.training.run import qat

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def start(model: Path, rtn: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("start") / "small-w3"
    return quantize(model, output, rtn.updated({"weights.bits": 3})).path


@pytest.mark.parametrize(
    ("size", "top_k"),
    [("scales", 32), ("scales", 0), ("codes", 32), ("lora", 32)],
    ids=["scales", "scales, all targets", "codes", "lora"],
)
def test_training_wins_what_it_wins_on_the_cpu(
    size: str, top_k: int, start: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    section = QAT.model_validate(
        {**SHORT, "source": f"file:{text}", "size": size, "top_k": top_k, "norms": "on"}
    )

    def trained(device: str, dtype: str) -> QatResult:
        return qat(
            start, tmp_path / f"{device}-{dtype}", section, reference=model,
            options=QatOptions(device=device, dtype=dtype),
        )  # fmt: skip

    here, there = trained("cpu", "float32"), trained("cuda", "float32")
    assert there.record.before == pytest.approx(here.record.before, rel=1e-3)
    assert there.record.after < there.record.before
    assert there.record.after == pytest.approx(here.record.after, rel=0.02)
    assert trained("cuda", "bfloat16").record.after == pytest.approx(here.record.after, rel=0.1)
