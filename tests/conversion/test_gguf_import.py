"""``llmquant import``: there and back, what is kept packed, what is refused, and a GGUF file where
a folder is taken."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_kit
import numpy as np
import pytest
import torch
from children import Run
from tiny_models import random_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import llmquant
from llmquant.checkpoint.reader import CheckpointReader
from llmquant.conversion.gguf.file import export_gguf

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-llama"
OWN: dict[str, Any] = {"vocab_size": gguf_kit.VOCAB, "eos_token_id": gguf_kit.EOS, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}  # fmt: skip
TEXTS = [
    "Hello world, it's 2024: 12 + 34 = 46\n\n  indented\ttabs",
    "naïve café 東京 привет 🙂 \u00a0 e\u0301",
    "<|im_start|>user\nhell world<|im_end|>\n<|endoftext|>",
    " leading", "", "trailing  ",
]  # fmt: skip


@pytest.fixture(scope="module")
def q8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    return gguf_kit.file_of(folder / "m.gguf", random_model("llama", **OWN), "llama", "Q8_0")


def shards(path: Path, folder: Path) -> list[Path]:
    """A file's tensors in two shards, as llama.cpp's gguf-split makes them."""
    tensors = gguf.GGUFReader(path).tensors
    folder.mkdir()
    model = random_model("llama", **OWN)
    said = {**gguf_kit.metadata(model, "llama"), **gguf_kit.tokenizer()}
    stored = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in tensors}
    names = list(stored)
    found = []
    for i, part in enumerate((names[:5], names[5:])):
        more = {"split.no": i, "split.count": 2, "split.tensors.count": len(names)}
        file = folder / f"m-{i + 1:05d}-of-00002.gguf"
        own = {**(said if i == 0 else {}), **more}
        found.append(gguf_kit.write(file, {n: stored[n] for n in part}, own, "llama", "Q8_0"))
    return found


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return CheckpointReader(folder).read_all()


def test_there_and_back(run: Run, tmp_path: Path, model: Path) -> None:
    """A folder as GGUF and imported again: the same config, tensors, tokens and template."""
    export_gguf(model, tmp_path / "m.gguf")
    told = run("import", "m.gguf", "-o", "back")
    assert told.code == 0, told.err
    assert "proved: 21 tensors" in told.out
    before, after = tensors_of(model), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    mine, theirs = (json.loads((p / "config.json").read_text()) for p in (tmp_path / "back", model))
    same = {"rms_norm_eps", "rope_parameters", "num_key_value_heads", "vocab_size", "dtype"}
    assert {k: mine.get(k) for k in same} == {k: theirs.get(k) for k in same}
    assert mine["bos_token_id"] == 0
    old, new = (AutoTokenizer.from_pretrained(p) for p in (model, tmp_path / "back"))
    for text in TEXTS:
        assert old(text).input_ids == new(text).input_ids, text
    assert old.chat_template == new.chat_template


@pytest.mark.parametrize("pre", ["qwen2", "llama-bpe", "gpt-2"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_tokens_are_transformers_own(tmp_path: Path, run: Run, pre: str, kind: str) -> None:
    model = random_model(kind, **OWN)
    gguf_kit.file_of(tmp_path / "m.gguf", model, kind, tokenizer__ggml__pre=pre)
    assert run("import", "m.gguf", "-o", "m").code == 0
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    ours = AutoTokenizer.from_pretrained(tmp_path / "m")
    nfc = [t for t in TEXTS if "\u0301" not in t]  # Qwen2's class composes, its GGUF does not
    for text in nfc if kind == "qwen2" else TEXTS:
        if kind != "qwen2" or pre == "qwen2":  # Qwen2's class has splitting rules of its own
            assert ours(text).input_ids == theirs(text).input_ids, text
    chat = [{"role": "user", "content": "hell world"}]
    assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat)
    assert ours.chat_template == gguf_kit.TEMPLATE
    assert ours.eos_token_id == gguf_kit.EOS


def test_what_the_dtype_rounds_is_counted_and_said(run: Run, tmp_path: Path, q8: Path) -> None:
    stored = {
        t.name: torch.from_numpy(gguf.quants.dequantize(t.data, t.tensor_type).copy())
        for t in gguf.GGUFReader(q8).tensors
    }
    rounded = sum(int((w.half().float() != w).sum()) for w in stored.values())
    words = f"{rounded:,} of {sum(w.numel() for w in stored.values()):,} weights were rounded once, to float16"
    assert rounded
    ran = run("import", q8, "-o", tmp_path / "m")
    assert f"are what was read; {words}\n" in ran.out
    assert words in (tmp_path / "m" / "README.md").read_text()
    ran = run("import", q8, "-o", tmp_path / "whole", "--dtype", "float32")
    assert "are what was read\n" in ran.out
    assert "rounded" not in (tmp_path / "whole" / "README.md").read_text()


def test_shards_are_one_model(run: Run, tmp_path: Path, q8: Path) -> None:
    first, second = shards(q8, tmp_path / "s")
    assert run("import", str(q8), "-o", "whole").code == 0
    for given in (first, second):
        told = run("import", str(given), "-o", f"from-{given.stem}")
        assert told.code == 0, told.err
        parts = tensors_of(tmp_path / f"from-{given.stem}")
        assert all(torch.equal(t, parts[n]) for n, t in tensors_of(tmp_path / "whole").items())
    second.unlink()
    told = run("import", str(first), "-o", "none")
    assert (told.code, "m-00002-of-00002.gguf is not beside it" in told.err) == (1, True)
    assert not (tmp_path / "none").exists()


def test_shards_under_each_others_names(run: Run, tmp_path: Path, q8: Path) -> None:
    first, second = shards(q8, tmp_path / "s")
    first.rename(tmp_path / "s" / "other")
    second.rename(first)
    (tmp_path / "s" / "other").rename(second)
    told = run("import", str(first), "-o", "none")
    assert told.code == 1
    assert "m-00001-of-00002.gguf is shard 2 of its model, and its name says 1" in told.err


@pytest.mark.parametrize("layout", ["compressed-tensors", "gptq", "gptq_v2"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_packed_keeps_every_code(run: Run, tmp_path: Path, kind: str, layout: str) -> None:
    """Loaded, the linears are what the gguf package reads in the file, in transformers' order."""
    model = random_model("llama", **OWN)
    path = gguf_kit.file_of(tmp_path / "m.gguf", model, "llama", kind)
    told = run("import", "m.gguf", "--packed", "--format", layout, "-o", "p", "--dtype", "float32" if layout == "compressed-tensors" else "auto")  # fmt: skip
    assert told.code == 0, told.err
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    ours = llmquant.load(tmp_path / "p", dtype="float32", kernel="reference")
    packed = 0
    for name, module in ours.named_modules():
        if type(module).__name__ == "PackedLinear":
            packed += 1
            assert torch.equal(module.dequantize(torch.float32), theirs.get_submodule(name).weight)
    # seven of each block, and the head where its 268 rows fill whole words
    assert packed == 14 + (kind == "Q8_0" or layout == "compressed-tensors")
    assert run("inspect", "p", "--verify").code == 0
    assert run("convert", "p", "--to", "dense", "--dtype", "float32", "-o", "d").code == 0


def test_what_llmquant_packed_comes_back_packed(
    run: Run, tmp_path: Path, model: Path, rtn: Any
) -> None:
    llmquant.quantize(model, tmp_path / "q", rtn)
    assert run("convert", "q", "--to", "gguf", "-o", "q.gguf").code == 0
    told = run("import", "q.gguf", "--packed", "-o", "back")
    assert told.code == 0, told.err
    before, after = (llmquant.load(tmp_path / n, dtype="float32") for n in ("q", "back"))
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        assert torch.equal(before(ids).logits, after(ids).logits)


def test_packed_names_what_engines_fuse_and_the_file_has_apart(run: Run, tmp_path: Path) -> None:
    """Of q, k and v one in Q8_0, another in F16; gate and up are alike, and down is on its own."""
    model = random_model("llama", **OWN)
    names = [n for n in gguf_kit.tensors(model, "llama") if n.startswith("blk.")]
    kinds = dict.fromkeys([n for n in names if "norm" not in n], "Q4_0")
    gguf_kit.file_of(tmp_path / "a.gguf", model, "llama", {**kinds, "blk.1.ffn_down.weight": "Q8_0"})  # fmt: skip
    kinds |= {"blk.0.attn_v.weight": "Q8_0", "blk.1.attn_q.weight": "F16"}
    gguf_kit.file_of(tmp_path / "m.gguf", model, "llama", kinds)
    told = run("import", "m.gguf", "--packed", "-o", "p")
    own = "model.layers.0.self_attn.{}_proj: W{} g32 sym"
    apart = ", ".join(own.format(*pair) for pair in (("q", 4), ("k", 4), ("v", 8)))
    assert f"and the file gives {apart} (2 such sets in all); llmquant takes them" in told.said
    assert "engines that fuse" not in run("import", "a.gguf", "--packed", "-o", "a").said
    assert run("inspect", "p", "--verify").code == 0


def test_packed_refuses_what_it_would_change(run: Run, tmp_path: Path) -> None:
    model = random_model("llama", **{**OWN, "hidden_size": 256, "intermediate_size": 256})
    gguf_kit.file_of(tmp_path / "m.gguf", model, "llama", "Q4_1")
    told = run("import", "m.gguf", "--packed", "-o", "p")
    assert told.code == 2
    assert "leave out --packed to dequantize it" in told.err
    assert "minimum that is no zero-point" in told.err
    assert not (tmp_path / "p").exists()


def edit(path: Path, change: Callable[[bytearray], Any]) -> None:
    data = bytearray(path.read_bytes())
    path.write_bytes(change(data) or data)


def without(key: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        gguf_kit.file_of(path, random_model("llama", **OWN), "llama", **{key: None})

    return make


def said(**more: Any) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        gguf_kit.file_of(path, random_model("llama", **OWN), "llama", **more)

    return make


def changed(change: Callable[[bytearray], Any]) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        gguf_kit.file_of(path, random_model("llama", **OWN), "llama")
        edit(path, change)

    return make


def tensors(change: Callable[[dict[str, np.ndarray]], Any], arch: str = "llama") -> Callable[[Path], None]:  # fmt: skip
    def make(path: Path) -> None:
        model = random_model("llama", **OWN)
        stored = gguf_kit.tensors(model, "llama")
        change(stored)
        text = {**gguf_kit.metadata(model, "llama"), **gguf_kit.tokenizer()}
        gguf_kit.write(path, stored, text, arch)

    return make


def unknown_type(data: bytearray) -> None:
    """The first tensor's type, which follows its name and its two sizes."""
    at = data.index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    data[at : at + 4] = struct.pack("<I", 250)


# q, k and v have biases and the output none
SOME_BIASES = {
    f"blk.{i}.attn_{part}.bias": np.ones(width, np.float32)
    for i in (0, 1)
    for part, width in (("q", 64), ("k", 32), ("v", 32))
}

REFUSED: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "no GGUF": (lambda p: p.write_bytes(b"hello, world" * 9), 2, "is not a GGUF file"),
    "empty": (lambda p: p.write_bytes(b""), 2, "is not a GGUF file"),
    "LFS pointer": (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 3), 2, "Git LFS pointer"),
    "half a header": (changed(lambda d: d[:400]), 1, "is cut short: its header"),
    "half the tensors": (changed(lambda d: d[: len(d) // 2]), 1, "is cut short: "),
    "big-endian": (changed(lambda d: d.__setitem__(slice(4, 8), b"\0\0\0\3")), 2, "is a big-endian GGUF file"),
    "version 1": (changed(lambda d: d.__setitem__(4, 1)), 2, "is a version 1 GGUF file"),
    "unknown type": (changed(unknown_type), 2, "has type 250, which the installed gguf package does not know"),
    "vision": (said(general__type="mmproj"), 2, "vision or audio part"),
    "adapter": (said(general__type="adapter"), 2, "LoRA adapter"),
    "vocabulary": (tensors(lambda s: s.clear()), 2, "vocabulary without weights"),
    "encoder": (tensors(lambda s: None, "bert"), 2, "models of architecture 'bert' are not imported"),
    "no layers": (without("llama__block_count"), 1, "lacks metadata that a config needs: llama.block_count"),
    "no tokenizer": (without("tokenizer__ggml__tokens"), 1, "has no tokenizer"),
    "strange tokenizer": (said(tokenizer__ggml__model="rwkv"), 2, "cannot build its tokenizer"),
    "a merge of no token": (said(tokenizer__ggml__merges=[*gguf_kit.MERGES, "q z"]), 1, "the tokenizer's merge 'q z' cannot be made"),
    "eos past the tokens": (said(tokenizer__ggml__eos_token_id=9999), 1, "eos_token_id is 9999, and its 268 tokens end at 267"),
    "a scale": (said(llama__logit_scale=0.5), 2, "changes what the model computes"),
    "other scaling": (said(llama__rope__scaling__type="longrope"), 2, "rotary scaling 'longrope' is not imported"),
    "other sizes": (said(llama__feed_forward_length=80), 1, "the metadata makes it"),
    "a tensor too many": (tensors(lambda s: s.update({"blk.0.attn_q_norm.weight": np.ones(16, np.float32)})), 2, "has no place in transformers' llama model"),
    "a tensor too few": (tensors(lambda s: s.pop("blk.1.ffn_up.weight")), 1, "lacks tensors of a llama model: model.layers.1.mlp.up_proj.weight"),
    "some biases": (tensors(lambda s: s.update(SOME_BIASES)), 2, "has biases in some places only. transformers' llama model would need these, too: model.layers.0.self_attn.o_proj.bias"),
    "not finite": (tensors(lambda s: s["blk.1.ffn_up.weight"].__setitem__((0, 0), np.nan)), 1, "not finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(run: Run, tmp_path: Path, name: str) -> None:
    make, code, message = REFUSED[name]
    make(tmp_path / "m.gguf")
    told = run("import", "m.gguf", "-o", "out")
    assert (told.code, told.out) == (code, "")
    assert message in told.err, told.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf", "-o", "out"], "missing.gguf is not a file"),
        (["m.gguf", "-o", "full"], "already exists and is not empty"),
        (["m.gguf", "-o", "out", "--dtype", "int8"], "int8"),
        (["m.gguf", "-o", "out", "--format", "gptq"], "add --packed"),
        (["m.gguf", "-o", "out", "--packed", "--format", "awq"], "--packed writes"),
    ],
    ids=["missing", "full", "dtype", "format alone", "awq"],
)
def test_misuse(run: Run, tmp_path: Path, q8: Path, arguments: list[str], message: str) -> None:
    shutil.copy(q8, tmp_path / "m.gguf")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    told = run("import", *arguments)
    assert told.code == 2
    assert message in told.err
    assert not (tmp_path / "out").exists()


def test_too_large_for_fp16(run: Run, tmp_path: Path) -> None:
    large = random_model("llama", **OWN)
    large.model.layers[1].input_layernorm.weight.data[0] = 1e5
    gguf_kit.file_of(tmp_path / "m.gguf", large, "llama", "Q8_0")
    for command in (
        ("import", "m.gguf", "-o", "out", "--dtype", "fp16"),
        ("generate", "m.gguf", "hi", "--raw", "--max-new-tokens", "2", "--dtype", "bfloat16"),
        ("quantize", "m.gguf", "-o", "q", "--method", "rtn"),
    ):  # one advice, which helps wherever the file was given
        told = run(*command)
        advice = "too large for float16; llmquant import m.gguf --dtype bfloat16 -o DIR"
        assert (told.code, advice in told.said) == (2, True), told
    assert run("import", "m.gguf", "-o", "out", "--dtype", "bf16").code == 0


def test_a_file_where_a_folder_is_taken(run: Run, tmp_path: Path, q8: Path) -> None:
    """Imported once into the cache; the second command finds it there."""
    shutil.copy(q8, tmp_path / "mine.gguf")
    told = run("quantize", "mine.gguf", "-o", "q", "--method", "rtn", "--group-size", "32")
    assert told.code == 0, told.err
    assert json.loads((tmp_path / "q" / "manifest.json").read_text())["base_model"] == "mine"
    assert run("inspect", "mine.gguf").code == 0
    assert llmquant.resolve("mine.gguf") == llmquant.resolve(tmp_path / "mine.gguf")
    assert llmquant.resolve("mine.gguf").name == "mine"
    assert llmquant.load("mine.gguf").config.model_type == "llama"
    for command, to in (("convert", "gptq"), ("export", "gguf"), ("export", "onnx")):
        told = run(command, "mine.gguf", "--to", to, "-o", "c")
        assert (told.code, "llmquant import mine.gguf" in told.err) == (2, True)
    told = run("verify", "mine.gguf")
    assert (told.code, "give a folder that llmquant wrote" in told.err) == (2, True)
    told = run("plan", "none.gguf")
    assert (told.code, "none.gguf is not there" in told.err) == (2, True)


@pytest.mark.parametrize("more", [[], ["--packed"]], ids=["dequantized", "packed"])
def test_a_shard_in_the_destination_is_not_deleted(
    run: Run, tmp_path: Path, q8: Path, more: list[str]
) -> None:
    """Nor one that is there by a link."""
    first, second = shards(q8, tmp_path / "in")
    assert run("import", first, "-o", "out").code == 0
    second.symlink_to(second.rename(tmp_path / "out" / second.name))
    told = run("import", first, "-o", "out", "--overwrite", *more)
    assert told.code == 2
    assert f"holds the model {first} ({second} leads into it), which --overwrite would" in told.said
    assert second.is_file()


def test_a_file_that_is_the_model_is_not_deleted(run: Run, tmp_path: Path, q8: Path) -> None:
    """It was imported into the cache, and is the user's all the same."""
    assert run("import", q8, "-o", "out").code == 0
    shutil.copy(q8, "out/m.gguf")
    rtn = ("--method", "rtn", "--group-size", "32")
    told = run("quantize", "out/m.gguf", "-o", "out", *rtn, "--overwrite")
    assert (told.code, "holds the model out/m.gguf, which" in told.said) == (2, True)
    assert Path("out/m.gguf").is_file()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("number", [b"\x00\x7e", b"\x00\x7c"], ids=["NaN", "infinite"])
def test_packed_names_a_scale_that_is_no_number(
    run: Run, tmp_path: Path, kind: str, number: bytes
) -> None:
    path = gguf_kit.file_of(tmp_path / "m.gguf", random_model("llama", **OWN), "llama", kind)
    tensors = gguf.GGUFReader(path).tensors
    start = next(t.data_offset for t in tensors if t.name == "blk.0.ffn_up.weight")
    raw = bytearray(path.read_bytes())
    raw[start : start + 2] = number
    path.write_bytes(raw)
    for more in ([], ["--packed"]):
        told = run("import", "m.gguf", "-o", "out", *more)
        assert told.code == 1
        assert (
            "m.gguf is damaged: model.layers.0.mlp.up_proj.weight holds numbers that are not "
            "finite; fetch it again"
        ) in told.said
    assert not (tmp_path / "out").exists()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_several_commands_import_a_file_once(cache: Path, q8: Path) -> None:
    """All begin at once; one imports, the others wait and take what it made."""
    begin = cache.parent / "begin"
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from llmquant.checkpoint.gguf.cached import cached_folder\n"
        "print('ready', flush=True)\n"
        f"while not Path({str(begin)!r}).exists(): time.sleep(0.01)\n"
        f"print(cached_folder(Path({str(q8)!r})))"
    )
    asked = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    for process in asked:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    begin.touch()
    ended = [process.communicate(timeout=300) for process in asked]
    assert [process.returncode for process in asked] == [0, 0, 0], ended
    folder = llmquant.resolve(q8)
    assert {out.strip() for out, _ in ended} == {str(folder)}
    assert sum(err.count("importing") - err.count("is importing") for _, err in ended) == 1
    assert sorted(p.name for p in folder.parent.iterdir()) == ["m", "m.files.json"]


@pytest.mark.parametrize(
    "lost",
    ["config.json", "model.safetensors", "tokenizer.json", "cut short", "another process's list"],
)
def test_a_cached_folder_that_is_not_whole_is_made_again(cache: Path, q8: Path, lost: str) -> None:
    folder = llmquant.resolve(q8)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    if lost == "cut short":
        (folder / "model.safetensors").write_bytes(before["model.safetensors"][:-1])
    elif lost in before:
        (folder / lost).unlink()
    else:
        folder.with_name("m.files.json").write_text("[", encoding="utf-8")
    assert llmquant.resolve(q8) == folder
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    made = folder.stat().st_ino
    assert llmquant.resolve(q8).stat().st_ino == made  # and is found there the next time


def test_a_file_that_cannot_be_imported_leaves_nothing_in_the_cache(
    cache: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(llmquant.CheckpointError):
        llmquant.resolve(tmp_path / "m.gguf")
    assert not list((cache / "llmquant" / "gguf").iterdir())


def test_a_cache_that_cannot_be_written(
    cache: Path, q8: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.touch()
    with pytest.raises(llmquant.CheckpointError, match=r"XDG_CACHE_HOME, or run llmquant import"):
        llmquant.resolve(q8)
    cache.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(llmquant.CheckpointError, match="no permission; name another folder"):
        llmquant.resolve(q8)
