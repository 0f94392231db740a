"""Refusals name the cause, not its last symptom, in a few lines, and exit with 2 where another
request would be right."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from eval_kit import llmquant_command
from tiny_models import EXAMPLE, TOKENIZER
from transformers import AutoModelForCausalLM, RwkvConfig, T5Config, ViTConfig

SMALL = {"vocab_size": 4096, "bos_token_id": 0, "eos_token_id": 1}
CONFIGS: dict[str, Any] = {
    "rwkv": RwkvConfig(hidden_size=64, num_hidden_layers=2, **SMALL),
    "t5": T5Config(d_model=64, num_layers=2, num_heads=4, d_ff=96, **SMALL),
    "vit": ViTConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2),
}
RTN = ("--method", "rtn", "--group-size", "32")
WRONG_GROUP = re.compile(r"sizes that do: ([0-9, ]+), or -1")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, make_model: Any) -> dict[str, Path]:
    made = {"llama": make_model()}
    made["rwkv"] = tmp_path_factory.mktemp("rwkv")
    AutoModelForCausalLM.from_config(CONFIGS["rwkv"]).save_pretrained(made["rwkv"])
    for name in ("t5", "vit"):
        made[name] = Path(shutil.copytree(made["llama"], tmp_path_factory.mktemp(name) / name))
        CONFIGS[name].save_pretrained(made[name])
    for folder in made.values():
        for file in TOKENIZER:
            shutil.copyfile(EXAMPLE / file, folder / file)
    return made


@pytest.mark.parametrize("command", ["quantize", "plan"])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param(
            "rwkv", "'rwkv' keeps weights in 10 three-dimensional tensors", id="no matrix"
        ),
    ],
)
def test_kinds_of_models(
    name: str, words: str, command: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    output = ("-o", tmp_path / "out") if command == "quantize" else ()
    ran = llmquant_command(command, folders[name], *output, *RTN)
    assert ran.code == 2
    assert words in ran.said


@pytest.mark.parametrize("name", ["t5", "vit"])
def test_the_classes_of_transformers_are_not_listed(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ran = llmquant_command("quantize", folders[name], "-o", tmp_path / "out", *RTN)
    assert ran.code == 2
    assert len(ran.err[ran.err.index("error:") :]) < 800
    assert "LlamaConfig" not in ran.err


@pytest.mark.parametrize(
    ("file", "package"),
    [
        ("tokenizer.model", "sentencepiece"),
        ("spiece.model", "sentencepiece"),
        ("tiktoken.model", "tiktoken"),
        ("tekken.json", "mistral_common"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "eval"])
def test_a_tokenizer_whose_package_is_missing(
    file: str, package: str, command: str, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_model()
    for name in TOKENIZER:
        (folder / name).unlink()
    (folder / file).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    monkeypatch.setattr("llmquant.models.from_folder.find_spec", lambda _: None)
    more = ("hello",) if command == "generate" else ("--text", EXAMPLE / "heldout.txt", "--no-cost")
    ran = llmquant_command(command, folder, *more)
    assert ran.code == 2
    assert f"its tokenizer is {file} alone" in ran.said
    assert f"pip install {package}" in ran.said


@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_group_sizes_that_are_named_fit_every_linear(
    command: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    output = ("-o", tmp_path / "out") if command == "quantize" else ()
    arguments = (command, folders["llama"], *output, "--method", "rtn")
    ran = llmquant_command(*arguments, "--group-size", 64)
    assert ran.code == 2
    found = WRONG_GROUP.search(ran.said)
    assert found is not None
    assert found[1] == "8, 16, 32"
    for size in found[1].split(", "):
        assert (
            llmquant_command("plan", folders["llama"], "--method", "rtn", "--group-size", size).code
            == 0
        )


MISUSE: list[tuple[str, tuple[str, ...], str]] = [
    ("quantize: not there", ("quantize", "acme/nope", "-o", "{out}", *RTN), "acme/nope"),
    ("quantize: no model", ("quantize", "{empty}", "-o", "{out}", *RTN), "config.json is missing"),
    ("quantize: pickles", ("quantize", "{pickle}", "-o", "{out}", *RTN), "only pickle files"),
    ("quantize: layout", ("quantize", "{llama}", "-o", "{out}", *RTN, "--format", "awq", "--bits", "3"), "awq cannot hold"),
    ("plan: no model", ("plan", "{empty}"), "config.json is missing"),
    ("allocate: no model", ("allocate", "{empty}", "-o", "{out}.yaml", "--target-bpw", "4", "--calibration", "file:{text}"), "config.json is missing"),
    ("inspect: no model", ("inspect", "{empty}"), "config.json is missing"),
    ("inspect: no record", ("inspect", "{llama}", "--verify"), "has no manifest.json"),
    ("verify: no record", ("verify", "{llama}"), "has no manifest.json"),
    ("convert: no model", ("convert", "{empty}", "--to", "gptq", "-o", "{out}"), "config.json is missing"),
    ("convert: dense", ("convert", "{llama}", "--to", "gptq", "-o", "{out}"), "is not quantized"),
    ("generate: no model", ("generate", "{empty}", "hello"), "config.json is missing"),
    ("eval: no model", ("eval", "{empty}", "--text", "file:{text}"), "config.json is missing"),
    ("eval: no text", ("eval", "{llama}", "--text", "file:{text}.no"), "cannot be read"),
    ("eval: not a list of models", ("eval", "ftp://host/v1", "--text", "file:{text}"), "ftp://host/v1"),
    ("leaderboard: nothing", ("leaderboard", "{empty}"), "no *.json report"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"), [pytest.param(*row[1:], id=row[0]) for row in MISUSE]
)
def test_another_request_is_right(
    arguments: tuple[str, ...], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    pickle = Path(shutil.copytree(folders["llama"], tmp_path / "pickle"))
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    places = {
        "llama": folders["llama"], "empty": tmp_path / "empty", "pickle": pickle,
        "out": tmp_path / "out", "text": EXAMPLE / "heldout.txt",
    }  # fmt: skip
    ran = llmquant_command(*(a.format(**places) for a in arguments))
    assert ran.code == 2, ran.err
    assert words in ran.said
    assert not (tmp_path / "out").exists()


PATHS: list[tuple[str, tuple[str, ...], str]] = [
    ("a link to nothing", ("plan", "{link}"), "is a link to /nowhere/m, which cannot be found"),
    ("a link to itself", ("plan", "{loop}"), "which cannot be found"),
    ("a page of the hub", ("plan", "https://huggingface.co/acme/tiny-1.1b/tree/main"), "; give acme/tiny-1.1b"),
    ("a file of it", ("plan", "{llama}/config.json"), "is a file; give the model folder"),
    ("two lines", ("plan", "a\nb"), "neither a folder nor a hub name"),
    ("no UTF-8", ("plan", "\udcff"), "neither a folder nor a hub name"),
    ("the log is a folder", ("quantize", "{llama}", "-o", "{out}", *RTN, "--log", "{llama}"), "is a folder; give a file"),
    ("the log is nowhere", ("quantize", "{llama}", "-o", "{out}", *RTN, "--log", "{out}/no/log"), "does not exist; give a file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "words"), [pytest.param(*row[1:], id=row[0]) for row in PATHS]
)
def test_paths_that_are_none(
    arguments: tuple[str, ...], words: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to("/nowhere/m")
    (tmp_path / "loop").symlink_to("loop")
    places = {"llama": folders["llama"], **{n: tmp_path / n for n in ("link", "loop", "out")}}
    ran = llmquant_command(*(a.format(**places) for a in arguments))
    assert (ran.code, words in ran.said) == (2, True), ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["m\u00f6del \u6a21\u578b x", "a 'b' #c", "-x"])
def test_folders_of_any_name(
    name: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out, text = tmp_path / name, tmp_path / f"q {name}", tmp_path / f"{name}.txt"
    shutil.copytree(folders["llama"], model)
    shutil.copyfile(EXAMPLE / "heldout.txt", text)
    options = ("--group-size", 32, "--nsamples", 2, "--seqlen", 16, "--calibration", f"file:{text}")
    report = tmp_path / "reports" / f"{name}.json"
    report.parent.mkdir()
    for command in (
        ("quantize", model, "-o", out, *options),
        ("verify", out),
        ("inspect", out, "--json"),
        ("convert", out, "--to", "gptq", "-o", f"{out} gptq"),
        ("eval", out, "--text", text, "--window", 32, "--max-windows", 2, "--no-cost", "--output", report),
        ("leaderboard", tmp_path / "reports", "--html", f"{out}.html", "--markdown", f"{out}.md"),
    ):  # fmt: skip
        ran = llmquant_command(*command)
        assert ran.code == 0, (command, ran.err)


def test_a_name_that_is_no_utf8_is_refused_before_work(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    strange = tmp_path / os.fsdecode(b"mod\xe8le")
    shutil.copytree(folders["llama"], strange)
    for model, out in ((strange, tmp_path / "q"), (folders["llama"], Path(f"{strange}-q"))):
        ran = llmquant_command("quantize", model, "-o", out, *RTN)
        assert (ran.code, "is not UTF-8" in ran.said) == (2, True), ran.err
        assert not out.exists()


def test_the_locale_c_knows_every_name(folders: dict[str, Path], tmp_path: Path) -> None:
    """Its Python has all bytes beyond ASCII as half characters."""
    model, out = tmp_path / "m\u00f6del", tmp_path / "\u00e4us"
    shutil.copytree(folders["llama"], model)
    c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = [sys.executable, "-m", "llmquant", "quantize", model, "-o", out, *RTN]
    ran = subprocess.run(words, env=os.environ | c, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    manifest = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["base_model"].endswith("m\u00f6del")
    assert llmquant_command("verify", out).code == 0


def test_a_tilde_is_the_home_folder(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert llmquant_command("quantize", folders["llama"], "--output=~/q", *RTN).code == 0
    assert (tmp_path / "home" / "q" / "manifest.json").is_file()
    assert not (tmp_path / "~").exists()
