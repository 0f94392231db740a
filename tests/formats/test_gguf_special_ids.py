"""Which special tokens a GGUF file names: what begins a text, what pads it, and every token that
ends a turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmquant.conversion.gguf.file import export_gguf
from llmquant.conversion.gguf.importing import import_gguf
from llmquant.conversion.gguf.metadata import read_tokenizer
from llmquant.errors import LayoutError

TINY = Path(__file__).parents[2] / "examples" / "tiny-llama"


def _tokenizer_of(folder: Path, generation: dict[str, object], **settings: object) -> Path:
    """tiny-llama's tokenizer with other settings, and how the folder says to generate."""
    own = json.loads((TINY / "tokenizer_config.json").read_text())
    shutil.copy(TINY / "tokenizer.json", folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({**own, **settings}))
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 3, "pad_token_id": 5}))
    return folder


# tiny-llama: 0 begins, 1 <|end_of_text|>, 2 and 3 around a header, 4 <|eot_id|>, 5 pads, 300 a word
@pytest.mark.parametrize(
    ("generation", "settings", "eos", "further"),
    [
        ({"eos_token_id": [1, 4]}, {}, 1, {}),
        ({"eos_token_id": [2, 1, 3]}, {}, 1, {"eot": 2, "eom": 3}),
        ({"eos_token_id": 300}, {}, 1, {}),
        ({"eos_token_id": [2, 3]}, {"eos_token": None}, 2, {"eot": 3}),
        ({}, {"eos_token": None}, 3, {}),
        ({}, {"eos_token": {"content": "<|eot_id|>"}}, 4, {"eot": 3}),
    ],
    ids=["known by name", "two more", "a word", "by number", "of config.json", "as an object"],
)
def test_every_token_that_ends_a_turn_is_written(
    tmp_path: Path,
    generation: dict[str, object],
    settings: dict[str, object],
    eos: int,
    further: dict[str, int],
) -> None:
    """A file without eos would end at token 11 in llama.cpp."""
    found = read_tokenizer(_tokenizer_of(tmp_path, generation, **settings)).ids
    assert found["eos"] == eos
    assert {k: found[k] for k in ("eot", "eom") if k in found} == further
    assert found["pad"] == 5


def test_more_ends_of_a_turn_than_a_file_holds(tmp_path: Path) -> None:
    folder = _tokenizer_of(tmp_path, {"eos_token_id": [1, 0, 2, 3]})
    with pytest.raises(LayoutError, match="places for 2 of these; leave some out"):
        read_tokenizer(folder)


def test_ends_of_a_turn_come_back(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "m"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 1]}))
    import_gguf(export_gguf(folder, tmp_path / "m.gguf").path, tmp_path / "back")
    said = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert sorted(said["eos_token_id"]) == [1, 2, 4]  # 4 is <|eot_id|>, an end by its name
