"""``llmquant import`` of pickles: the same tensors as safetensors, neither more nor fewer, and the
command that a folder of pickles is refused with."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmquant.checkpoint.hub import wanted_files
from llmquant.checkpoint.reader import INDEX, SINGLE
from llmquant.errors import UnfitModelError

BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
UP = "model.layers.1.mlp.up_proj.weight"
RTN = ("--method", "rtn", "--group-size", "32")
Tensors = dict[str, Tensor]


def pickled(
    source: Path, folder: Path, change: Callable[[Tensors], object] = lambda t: None
) -> Path:
    """A folder's weights as one pickle, changed before."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    change(tensors)
    torch.save(tensors, folder / BIN)
    return folder


def sharded(folder: Path, parts: Mapping[str, Tensors]) -> None:
    """Pickles of several names instead of the one, and their index."""
    (folder / BIN).unlink(missing_ok=True)
    for name, tensors in parts.items():
        torch.save(tensors, folder / name)
    weight_map = {tensor: name for name, tensors in parts.items() for tensor in tensors}
    (folder / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command_of(refusal: str) -> list[str]:
    """The words that a shell makes of the command in a refusal, behind the program's name."""
    said = " ".join(refusal.split())
    return shlex.split(said[said.index("llmquant import ") :])[1:]


def test_the_refusal_names_a_command_that_keeps_everything(
    model: Path, run: Run, tmp_path: Path
) -> None:
    """Names, numbers and dtypes, whatever config.json says; the folder itself stays as it was."""
    source = pickled(model, tmp_path / "a 'b'; $c", lambda t: t.update({n: x.float() for n, x in t.items()}))  # fmt: skip
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "dtype": "float16"}) + "\r\n")
    before = contents(source)
    refused = run("quantize", source, "-o", tmp_path / "q", *RTN)
    assert (refused.code, "only pickle files (pytorch_model.bin)" in refused.said) == (2, True)
    command = command_of(refused.err)
    done = run(*command)
    assert done.code == 0, done
    assert "proved: 21 tensors, read back from disk, are what was read" in done.out
    out = Path(command[-1])
    assert contents(source) == before
    wanted = torch.load(source / BIN)
    found = load_file(out / SINGLE)
    assert {n: t.dtype for n, t in found.items()} == dict.fromkeys(wanted, torch.float32)
    assert all(torch.equal(found[n], t) for n, t in wanted.items())
    beside = {n: data for n, data in before.items() if n != BIN}
    assert {n: data for n, data in contents(out).items() if n != SINGLE} == beside
    assert run("quantize", out, "-o", tmp_path / "q", *RTN).code == 0


@pytest.mark.parametrize("name", ["", "..", "-x"])
def test_the_command_is_right_from_anywhere(
    name: str, model: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the folder that one stands in too, and of one whose name begins as an option."""
    source = pickled(model, tmp_path / (name.strip(".") or "here"))
    (source / "in").mkdir()
    monkeypatch.chdir(source / "in" if name == ".." else source if name == "" else tmp_path)
    refused = run("inspect", f"./{name}")
    assert run(*command_of(refused.err)).code == 0
    assert (tmp_path / f"{source.name}-safetensors" / SINGLE).is_file()


def test_what_a_pickle_lacks_is_lacking_afterwards(model: Path, run: Run, tmp_path: Path) -> None:
    """Nothing is made up in its place."""
    source = pickled(model, tmp_path / "m", lambda t: t.pop(UP))
    assert run("import", source, "-o", tmp_path / "out").code == 0
    assert UP not in load_file(tmp_path / "out" / SINGLE)
    told = run("quantize", tmp_path / "out", "-o", tmp_path / "q", *RTN)
    assert (told.code, f"lacks {UP}" in told.said) == (1, True), told


def test_shards_stay_shards_and_the_last_one_counts(model: Path, run: Run, tmp_path: Path) -> None:
    source = pickled(model, tmp_path / "m")
    tensors = torch.load(source / BIN)
    names = sorted(tensors)
    half = len(names) // 2
    a, b = ({n: tensors[n] for n in part} for part in (names[:half], names[half:]))
    sharded(source, {"a.bin": {**a, UP: torch.zeros_like(tensors[UP])}, "b.bin": {**b, UP: tensors[UP]}})  # fmt: skip
    done = run("import", source, "-o", tmp_path / "out")
    assert (done.code, f"{UP}: in more than one file" in done.said) == (0, True), done
    assert "left behind" not in done.said  # the index was read
    weight_map = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert weight_map == dict.fromkeys(a, shards[0]) | dict.fromkeys([*b, UP], shards[1])
    ids = torch.arange(6, 26).unsqueeze(0)
    with torch.no_grad():
        theirs, ours = (
            AutoModelForCausalLM.from_pretrained(folder)(ids).logits
            for folder in (source, tmp_path / "out")
        )
    assert torch.equal(theirs, ours)
    split = run("import", source, "-o", tmp_path / "more", "--max-shard-size", 1_000_000)
    assert split.code == 0
    assert len(list((tmp_path / "more").glob("*.safetensors"))) > 2


def test_tensors_that_share_their_numbers_or_are_no_block_of_them(
    model: Path, run: Run, tmp_path: Path
) -> None:
    """A tied head, a transposed matrix, parts of one; bytes, whole numbers and truths."""
    embeddings = "model.embed_tokens.weight"

    def change(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors[embeddings]
        tensors[UP] = torch.nn.Parameter(tensors[UP].t().contiguous().t())
        whole = torch.arange(12.0)
        tensors |= {"x.part": whole[3:7], "x.one": torch.tensor(3), "x.none": torch.zeros(0, 4)}
        tensors |= {"x.true": torch.tensor([True, False]), "x.wide": whole.double()}

    source = pickled(model, tmp_path / "m", change)
    wanted = torch.load(source / BIN)
    assert not wanted[UP].is_contiguous()
    assert run("import", source, "-o", tmp_path / "out").code == 0
    found = load_file(tmp_path / "out" / SINGLE)
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(found[name], tensor)


def test_the_format_of_torch_before_1_6(model: Path, run: Run, tmp_path: Path) -> None:
    source = pickled(model, tmp_path / "m")
    tensors = torch.load(source / BIN)
    torch.save(tensors, source / BIN, _use_new_zipfile_serialization=False)
    assert run("import", source, "-o", tmp_path / "out").code == 0
    found = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


def test_checksums_may_have_been_left_out(model: Path, run: Run, tmp_path: Path) -> None:
    source = pickled(model, tmp_path / "m")
    tensors = torch.load(source / BIN)
    computed = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, source / BIN)
    finally:
        torch.serialization.set_crc32_options(computed)
    assert run("import", source, "-o", tmp_path / "out").code == 0
    found = load_file(tmp_path / "out" / SINGLE)
    assert all(torch.equal(found[n], t) for n, t in tensors.items())


class Harm:
    """A pickle that runs something when it is loaded."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harmed",)


def saved(value: object) -> Callable[[Path], object]:
    return lambda folder: torch.save(value, folder / BIN)


def cut(folder: Path) -> None:
    (folder / BIN).write_bytes((folder / BIN).read_bytes()[:-1000])


def flip(folder: Path) -> None:
    """One bit of one weight, as a bad copy has it: torch reads it without a word."""
    data = bytearray((folder / BIN).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / BIN).write_bytes(data)
    assert torch.load(folder / BIN)


REFUSED = [
    pytest.param(saved({"w": Harm()}), 1, "or is damaged (Trying to load unsupported GLOBAL posix.mkdir whose module posix is blocked", id="code"),
    pytest.param(cut, 1, "or is damaged", id="cut"),
    pytest.param(flip, 1, "is damaged (Bad CRC-32 for file 'pytorch_model/data/", id="a flipped bit"),
    pytest.param(saved({"__metadata__": torch.ones(2)}), 2, "more than what safetensors can, tensors by their names: __metadata__ (float32", id="a name of safetensors' own"),
    pytest.param(lambda f: (f / BIN).write_bytes(b"\x80\x04nonsense"), 1, "or is damaged", id="no pickle"),
    pytest.param(lambda f: (f / BIN).write_bytes(b""), 1, "is empty (0 bytes)", id="empty"),
    pytest.param(lambda f: (f / BIN).write_text("version https://git-lfs.github.com/spec/v1\n"), 1, "is a Git LFS pointer", id="pointer"),
    pytest.param(saved({}), 1, "without a single tensor", id="nothing"),
    pytest.param(saved([torch.ones(2)]), 2, "holds list, not tensors by their names", id="a list"),
    pytest.param(saved({"state_dict": {}, "epoch": 3}), 2, "more than what safetensors can, tensors by their names: state_dict (dict), epoch (int)", id="a training state"),
    pytest.param(saved({"w": torch.ones(2, dtype=torch.complex64)}), 2, "w (complex64, strided, cpu)", id="complex"),
    pytest.param(saved({"w": torch.ones(2, 2).to_sparse()}), 2, "w (float32, sparse_coo, cpu)", id="sparse"),
    pytest.param(lambda f: sharded(f, {"a.bin": {}}), 1, "holds no weight_map", id="an empty index"),
    pytest.param(lambda f: (sharded(f, {"a.bin": {"w": torch.ones(2)}}), (f / "a.bin").unlink()), 1, "names shards that are not there: a.bin", id="a shard is gone"),
    pytest.param(lambda f: (f / BIN).rename(f / "model.pt"), 2, "has neither pytorch_model.bin nor", id="another name"),
    pytest.param(lambda f: (f / "config.json").unlink(), 2, "config.json is missing", id="no config"),
    pytest.param(lambda f: (f / SINGLE).touch(), 2, "has safetensors weights (model.safetensors), so there is nothing to import", id="safetensors beside"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "code", "words"), REFUSED)
def test_what_is_refused(
    change: Callable[[Path], object], code: int, words: str, model: Path, run: Run, tmp_path: Path
) -> None:
    source = pickled(model, tmp_path / "m")
    change(source)
    told = run("import", source, "-o", tmp_path / "out")
    assert (told.code, words in told.said) == (code, True), told
    assert not (tmp_path / "out").exists()
    assert not Path("harmed").exists()
    assert "weights_only" not in told.said


@pytest.mark.parametrize("option", [("--dtype", "bf16"), ("--packed",), ("--format", "gptq")])
def test_options_of_gguf_files(
    option: tuple[str, ...], model: Path, run: Run, tmp_path: Path
) -> None:
    told = run("import", pickled(model, tmp_path / "m"), "-o", tmp_path / "out", *option)
    assert (told.code, f"{option[0]}: for a GGUF file only" in told.said) == (2, True), told


def test_the_folder_itself_is_no_destination(model: Path, run: Run, tmp_path: Path) -> None:
    source = pickled(model, tmp_path / "m")
    told = run("import", source, "-o", source, "--overwrite")
    assert (told.code, "holds the model" in told.said) == (2, True), told
    assert (source / BIN).is_file()


def test_pickles_that_transformers_does_not_look_for(model: Path, run: Run, tmp_path: Path) -> None:
    source = pickled(model, tmp_path / "m")
    (source / BIN).rename(source / "model.pt")
    told = run("inspect", source)
    assert (told.code, "llmquant import" in told.said) == (2, False), told
    assert "none of them is pytorch_model.bin" in told.said


def test_pickles_on_the_hub() -> None:
    with pytest.raises(UnfitModelError, match="hf download o/m --revision v1 --local-dir DIR"):
        wanted_files("o/m@v1", ["config.json", BIN], lambda name: {})
