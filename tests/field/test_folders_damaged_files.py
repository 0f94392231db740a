"""A file that is not what its name says, or not all of it: the message says what it is and what to
do, and every command says the same."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from children import Run
from folder_kit import (
    EXAMPLE,
    INDEX,
    RTN,
    SHARDS,
    SINGLE,
    Case,
    configure,
    shards,
    write_case,
)
from tiny_models import TOKENIZER

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
    "brackets": (header(lambda text: b"[" * 200_000), "its header is not JSON"),
    "text": (whole(b"a text of no length" * 9), "its first bytes are not the length of a header"),
    "a numpy array": (whole(b"\x93NUMPY\x01\x00" + bytes(64)), "its first bytes are not the length"),
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


@pytest.mark.parametrize("target", ["/nowhere/blobs/0123", "{name}"], ids=["gone", "itself"])
@pytest.mark.parametrize("name", [SINGLE, SHARDS[1], INDEX, "config.json"])
def test_links_to_nothing(name: str, target: str, tmp_path: Path, run: Run) -> None:
    """A cache that was copied without its blobs."""
    case = PLAIN if name == SINGLE else Case("", shards, tokenizer=True)
    folder = write_case(case, tmp_path / "m")
    (folder / name).unlink()
    (folder / name).symlink_to(target.format(name=name))
    if name == "config.json" and "{" in target:
        refused_alike(folder, tmp_path / "q", run, "Too many levels of symbolic links", name)
    else:
        words = f"is a link to {target.format(name=name)}, which cannot be found"
        refused_alike(folder, tmp_path / "q", run, words, name)


def test_a_tokenizer_that_is_a_link_to_nothing(make_model: Any, tmp_path: Path, run: Run) -> None:
    folder = make_model()
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.json").symlink_to("/nowhere/blobs/0123")
    rtn = ("--method", "rtn", "--group-size", 32)
    for command in (
        ("quantize", folder, "-o", tmp_path / "q", *rtn),
        ("plan", folder, *rtn),
        ("generate", folder, "Hello"),
    ):
        ran = run(*command)
        assert (ran.code, "tokenizer.json is a link to /nowhere" in ran.err) == (1, True), ran


TOKENIZERS: dict[str, tuple[str, bytes, int, str]] = {
    "tokenizer cut": ("tokenizer.json", b'{"version": "1.0", "trunc', 1, "cannot be read as JSON"),
    "tokenizer of brackets": ("tokenizer.json", b"[" * 100_000, 1, "cannot be read as JSON"),
    "tokenizer a list": ("tokenizer.json", b"[]", 1, "not a JSON object"),
    "tokenizer config a list": ("tokenizer_config.json", b"[]", 1, "not a JSON object"),
    "added tokens a list": ("added_tokens.json", b"[1]", 1, "not a JSON object"),
    "generation config a list": ("generation_config.json", b"[]", 1, "not a JSON object"),
    "a length that is no number": ("tokenizer_config.json", b'{"model_max_length": "x"}', 2, "model_max_length in tokenizer_config.json is 'x'"),
    "a class that is no name": ("tokenizer_config.json", b'{"tokenizer_class": 5}', 2, "no tokenizer that"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "data", "code", "words"), TOKENIZERS.values(), ids=list(TOKENIZERS)
)
def test_tokenizers_that_are_none_whoever_asks(
    name: str, data: bytes, code: int, words: str, make_model: Any, tmp_path: Path, run: Run
) -> None:
    folder = make_model()
    (folder / name).write_bytes(data)
    text = tmp_path / "text.txt"
    text.write_text("one two three " * 200, encoding="utf-8")
    calibrated = (
        "--group-size",
        32,
        "--nsamples",
        2,
        "--seqlen",
        8,
        "--calibration",
        f"file:{text}",
    )
    for command in (
        ("quantize", folder, "-o", tmp_path / "q", *calibrated),
        ("plan", folder, *calibrated),
        ("generate", folder, "Hello"),
        ("eval", folder, "--text", text, "--window", 16, "--no-cost"),
    ):
        ran = run(*command)
        assert (ran.code, words in ran.err) == (code, True), ran
    assert not (tmp_path / "q").exists()


def test_a_folder_without_a_tokenizer_says_so(make_model: Any, run: Run) -> None:
    folder = make_model()
    for file in TOKENIZER:
        (folder / file).unlink()
    ran = run("generate", folder, "Hello")
    assert (ran.code, "it has no tokenizer.json, tokenizer.model or vocab" in ran.err) == (2, True)


def test_ids_that_the_embedding_has_no_row_for(tmp_path: Path, run: Run) -> None:
    folder = write_case(PLAIN, tmp_path / "m")  # 64 rows, and a tokenizer of 4096
    text = EXAMPLE / "heldout.txt"
    windows = ("--nsamples", 2, "--seqlen", 8, "--calibration", f"file:{text}")
    for command in (
        ("generate", folder, "Hello"),
        ("eval", folder, "--text", text, "--window", 16, "--no-cost"),
        ("quantize", folder, "-o", tmp_path / "q", "--group-size", 16, *windows),
    ):
        ran = run(*command)
        assert (ran.code, "the model's embedding has 64 rows" in ran.err) == (2, True), ran


VALUES: dict[str, tuple[dict[str, object], int, str]] = {
    "no blocks": ({"num_hidden_layers": 0}, 2, "no decoder blocks"),
    "fewer than no blocks": ({"num_hidden_layers": -1}, 2, "num_hidden_layers is -1"),
    "padding beyond the vocabulary": ({"pad_token_id": 99_999}, 2, "Padding_idx"),
    "no vocabulary": ({"vocab_size": 0}, 2, "can be built"),
    "an unknown activation": ({"hidden_act": "swishy"}, 2, "swishy"),
    "an unknown dtype": ({"dtype": "float17"}, 2, "float17"),
    "unknown kinds of layers": ({"layer_types": ["a", "b"]}, 2, "layer_types"),
    "a label that is a list": ({"quantization_config": [1]}, 1, "quantization_config is [1], not a mapping"),
    "a label that is a word": ({"quantization_config": "gptq"}, 1, "quantization_config is 'gptq', not"),
    "a label without a method": ({"quantization_config": {"bits": 4}}, 1, "config.json: a quantization config without quant_method"),
    "a method that is no name": ({"quantization_config": {"quant_method": 4}}, 1, "quant_method is 4, not a name"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "code", "words"), VALUES.values(), ids=list(VALUES))
def test_values_that_cannot_be(
    changes: dict[str, object], code: int, words: str, tmp_path: Path, run: Run
) -> None:
    folder = write_case(PLAIN, tmp_path / "m")
    configure(folder, **changes)
    for command in (
        ("quantize", folder, "-o", tmp_path / "q", *RTN),
        ("plan", folder, *RTN),
        *([("inspect", folder), ("generate", folder, "a")] if words != "no decoder blocks" else []),
    ):
        ran = run(*command)
        assert (ran.code, words in ran.err) == (code, True), ran
    assert not (tmp_path / "q").exists()


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
