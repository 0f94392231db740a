"""Model folders: what the reader refuses, what the writer leaves behind, and when the new folder
takes its place."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmquant.checkpoint.atomic import refuse_held
from llmquant.checkpoint.reader import (
    INDEX,
    SINGLE,
    CheckpointReader,
    read_json,
    sha256_file,
    sha256_tensor,
)
from llmquant.checkpoint.shards import ShardWriter
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.errors import CheckpointError, ProofError, UsageError

Q = "model.layers.0.self_attn.q_proj.weight"


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def entry(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage the header's entry of one tensor."""
    return lambda folder: rewrite_header(folder / SINGLE, lambda header: change(header[Q]))


def contents(name: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(data)


def cut(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes()[:-10])


def longer(folder: Path) -> None:
    (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes() + b"0")


def only_pickle(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "pytorch_model.bin")


def two_without_index(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "a.safetensors")
    shutil.copyfile(folder / "a.safetensors", folder / "b.safetensors")


def index(weight_map: object) -> Callable[[Path], object]:
    """An index, and no single file that would count in its place."""

    def edit(folder: Path) -> None:
        (folder / SINGLE).rename(folder / "shard.safetensors")
        contents(INDEX, json.dumps({"weight_map": weight_map}).encode())(folder)

    return edit


DAMAGE = [
    pytest.param(lambda f: (f / "config.json").unlink(), "config.json is missing", id="no config"),
    pytest.param(contents("config.json", b"{"), "cannot be read as JSON", id="config cut"),
    pytest.param(
        contents("config.json", b"[]"), "holds list, not a JSON object", id="config is a list"
    ),
    pytest.param(
        contents("config.json", b"\xff{"), "cannot be read as JSON", id="config not utf-8"
    ),
    pytest.param(
        contents("config.json", b"[" * 100_000),
        "cannot be read as JSON",
        id="config nested too deep",
    ),
    pytest.param(lambda f: (f / SINGLE).unlink(), "has no safetensors weights", id="no weights"),
    pytest.param(
        only_pickle, "only pickle files .pytorch_model.bin., which can run code", id="pickle only"
    ),
    pytest.param(
        two_without_index,
        "has 2 safetensors files but no model.safetensors.index.json",
        id="no index",
    ),
    pytest.param(contents(SINGLE, b""), "truncated, damaged or not safetensors", id="empty file"),
    pytest.param(
        contents(SINGLE, struct.pack("<Q", 2) + b"[]"),
        "truncated, damaged or not",
        id="header is a list",
    ),
    pytest.param(
        contents(SINGLE, struct.pack("<Q", 1 << 60) + b"{}"),
        "truncated, damaged or not",
        id="header too long",
    ),
    pytest.param(
        contents(SINGLE, struct.pack("<Q", 2) + b"{}"), "without a single tensor", id="no tensors"
    ),
    pytest.param(cut, "truncated, damaged or not", id="file cut"),
    pytest.param(longer, "truncated, damaged or not", id="file too long"),
    pytest.param(
        entry(lambda e: e.pop("data_offsets")), "truncated, damaged or not", id="no offsets"
    ),
    pytest.param(
        entry(lambda e: e.update(data_offsets="ab")),
        "truncated, damaged or not",
        id="offsets no numbers",
    ),
    pytest.param(
        entry(lambda e: e.update(data_offsets=[-5, 10])),
        "truncated, damaged or not",
        id="negative offset",
    ),
    pytest.param(entry(lambda e: e.pop("dtype")), "truncated, damaged or not", id="no dtype"),
    pytest.param(
        entry(lambda e: e.update(shape=[1, 1])), "truncated, damaged or not", id="shape too small"
    ),
    pytest.param(entry(lambda e: e.update(shape=None)), "truncated, damaged or not", id="no shape"),
    pytest.param(
        entry(lambda e: e.update(dtype="C64", shape=[64, 16])),
        "dtype C64, which llmquant does not read",
        id="complex",
    ),
    pytest.param(index({}), "holds no weight_map", id="empty index"),
    pytest.param(index([1]), "holds no weight_map", id="index of a list"),
    pytest.param(index({"a": 1}), "holds no weight_map", id="index of numbers"),
    pytest.param(
        index({"a": "../m/shard.safetensors"}), "holds no weight_map", id="index leads outside"
    ),
    pytest.param(
        index({"a": "gone.safetensors"}),
        "names shards that are not there: gone.safetensors",
        id="shard gone",
    ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGE)
def test_a_damaged_folder_is_refused_by_name(
    model: Path, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    damage(folder)
    with pytest.raises(CheckpointError, match=words) as refused:
        CheckpointReader(folder)
    assert str(folder) in str(refused.value)


def test_what_is_no_folder() -> None:
    with pytest.raises(
        CheckpointError, match="is not a folder; give a local model folder or a hub name"
    ):
        CheckpointReader("/nonexistent/model")


@pytest.mark.parametrize("size", ["5GB", "300KB"], ids=["one file", "shards"])
def test_every_tensor_reads_as_it_was_saved(make_model: Callable[..., Path], size: str) -> None:
    folder = make_model(max_shard_size=size)
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (size != "5GB") == (folder / INDEX).is_file()
    saved = {name: tensor for file in files for name, tensor in load_file(file).items()}
    reader = CheckpointReader(folder)
    assert reader.tensors.keys() == saved.keys()
    assert reader.files() == files
    for name, tensor in saved.items():
        info = reader.info(name)
        assert (info.shape, info.dtype, info.nbytes) == (
            tuple(tensor.shape),
            tensor.dtype,
            tensor.nbytes,
        )
        assert torch.equal(reader.read(name), tensor)


def test_the_digest_is_that_of_config_and_weights_alone(model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "m"))
    before = CheckpointReader(folder).digest()
    assert before == CheckpointReader(model).digest()
    (folder / "README.md").write_text("changed", encoding="utf-8")
    assert CheckpointReader(folder).digest() == before
    data = bytearray((folder / SINGLE).read_bytes())
    data[-1] ^= 1
    (folder / SINGLE).write_bytes(data)
    assert CheckpointReader(folder).digest() != before


def test_an_unknown_tensor_is_an_error_that_names_it(model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor named model\.what"):
        CheckpointReader(model).read("model.what")


def test_sha256_of_a_tensor_knows_dtype_and_shape() -> None:
    zeros = torch.zeros(4, dtype=torch.float16)
    others = [zeros.view(2, 2), zeros.view(torch.bfloat16), torch.zeros(0), torch.zeros(())]
    assert len({sha256_tensor(t) for t in (zeros, *others)}) == 5
    assert sha256_tensor(torch.arange(6).view(2, 3).T) == sha256_tensor(
        torch.arange(6).view(2, 3).T.contiguous()
    )


TENSORS = {
    "a": torch.arange(6, dtype=torch.int32),
    "b": torch.ones(2, 3),
    "c": torch.zeros(1, dtype=torch.float16),
}


def write(destination: Path, **options: Any) -> CheckpointWriter:
    """A whole small folder, up to publishing it."""
    with CheckpointWriter(destination, **options) as writer:
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        writer.finish_weights()
        writer.write_json("config.json", {"model_type": "llama"})
        writer.publish()
    return writer


def use(destination: Path, work: Callable[[CheckpointWriter], None]) -> None:
    """Do something with a writer and leave it without publishing."""
    with CheckpointWriter(destination) as writer:
        work(writer)


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(p.name for p in folder.iterdir()) == sorted(names)


@pytest.mark.parametrize(
    ("size", "files"),
    [
        (5_000_000_000, [SINGLE]),
        (24, [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]),
        (48, [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]),
    ],
    ids=["one", "each its own", "two and one"],
)
def test_shards_have_the_hubs_names_and_an_index(
    tmp_path: Path, size: int, files: list[str]
) -> None:
    writer = write(tmp_path / "out", max_shard_size=size)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == files
    reader = CheckpointReader(tmp_path / "out")
    assert all(torch.equal(reader.read(n), t) for n, t in TENSORS.items())
    assert writer.total_bytes == 24 + 24 + 2
    if len(files) > 1:
        told = read_json(tmp_path / "out" / INDEX)
        assert told["metadata"]["total_size"] == writer.total_bytes
        assert told["weight_map"] == {n: reader.info(n).file.name for n in TENSORS}
    assert nothing_but(tmp_path, "out")


def test_a_single_shard_is_what_safetensors_writes(tmp_path: Path) -> None:
    write(tmp_path / "out")
    save_file(TENSORS, tmp_path / "twin.safetensors", metadata={"format": "pt"})
    assert sha256_file(tmp_path / "out" / SINGLE) == sha256_file(tmp_path / "twin.safetensors")


def test_tensors_that_stay_together_share_a_shard(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", max_shard_size=30) as writer:
        writer.add("first", torch.zeros(5))
        writer.add_together({"m.packed": torch.zeros(4), "m.scale": torch.zeros(4)})
        writer.finish_weights()
        writer.write_json("config.json", {})
        writer.publish()
    told = read_json(tmp_path / "out" / INDEX)["weight_map"]
    assert told["m.packed"] == told["m.scale"] != told["first"]


def test_a_tensor_cannot_be_written_twice(tmp_path: Path) -> None:
    def twice(writer: CheckpointWriter) -> None:
        writer.add("a", TENSORS["a"])
        writer.add("a", TENSORS["a"])

    with pytest.raises(CheckpointError, match="tensor a was written twice"):
        use(tmp_path / "out", twice)
    assert nothing_but(tmp_path)


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the model has no tensors"):
        use(tmp_path / "out", CheckpointWriter.finish_weights)
    assert nothing_but(tmp_path)


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt()], ids=["error", "ctrl-c"]
)
def test_an_exception_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    def fail(writer: CheckpointWriter) -> None:
        writer.add("a", TENSORS["a"])
        assert writer.partial.is_dir()
        raise error

    with pytest.raises(type(error)):
        use(tmp_path / "a" / "b" / "out", fail)
    assert nothing_but(tmp_path)


def test_what_an_interrupted_run_left_is_no_model_and_is_swept_away(tmp_path: Path) -> None:
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "shard-00000.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointError):
        CheckpointReader(stale)
    write(tmp_path / "out")
    assert nothing_but(tmp_path, "out")
    assert nothing_but(tmp_path / "out", SINGLE, "config.json")


def no_space(*args: object, **kwargs: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("method", ["add", "finish"])
def test_a_full_disk_is_a_clear_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(ShardWriter, method, no_space)
    with pytest.raises(CheckpointError, match="No space left on device; free some space"):
        write(tmp_path / "out")
    assert nothing_but(tmp_path)


FULL = ["a file", "a model", "a stranger", "a broken link"]


def occupy(path: Path, what: str) -> None:
    if what == "a file":
        path.write_text("x", encoding="utf-8")
    elif what == "a broken link":
        path.symlink_to(path.with_name("nowhere"))
    else:
        path.mkdir()
        (path / ("config.json" if what == "a model" else "thesis.tex")).write_text(
            "{}", encoding="utf-8"
        )


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize("what", FULL)
def test_only_a_model_folder_may_be_replaced_and_only_if_asked(
    tmp_path: Path, what: str, overwrite: bool
) -> None:
    occupy(tmp_path / "out", what)
    if what == "a model" and overwrite:
        write(tmp_path / "out", overwrite=True)
        assert nothing_but(tmp_path / "out", SINGLE, "config.json")
    else:
        with pytest.raises(UsageError, match=str(tmp_path / "out")):
            CheckpointWriter(tmp_path / "out", overwrite=overwrite)
        assert nothing_but(tmp_path, "out")


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert nothing_but(tmp_path / "out", SINGLE, "config.json")


def test_a_link_is_replaced_but_not_followed(tmp_path: Path) -> None:
    occupy(tmp_path / "kept", "a model")
    (tmp_path / "out").symlink_to(tmp_path / "kept")
    write(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out").is_symlink()
    assert nothing_but(tmp_path, "kept", "out")
    assert nothing_but(tmp_path / "kept", "config.json")


def test_a_file_in_the_way_and_a_name_too_long_are_misuse(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UsageError, match=r"is a file, so .* cannot be made"):
        CheckpointWriter(tmp_path / "file" / "out")
    with pytest.raises(UsageError, match="File name too long"):
        CheckpointWriter(tmp_path / ("x" * 300))


def test_a_folder_that_may_not_be_written_is_known_early(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, mode: False
    )  # permissions do not bind the root user
    with pytest.raises(CheckpointError, match="no permission to write in"):
        CheckpointWriter(tmp_path / "out")


def test_the_old_folder_comes_back_when_the_last_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    occupy(tmp_path / "out", "a model")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".out.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write(tmp_path / "out", overwrite=True)
    assert nothing_but(tmp_path, "out")
    assert nothing_but(tmp_path / "out", "config.json")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SINGLE])
def test_no_file_is_published_that_is_not_what_was_written(
    tmp_path: Path, model: Path, name: str
) -> None:
    """Of weight files this is the header alone: their tensors are for the caller to compare."""

    def corrupt(writer: CheckpointWriter) -> None:
        writer.add("a", TENSORS["a"])
        writer.finish_weights()
        writer.write_json("config.json", {"model_type": "llama"})
        assert "tokenizer.json" in writer.copy_side_files(model)
        flip(writer.partial / name, 8 * 20)
        writer.publish()

    with pytest.raises(
        ProofError, match=f"{name} (is not what was written|does not begin with the header)"
    ):
        use(tmp_path / "out", corrupt)
    assert nothing_but(tmp_path)


@pytest.fixture
def replaceable(tmp_path: Path) -> Path:
    """A model folder that a run may replace, with a file in it and one in a folder of it."""
    folder = tmp_path / "out"
    (folder / "sub").mkdir(parents=True)
    for name in ("config.json", "w", "sub/w"):
        (folder / name).write_text(name, encoding="utf-8")
    return folder


def through_two_links(folder: Path) -> Path:
    (folder.parent / "second").symlink_to("out/w")
    (folder.parent / "first").symlink_to("second")
    return folder.parent / "first"


def through_a_folder(folder: Path) -> Path:
    (folder.parent / "way").symlink_to(folder / "sub")
    return folder.parent / "way" / "w"


def through_a_link_inside(folder: Path) -> Path:
    """It would lead nowhere, though what it leads to stays."""
    (folder.parent / "far").write_text("far", encoding="utf-8")
    (folder / "link").symlink_to(folder.parent / "far")
    (folder.parent / "near").symlink_to(folder / "link")
    return folder.parent / "near"


def out_of_it_again(folder: Path) -> Path:
    (folder.parent / "far").write_text("far", encoding="utf-8")
    (folder.parent / "near").symlink_to("out/sub/../../far")
    return folder.parent / "near"


@pytest.mark.parametrize(
    "way", [through_two_links, through_a_folder, through_a_link_inside, out_of_it_again]
)
def test_what_links_lead_to_is_not_replaced(replaceable: Path, way: Callable[[Path], Path]) -> None:
    file = way(replaceable)
    with pytest.raises(UsageError, match=rf"holds the text \({file} leads into it\), which"):
        refuse_held(replaceable, "the text", [file])
    (replaceable / "config.json").unlink()  # then it is not replaced at all
    refuse_held(replaceable, "the text", [file])


def test_what_is_beside_or_not_there_is_no_hindrance(replaceable: Path, tmp_path: Path) -> None:
    (tmp_path / "beside").write_text("x", encoding="utf-8")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / "nothing").symlink_to(replaceable / "nothing")
    files = [tmp_path / n for n in ("beside", "round", "nothing", "none")]
    refuse_held(replaceable, "the text", files)
    refuse_held(tmp_path / "new", "the text", files)
    refuse_held(tmp_path / "beside", "the text", files[1:])
    with pytest.raises(UsageError, match="belongs to the text, which would be overwritten"):
        refuse_held(tmp_path / "beside", "the text", files)


@pytest.mark.parametrize("name", [".new.partial", ".new.replaced"])
def test_what_a_run_sweeps_away_holds_no_model(replaceable: Path, name: str) -> None:
    found = replaceable.rename(replaceable.with_name(name))
    with pytest.raises(UsageError, match=rf"would delete {found}, which holds the model"):
        refuse_held(found.with_name("new"), "the model", [found, found / "w"])
