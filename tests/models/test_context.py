"""How long an input a model takes, by whatever name its config calls that; the same everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest
from children import Run
from sweep import built
from transformers import (
    BloomConfig,
    Gemma3Config,
    GPT2Config,
    LlamaConfig,
    MptConfig,
    PreTrainedConfig,
)

import llmquant


@pytest.mark.parametrize(
    ("config", "context"),
    [
        pytest.param(LlamaConfig(max_position_embeddings=128), 128, id="llama"),
        pytest.param(GPT2Config(n_positions=64), 64, id="another name that transformers knows"),
        pytest.param(MptConfig(max_seq_len=96), 96, id="another name that it does not know"),
        pytest.param(
            Gemma3Config(text_config={"max_position_embeddings": 256}), 256, id="of the text part"
        ),
        pytest.param(BloomConfig(), None, id="none"),
        pytest.param(LlamaConfig(max_position_embeddings=0), None, id="zero"),
    ],
)
def test_of_a_config(config: PreTrainedConfig, context: int | None) -> None:
    assert llmquant.context_length(config) == context


@pytest.fixture(scope="module")
def mpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that fails inside transformers beyond its context."""
    folder = tmp_path_factory.mktemp("context") / "mpt"
    assert built("mpt", folder, max_seq_len=64) is None
    return folder


@pytest.mark.parametrize(
    ("command", "told"),
    [
        pytest.param(
            ["generate", "{model}", "a b c", "--raw", "--max-new-tokens", "64"],
            "the model's 64 positions",
            id="generate",
        ),
        pytest.param(
            ["quantize", "{model}", "-o", "out", "--recipe", "gptq-w8", "--seqlen", "65",
             "--nsamples", "2", "--calibration", "file:{text}"],
            "seqlen=65 is more than the model's 64 positions",
            id="quantize",
        ),
        pytest.param(
            ["eval", "{model}", "--text", "file:{text}", "--protocol", "ppl/gptq-65"],
            "a window of 65 tokens is longer than the 64",
            id="eval",
        ),
    ],
)  # fmt: skip
def test_beyond_it(run: Run, tmp_path: Path, mpt: Path, command: list[str], told: str) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a story of a cat " * 100)
    ended = run(*(part.format(model=mpt, text=text) for part in command))
    assert (ended.code, told in ended.err) == (2, True), ended


def test_keys_and_values_of_a_whole_context_count(mpt: Path) -> None:
    whole, same, half = (llmquant.running_bytes(mpt, 0, n) for n in (None, 64, 32))
    assert whole == same > half


def test_a_recipes_windows_fit_it(run: Run, tmp_path: Path, mpt: Path) -> None:
    """2048 tokens are wanted and 64 there; what the result's recipe says is what was used. A length
    that is asked for, by an option or the word for it, is refused above."""
    text, strict = tmp_path / "text.txt", tmp_path / "strict.yaml"
    text.write_text("a story of a cat " * 100)
    asked = ("--nsamples", "2", "--calibration", f"file:{text}")
    told = "the model has 64 positions, so a calibration window has 64 tokens instead of the recipe's 2,048"
    for command in (("plan", mpt), ("quantize", mpt, "-o", "out")):
        ended = run(*command, "--recipe", "gptq-w8", *asked)
        assert ended.code == 0, ended
        assert told in " ".join(f"{ended.out} {ended.err}".split())
    assert llmquant.load_recipe("out/recipe.yaml").calibration.seqlen == 64
    again = run(
        "quantize",
        mpt,
        "-o",
        "again",
        "--recipe",
        "out/recipe.yaml",
        "--calibration",
        f"file:{text}",
    )
    assert (again.code, told in again.err) == (0, False)
    assert (Path("again") / "model.safetensors").read_bytes() == (
        Path("out") / "model.safetensors"
    ).read_bytes()
    strict.write_text("method: gptq\nweights: {bits: 8}\ncalibration: {strict_seqlen: true}\n")
    refused = run("quantize", mpt, "-o", "no", "--recipe", strict, *asked)
    assert (refused.code, "seqlen=2048 is more than" in refused.err) == (2, True), refused
