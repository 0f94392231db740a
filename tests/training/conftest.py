"""What tests of training share: a folder to begin with, and a short run over it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_kit import SHORT, Train

from llmquant.recipe import Recipe
from llmquant.recipe_sections import QAT
from llmquant.training.options import QatEvents, QatOptions, QatResult
from llmquant.training.run import qat
from llmquant.training.stage import quantize


@pytest.fixture(scope="session")
def quantized(model: Path, rtn: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """W3 g32 between the extremes of each group, which leaves much to win back; read-only."""
    output = tmp_path_factory.mktemp("start") / "small-w3"
    return quantize(model, output, rtn.updated({"weights.bits": 3})).path


@pytest.fixture
def train(model: Path, quantized: Path, text: Path) -> Train:
    """Train the quantized folder; ``changes`` go into the section."""

    def train_(
        output: Path,
        start: Path = quantized,
        events: QatEvents | None = None,
        reference: Path = model,
        options: QatOptions | None = None,
        layout: str | None = None,
        seed: int = 0,
        **changes: Any,
    ) -> QatResult:
        section = QAT.model_validate({**SHORT, "source": f"file:{text}", **changes})
        return qat(
            start, output, section, reference=reference, events=events, options=options,
            layout=layout, seed=seed,
        )  # fmt: skip

    return train_
