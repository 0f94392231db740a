"""The model card: front matter a hub can read, facts from the manifest, and room for measured
figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from llmquant.checkpoint.card import (
    MEASURED_END,
    MEASURED_START,
    front_matter,
    measured,
    model_card,
)
from llmquant.checkpoint.manifest import read_manifest
from llmquant.quantization.options import QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe


def head_and_body(folder: Path) -> tuple[dict[str, Any], str]:
    text = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_front_matter_says_what_it_is_and_of_what(quantized: Path) -> None:
    head, _ = head_and_body(quantized)
    assert head == {
        "license": "apache-2.0",
        "language": ["en"],
        "base_model": "small",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["llmquant", "compressed-tensors", "int4"],
    }
    assert front_matter(quantized / "README.md") == head


def test_the_facts_are_the_manifests(quantized: Path) -> None:
    _, body = head_and_body(quantized)
    manifest = read_manifest(quantized)
    worst = max(manifest.modules, key=lambda n: manifest.modules[n].output_error or 0)
    for fact in (
        "# small, W4 g32 sym",
        f"{len(manifest.modules)} linear layers",
        f"{manifest.bits_per_weight:.3f} bits",
        f"{manifest.modules[worst].output_error:.3g} (`{worst}`)",
        "- `lm_head`: ignore pattern lm_head",
        (quantized / "recipe.yaml").read_text(encoding="utf-8"),
    ):
        assert fact in body


def test_the_markers_stand_once_and_in_order(quantized: Path) -> None:
    _, body = head_and_body(quantized)
    assert body.count(MEASURED_START) == body.count(MEASURED_END) == 1
    between = body.partition(MEASURED_START)[2].partition(MEASURED_END)[0]
    assert between.strip().startswith("Nothing was measured yet.")
    assert measured(quantized / "README.md") is None


def test_what_stands_between_the_markers_is_found(tampered: Path) -> None:
    card = tampered / "README.md"
    card.write_text(f"# x\n{MEASURED_START}\n| ppl |\n{MEASURED_END}\n", encoding="utf-8")
    assert measured(card) == "| ppl |"
    card.write_text(f"# x\n{MEASURED_START}\n| ppl |\n", encoding="utf-8")
    assert measured(card) is None
    assert measured(tampered / "no such card") is None


def test_the_base_model_can_be_named(model: Path, rtn: Recipe, tmp_path: Path) -> None:
    quantize(model, tmp_path / "q", rtn, QuantizeOptions(base_model="org/Small-1B"))
    head, body = head_and_body(tmp_path / "q")
    assert head["base_model"] == "org/Small-1B"
    assert "# Small-1B, W4 g32 sym" in body
    assert "The largest relative weight error" in body  # a data-free run knows no output error


CARDS = [
    pytest.param(
        "---\nlicense: mit\ntags: [a]\n---\n# x", {"license": "mit", "tags": ["a"]}, id="a card"
    ),
    pytest.param("# x\n---\nlicense: mit\n---\n", {}, id="rules, no front matter"),
    pytest.param("---\nlicense: mit\n", {}, id="no end"),
    pytest.param("---\n: : [\n---\n", {}, id="no yaml"),
    pytest.param("---\n- a\n---\n", {}, id="a list"),
    pytest.param("", {}, id="empty"),
]


@pytest.mark.parametrize(("text_", "expected"), CARDS)
def test_front_matter_of_other_cards(tmp_path: Path, text_: str, expected: dict[str, Any]) -> None:
    (tmp_path / "README.md").write_text(text_, encoding="utf-8")
    assert front_matter(tmp_path / "README.md") == expected


def test_no_card_no_front_matter(tmp_path: Path) -> None:
    assert front_matter(tmp_path / "README.md") == {}


@pytest.mark.parametrize("base", ["org/x: y", "a\n---\nlicense: stolen", "ü/✓", "'"])
def test_a_name_cannot_break_the_front_matter(quantized: Path, base: str) -> None:
    manifest = read_manifest(quantized).model_copy(update={"base_model": base})
    card = model_card(manifest, "", "W4 g32 sym", "compressed-tensors", {})
    head = next(yaml.safe_load_all(card))
    assert head["base_model"] == base
    assert "license" not in head
