"""A file that is not what its name says, or not all of it: the message says what it is and what to
do, and every command says the same."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from children import Run
from folder_kit import INDEX, RTN, SHARDS, SINGLE, Case, shards, write_case

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
HTML = b"<!DOCTYPE html>\n<html><head><title>504 Gateway Time-out</title></head></html>\n"


PLAIN = Case("", lambda f, t: None, tokenizer=True)


def whole(data: bytes) -> Callable[[bytes], bytes]:
    return lambda _: data


def header(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """Change the JSON header and its length."""

    def edit(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        text = change(data[8 : 8 + length])
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return edit


WEIGHTS = {
    "Git LFS pointer": (whole(POINTER), "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "web page": (whole(HTML), "a web page (HTML), not the file itself"),
    "web page without doctype": (whole(b"\n<html><body>Not found"), "a web page (HTML)"),
    "an S3 error": (whole(b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>'), "web page"),
    "a server's JSON": (whole(b'{"error": "Repository not found"}'), "JSON, not the file itself"),
    "empty": (whole(b""), "empty (0 bytes)"),
    "a few bytes": (lambda data: data[:5], "truncated, damaged or not safetensors"),
    "cut in the header": (lambda data: data[:100], "it has 100 bytes, fewer than its header needs"),
    "cut in the weights": (lambda data: data[:-10], "a download or a copy stopped"),
    "bytes behind the end": (lambda data: data + b"0", "truncated, damaged or not safetensors"),
    "header no JSON": (header(lambda text: b"!" + text[1:]), "truncated, damaged or not safetensors"),
    "header cut": (header(lambda text: text[:-20]), "its header is not JSON"),
    "zeros": (lambda data: bytes(len(data)), "truncated, damaged or not safetensors"),
    "a zip file": (whole(b"PK\x03\x04" + bytes(64)), "a pickle under another name"),
    "GGUF": (whole(b"GGUF\x03\x00\x00\x00" + bytes(64)), "a GGUF file under another name"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "words"), WEIGHTS.values(), ids=list(WEIGHTS))
def test_weights_that_are_none(
    damage: Callable[[bytes], bytes], words: str, tmp_path: Path, run: Run
) -> None:
    folder = write_case(PLAIN, tmp_path / "m")
    (folder / SINGLE).write_bytes(damage((folder / SINGLE).read_bytes()))
    refused_alike(folder, tmp_path / "q", run, words, SINGLE)


@pytest.mark.parametrize("data", [POINTER, HTML], ids=["Git LFS pointer", "web page"])
@pytest.mark.parametrize("name", [SHARDS[1], INDEX, "config.json"])
def test_any_file_of_the_folder(data: bytes, name: str, tmp_path: Path, run: Run) -> None:
    folder = write_case(Case("", shards, tokenizer=True), tmp_path / "m")
    (folder / name).write_bytes(data)
    words = "a Git LFS pointer" if data is POINTER else "a web page"
    refused_alike(folder, tmp_path / "q", run, words, name)


def refused_alike(folder: Path, out: Path, run: Run, words: str, name: str) -> None:
    commands = [
        ("quantize", folder, "-o", out, *RTN),
        ("plan", folder, *RTN),
        ("inspect", folder),
        ("convert", folder, "--to", "gptq", "-o", out),
        ("generate", folder, "Hello"),
    ]
    for command in commands:
        ran = run(*command)
        assert ran.code == 1, ran
        assert f"{folder / name}" in ran.err
        assert words in ran.err
    assert not out.exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_that_is_a_pointer(name: str, tmp_path: Path, run: Run) -> None:
    folder = write_case(PLAIN, tmp_path / "m")
    (folder / name).write_bytes(POINTER)
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 200, encoding="utf-8")
    calibrated = ("--group-size", "16", "--nsamples", "2", "--seqlen", "8")
    for command in (
        ("quantize", folder, "-o", tmp_path / "q", *calibrated, "--calibration", f"file:{text}"),
        ("plan", folder, *calibrated),
        ("quantize", folder, "-o", tmp_path / "q", *RTN),
        ("plan", folder, *RTN),
    ):
        ran = run(*command)
        assert (ran.code, "Git LFS pointer" in ran.err, name in ran.err) == (1, True, True), ran


def test_an_adapter_without_a_model(tmp_path: Path, run: Run) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "adapter_config.json").write_text("{}")
    for command in (("plan", tmp_path / "m"), ("inspect", tmp_path / "m")):
        ran = run(*command)
        assert (ran.code, "merge it into its base model first" in ran.err) == (2, True)


OWN_CODE = {
    "a known type, a value that cannot be": ({"num_attention_heads": 0}, "transformers cannot read"),
    "a known type, another width": ({"intermediate_size": 7}, "in the checkpoint, config.json makes it ["),
    "an unknown type": ({"model_type": "foreign"}, "names code in its own folder (auto_map)"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "words"), OWN_CODE.values(), ids=list(OWN_CODE))
def test_code_of_the_folder_is_blamed_only_where_the_type_is_its_own(
    changes: dict[str, object], words: str, tmp_path: Path, run: Run
) -> None:
    folder = write_case(PLAIN, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"auto_map": {"AutoModelForCausalLM": "own.Model", "AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps({**config, **changes, **auto_map}))
    for command in (
        ("quantize", folder, "-o", tmp_path / "q", *RTN),
        ("plan", folder, *RTN),
        ("inspect", folder),
        ("generate", folder, "Hello"),
    ):
        ran = run(*command)
        assert ran.code in (1, 2), ran
        assert words in ran.err
        assert ("auto_map" in ran.err) == ("auto_map" in words)


def test_a_tokenizer_that_fails_names_the_cause_and_then_the_code(tmp_path: Path, run: Run) -> None:
    folder = write_case(PLAIN, tmp_path / "m")
    config = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "Own"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    ran = run("plan", folder, "--group-size", "16")
    assert ran.code == 2
    assert "has no tokenizer that transformers can read: " in ran.err
    assert "code of its own for its tokenizer (auto_map), which llmquant never runs" in ran.err
