"""The files beside the weights: everything that is not weights goes along, byte for byte, and what
stays behind is named. Through ``quantize`` and ``convert``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from children import Ended, Run


def with_files(folder: Path, model: Path, *names: str) -> Path:
    shutil.copytree(model, folder)
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}" if name.endswith(".json") else f"the text of {name}\0".encode())
    return folder


RTN = ("--method", "rtn", "--group-size", "32")

CARRIED = [
    "additional_chat_templates/tool_use.jinja",
    "additional_chat_templates/rag.jinja",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model.v3",
    "tekken.json",
    "tiktoken.model",
    "qwen.tiktoken",
    "processor_config.json",
    "video_preprocessor_config.json",
    "LICENSE.md",
    "LICENSE-MODEL",
    "LICENCE",
    "NOTICE.txt",
    "Notice",
    "USE_POLICY.md",
    "configuration_mine.py",
    "tokenization_mine.py",
    "params.json",
    "generation_config_for_text_generation.json",
    "assets/picture.png",
]
LEFT = {
    "pytorch_model.bin": "other weights",
    "model.fp16.safetensors": "not read",
    "consolidated.safetensors": "not read",
    "consolidated.00.pth": "other weights",
    "ggml-model-q4_0.gguf": "other weights",
    "flax_model.msgpack": "other weights",
    "training_args.bin": "other weights",
    "original/consolidated.00.pth": "holds weights",
    "original/params.json": "holds weights",
    "checkpoint-500/model.safetensors": "holds weights",
    "onnx/model.onnx": "holds weights",
    "adapter_config.json": "belongs to an adapter",
}
UNSAID = [
    ".gitattributes",
    ".cache/huggingface/x.lock",
    "__pycache__/configuration_mine.cpython.pyc",
]


def check(source: Path, result: Path, ran: Ended) -> None:
    assert ran.code == 0, ran.said
    for name in CARRIED:
        assert (result / name).read_bytes() == (source / name).read_bytes(), name
    for name, reason in LEFT.items():
        assert not (result / name).exists(), name
        shown = f"{name.split('/')[0]}/" if "/" in name else name
        # Safetensors files are named by who reads the weights, and by nobody else.
        mark = "not read: " if reason == "not read" else f"({reason})"
        (sentence,) = (s for s in ran.said.split("warning: ") if mark in s)
        # A list names the first six.
        assert shown in sentence or "more" in sentence, (name, sentence)
    for name in UNSAID:
        assert not (result / name).exists()
        assert name.split("/")[0] not in ran.said
    assert "copied, but not run: configuration_mine.py, tokenization_mine.py" in ran.said


def test_everything_that_is_not_weights_goes_along(model: Path, tmp_path: Path, run: Run) -> None:
    source = with_files(tmp_path / "m", model, *CARRIED, *LEFT, *UNSAID)
    # Without these the folder would be read by another rule than that of its own index.
    assert (source / "model.safetensors").stat().st_size > 1000
    ran = run("quantize", source, "-o", tmp_path / "q", *RTN)
    check(source, tmp_path / "q", ran)
    assert run("verify", tmp_path / "q").code == 0

    for name in (*LEFT, *UNSAID):
        path = tmp_path / "q" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not name.startswith("checkpoint") and not name.endswith(".safetensors"):
            path.write_bytes(b"{}")
    again = run("convert", tmp_path / "q", "-o", tmp_path / "c", "--to", "gptq")
    assert again.code == 0, again.said
    for name in CARRIED:
        assert (tmp_path / "c" / name).read_bytes() == (source / name).read_bytes(), name
    assert "left behind in the model folder (other weights): " in again.said
    assert run("verify", tmp_path / "c").code == 0


def test_a_file_that_goes_along_is_proved_like_the_others(
    model: Path, tmp_path: Path, run: Run
) -> None:
    source = with_files(tmp_path / "m", model, "additional_chat_templates/tool_use.jinja")
    assert run("quantize", source, "-o", tmp_path / "q", *RTN).code == 0
    template = tmp_path / "q" / "additional_chat_templates" / "tool_use.jinja"
    template.write_bytes(template.read_bytes() + b" ")
    ran = run("verify", tmp_path / "q")
    assert ran.code == 1
    assert "additional_chat_templates/tool_use.jinja is not the file that was written" in ran.said
    template.unlink()
    assert "is in the manifest but not in the folder" in run("verify", tmp_path / "q").err


@pytest.mark.parametrize(
    "name", ["extra.jinja", "additional_chat_templates/new.jinja", "vocab.txt"]
)
def test_a_file_that_engines_load_and_nobody_wrote_is_found(
    quantized: Path, tmp_path: Path, run: Run, name: str
) -> None:
    folder = with_files(tmp_path / "q", quantized, name)
    ran = run("verify", folder)
    assert ran.code == 1
    assert name in ran.said


def test_what_is_no_file_of_the_folder_is_named(model: Path, tmp_path: Path, run: Run) -> None:
    source = with_files(tmp_path / "m", model)
    (tmp_path / "templates").mkdir()
    (source / "additional_chat_templates").symlink_to(tmp_path / "templates")
    (source / "again").symlink_to(".")
    (source / "LICENSE").symlink_to("/nowhere/LICENSE")
    os.mkfifo(source / "pipe")
    ran = run("quantize", source, "-o", tmp_path / "q", *RTN)
    assert ran.code == 0, ran.said
    for said in (
        "(a link to a folder): additional_chat_templates, again",
        "(a link to nothing): LICENSE",
        "(no file): pipe",
    ):
        assert said in ran.said


CONFIGS = {
    "copied": ({"AutoConfig": "configuration_mine.Mine"}, ["configuration_mine.py"], None),
    "of another repository": ({"AutoConfig": "org/code--configuration_mine.Mine"}, [], None),
    "not there": (
        {"AutoConfig": "configuration_mine.Mine"},
        [],
        "auto_map in config.json names configuration_mine.py, which the model folder does not have",
    ),
    "in a list": (
        {"AutoTokenizer": [None, "tokenization_mine.Fast"]},
        [],
        "auto_map in config.json names tokenization_mine.py, which the model folder does not have",
    ),
}


@pytest.mark.parametrize(("auto_map", "files", "said"), CONFIGS.values(), ids=CONFIGS)
def test_auto_map_is_kept_with_the_code_that_it_names(
    model: Path, tmp_path: Path, run: Run, auto_map: Any, files: list[str], said: str | None
) -> None:
    source = with_files(tmp_path / "m", model, *files)
    for name in files:  # running it would be seen
        (source / name).write_text("raise SystemExit(77)\n", encoding="utf-8")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (source / "config.json").write_text(json.dumps({**config, "auto_map": auto_map}), "utf-8")
    ran = run("quantize", source, "-o", tmp_path / "q", *RTN)
    assert ran.code == 0, ran.said
    written = json.loads((tmp_path / "q" / "config.json").read_text(encoding="utf-8"))
    assert written["auto_map"] == auto_map
    assert all((tmp_path / "q" / name).is_file() for name in files)
    if said is None:
        assert "auto_map" not in ran.said
    else:
        assert said in ran.said


def test_a_changed_template_is_another_run(
    model: Path, tmp_path: Path, run: Run, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What goes along is part of what a run is: a resumed one would mix two."""
    from llmquant.quantization.state.resume import SavedRun

    name = "additional_chat_templates/tool_use.jinja"
    source = with_files(tmp_path / "m", model, name)
    options = (
        "--group-size",
        "32",
        "--nsamples",
        "2",
        "--seqlen",
        "32",
        "--calibration",
        f"file:{text}",
    )

    def interrupted(self: SavedRun, done: object) -> None:
        done_before(self, done)
        raise KeyboardInterrupt

    done_before = SavedRun.block_done
    with monkeypatch.context() as patch:
        patch.setattr(SavedRun, "block_done", interrupted)
        assert run("quantize", source, "-o", tmp_path / "q", *options).code == 130
    (source / name).write_text("another", encoding="utf-8")
    ran = run("quantize", source, "-o", tmp_path / "q", *options)
    assert ran.code == 2
    assert f"{name} of the model was" in ran.said
