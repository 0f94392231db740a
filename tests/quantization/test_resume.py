"""What is kept of an interrupted run, when it is continued, when that is refused, and that the
numbers are the saved ones.

Killing processes is in ``test_killed.py``; here runs are stopped by an interrupt between two
blocks, in this process.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmquant.checkpoint.atomic import lock_folder
from llmquant.checkpoint.manifest import verify
from llmquant.checkpoint.reader import SINGLE, sha256_file
from llmquant.checkpoint.shards import ShardWriter
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.errors import CheckpointError, DiskError, LlmquantError, UsageError
from llmquant.quantization import run as pipeline
from llmquant.quantization.blocks.hidden_states import InFile, InMemory, StateStore
from llmquant.quantization.options import Events, QuantizeOptions, QuantizeResult
from llmquant.quantization.plan import Progress
from llmquant.quantization.run import quantize
from llmquant.quantization.state import fingerprint, resume
from llmquant.quantization.state.journal import Journal
from llmquant.recipe import Recipe

TUNE = {
    "steps": 8,
    "lr": 0.01,
    "scale_lr": 0.002,
    "batch_size": 2,
    "checks": 2,
    "patience": 2,
    "target": "block",
}


@pytest.fixture(scope="module")
def deep(make_model: Callable[..., Path]) -> Path:
    """Three blocks, so that a block of work can go wrong behind one that was saved."""
    return make_model(num_hidden_layers=3)


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in sorted(folder.iterdir())}


def until(block: int) -> Events:
    """Ctrl-C when block ``block`` is begun."""

    def stop(where: Progress) -> None:
        if where.block == block:
            raise KeyboardInterrupt

    return Events(on_progress=stop)


def interrupted(
    model: Path, output: Path, recipe: Recipe, block: int, options: QuantizeOptions | None = None
) -> str:
    """A run stopped in front of a block; returns what it said."""
    with pytest.raises(KeyboardInterrupt) as stopped:
        quantize(model, output, recipe, options, until(block))
    return str(stopped.value)


@pytest.fixture(scope="module")
def twin(deep: Path, gptq: Recipe, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Hashes of the uninterrupted run."""
    return hashes(quantize(deep, tmp_path_factory.mktemp("twin") / "out", gptq).path)


@pytest.fixture(scope="module")
def stopped_once(deep: Path, gptq: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the model, and a destination ``out`` whose run was stopped in front
    of the last block."""
    folder = tmp_path_factory.mktemp("stopped")
    shutil.copytree(deep, folder / deep.name)
    interrupted(folder / deep.name, folder / "out", gptq, 2)
    return folder


@pytest.fixture
def stopped(stopped_once: Path, deep: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of that, times of files included: the model and the destination."""
    folder = Path(shutil.copytree(stopped_once, tmp_path / "stopped"))
    return folder / deep.name, folder / "out"


# --- continuing -------------------------------------------------------------


def of_engines(note: str) -> bool:
    """What is said of vLLM depends on this machine's processor."""
    return note.startswith("vLLM on a CPU without AVX-512")


@pytest.mark.parametrize("block", [1, 2])
def test_an_interrupt_says_how_to_continue_and_that_gives_the_same_files(
    deep: Path, gptq: Recipe, tmp_path: Path, twin: dict[str, str], block: int
) -> None:
    told = interrupted(deep, tmp_path / "out", gptq, block)
    assert f"{block} of 3 blocks are saved next to out; run the same command to resume" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.partial", ".out.resume"]
    notes: list[str] = []
    seen: list[int] = []
    events = Events(
        on_note=lambda n: None if of_engines(n) else notes.append(n),
        on_progress=lambda at: seen.append(at.block),
    )
    result = quantize(deep, tmp_path / "out", gptq, events=events)
    assert notes == [f"resuming after block {block} of 3 of an interrupted run"]
    assert min(seen) == block
    assert (result.resumed, len(result.modules)) == (block, 21)
    assert hashes(tmp_path / "out") == twin
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    verify(tmp_path / "out")


def same_but_times(a: QuantizeResult, b: QuantizeResult) -> bool:
    plain = [
        [(m.name, m.digest, m.weight_error, m.output_error, m.damping, m.tokens) for m in r.modules]
        for r in (a, b)
    ]
    return plain[0] == plain[1] and (a.bits_per_weight, a.bytes_written) == (
        b.bits_per_weight,
        b.bytes_written,
    )


def test_the_result_tells_of_all_blocks(deep: Path, gptq: Recipe, tmp_path: Path) -> None:
    whole = quantize(deep, tmp_path / "whole", gptq)
    interrupted(deep, tmp_path / "out", gptq, 2)
    assert same_but_times(quantize(deep, tmp_path / "out", gptq), whole)


def test_nothing_is_kept_of_a_run_without_a_finished_block(
    deep: Path, gptq: Recipe, tmp_path: Path
) -> None:
    assert interrupted(deep, tmp_path / "a" / "out", gptq, 0) == "no incomplete output remains"
    assert not any(tmp_path.iterdir())


def test_nothing_is_kept_when_that_is_not_wanted(
    deep: Path, gptq: Recipe, tmp_path: Path, twin: dict[str, str]
) -> None:
    options = QuantizeOptions(resume=False)
    assert (
        interrupted(deep, tmp_path / "a" / "out", gptq, 2, options)
        == "no incomplete output remains"
    )
    assert not any(tmp_path.iterdir())
    assert hashes(quantize(deep, tmp_path / "out", gptq, options).path) == twin


def test_restart_begins_anew(deep: Path, gptq: Recipe, tmp_path: Path) -> None:
    interrupted(deep, tmp_path / "out", gptq, 2)
    other = gptq.updated({"weights.bits": 8})
    assert quantize(deep, tmp_path / "out", other, QuantizeOptions(restart=True)).resumed == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_interrupted_when_only_its_state_was_left_to_remove(
    deep: Path, gptq: Recipe, tmp_path: Path, twin: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "__exit__", lambda *args: None)
        publish = CheckpointWriter.publish
        patched.setattr(
            CheckpointWriter,
            "publish",
            lambda self: (publish(self), patched.setattr(resume, "remove", interrupt)),
        )
        with pytest.raises(KeyboardInterrupt):
            quantize(deep, tmp_path / "out", gptq)
    assert (tmp_path / ".out.resume").is_dir()
    before = quantize(deep, tmp_path / "out", gptq)
    assert (before.resumed, len(before.modules)) == (3, 21)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert hashes(tmp_path / "out") == twin


def test_a_model_that_stands_there_is_kept_until_the_continued_run_is_whole(
    deep: Path, gptq: Recipe, rtn: Recipe, tmp_path: Path, twin: dict[str, str]
) -> None:
    quantize(deep, tmp_path / "out", rtn)
    old = hashes(tmp_path / "out")
    over = QuantizeOptions(overwrite=True)
    interrupted(deep, tmp_path / "out", gptq, 2, over)
    assert hashes(tmp_path / "out") == old
    quantize(deep, tmp_path / "out", gptq, over)
    assert hashes(tmp_path / "out") == twin


def test_two_processes_cannot_write_one_folder(
    stopped: tuple[Path, Path], gptq: Recipe, twin: dict[str, str]
) -> None:
    model, output = stopped
    lock = lock_folder(output.with_name(".out.partial"))
    with pytest.raises(UsageError, match="another llmquant process is writing to"):
        quantize(model, output, gptq)
    os.close(lock)
    quantize(model, output, gptq)
    assert hashes(output) == twin


# --- refusing ---------------------------------------------------------------


def edit_weight(model: Path) -> None:
    """Another number in the middle of the file, and no trace of it in the file's time."""
    path = model / SINGLE
    times = path.stat()
    data = bytearray(path.read_bytes())
    for at in range(len(data) // 2, len(data), 64):
        data[at] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / name
        path.write_text(
            json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}),
            encoding="utf-8",
        )

    return edit


Change = tuple[dict[str, Any], dict[str, Any], Callable[[Path], None] | None]
REFUSED = [
    pytest.param({"weights.bits": 8}, {}, None, "recipe weights.bits was 4 and is 8", id="bits"),
    pytest.param(
        {"gptq.damping": 0.02}, {}, None, "recipe gptq.damping was 0.01 and is 0.02", id="damping"
    ),
    pytest.param(
        {"format": "gptq"},
        {},
        None,
        "recipe format was compressed-tensors and is gptq",
        id="layout",
    ),
    pytest.param(
        {"seed": 1}, {}, None, "recipe seed was 0 and is 1; calibration token ids was", id="seed"
    ),
    pytest.param(
        {"calibration.nsamples": 7}, {}, None, "calibration token ids was", id="calibration"
    ),
    pytest.param(
        {}, {"dtype": "bfloat16"}, None, "--dtype was float32 and is bfloat16", id="dtype"
    ),
    pytest.param(
        {}, {"max_shard_size": 9}, None, "--max-shard-size was 5000000000 and is 9", id="shard size"
    ),
    pytest.param({}, {"resume": False}, None, "leave out --no-resume", id="--no-resume"),
    pytest.param(
        {}, {}, edit_weight, f"{SINGLE} of the model, content was", id="weights, same time"
    ),
    pytest.param(
        {},
        {},
        lambda m: os.utime(m / SINGLE),
        f"{SINGLE} of the model, changed at was",
        id="weights touched",
    ),
    pytest.param(
        {},
        {},
        edit_json("config.json", rms_norm_eps=1e-4),
        "config.json of the model was",
        id="config",
    ),
    pytest.param(
        {},
        {},
        edit_json("tokenizer_config.json", x=3),
        "tokenizer_config.json of the model was",
        id="a side file",
    ),
]


@pytest.mark.parametrize(("changes", "options", "edit", "words"), REFUSED)
def test_another_run_is_refused_and_the_difference_named(
    stopped: tuple[Path, Path],
    gptq: Recipe,
    changes: dict[str, Any],
    options: dict[str, Any],
    edit: Callable[[Path], None] | None,
    words: str,
) -> None:
    model, output = stopped
    whole = {p: p.read_bytes() for p in output.parent.glob(".out.*/*")}
    if edit is not None:
        edit(model)
    with pytest.raises(UsageError) as refused:
        quantize(model, output, gptq.updated(changes), QuantizeOptions(**options))
    assert words in str(refused.value)
    assert "--restart" in str(refused.value)
    assert {p: p.read_bytes() for p in output.parent.glob(".out.*/*")} == whole


def test_other_versions_and_threads_are_refused(
    stopped: tuple[Path, Path], gptq: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, output = stopped
    monkeypatch.setattr(fingerprint, "versions", lambda: {"torch": "2.99"})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(
        UsageError, match=r"threads was \d+ and is 77; .*version of torch was .* and is 2\.99"
    ):
        quantize(model, output, gptq)


DAMAGES = [
    pytest.param(
        ".out.partial/shard-00000.safetensors.data",
        None,
        "is not what the interrupted run left",
        id="weights gone",
    ),
    pytest.param(
        ".out.partial/shard-00000.safetensors.data",
        -1,
        "is not what the interrupted run left",
        id="weights short",
    ),
    pytest.param(
        ".out.resume/states-*.bin", None, "does not hold the hidden states", id="states gone"
    ),
    pytest.param(
        ".out.resume/states-*.bin", 700, "does not hold the hidden states", id="a state changed"
    ),
]


@pytest.mark.parametrize(("name", "byte", "words"), DAMAGES)
def test_damaged_state_is_an_error_that_names_the_file(
    stopped: tuple[Path, Path], gptq: Recipe, name: str, byte: int | None, words: str
) -> None:
    model, output = stopped
    (path,) = output.parent.glob(name)
    data = bytearray(path.read_bytes())
    if byte is None:
        path.unlink()
    elif byte < 0:
        path.write_bytes(data[: len(data) // 4])
    else:
        data[byte] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointError, match=f"{path.name} {words}.*start again with --restart"):
        quantize(model, output, gptq)


# --- the numbers are the saved ones: slips that these tests would catch -----


def stale(monkeypatch: pytest.MonkeyPatch) -> None:
    """The states saved behind a block are those in front of it."""
    save = StateStore.save
    first: list[dict[str, Any]] = []

    def save_first(self: StateStore) -> dict[str, Any]:
        saved = save(self)
        first.append(saved)
        return first[0]

    monkeypatch.setattr(StateStore, "save", save_first)
    monkeypatch.setattr(StateStore, "forget_all_but", lambda self, saved: None)


def recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    """States are not those that were saved but close to them, as if computed again by other
    arithmetic."""
    opened = StateStore._opened

    def close_by(self: StateStore, saved: Any) -> Any:
        stream = opened(self, saved)
        return InMemory(
            (stream.stored(i).to(torch.bfloat16).to(torch.float32) for i in range(len(stream))),
            self.transfers,
        )

    monkeypatch.setattr(StateStore, "_opened", close_by)


@pytest.mark.parametrize("slip", [stale, recomputed])
def test_a_slip_in_the_states_shows_in_the_files(
    deep: Path,
    gptq: Recipe,
    tmp_path: Path,
    twin: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    slip: Callable[..., None],
) -> None:
    slip(monkeypatch)
    interrupted(deep, tmp_path / "out", gptq, 2)
    quantize(deep, tmp_path / "out", gptq)
    assert hashes(tmp_path / "out")[SINGLE] != twin[SINGLE]


def test_other_masks_or_positions_are_noticed(stopped: tuple[Path, Path], gptq: Recipe) -> None:
    model, output = stopped
    path = output.parent / ".out.resume" / "journal.jsonl"
    records, _ = resume.read_journal(path)
    records[-1]["calls"] = "0" * 64
    journal = Journal(path)
    for record in records:
        journal.append(record)
    journal.close()
    with pytest.raises(
        CheckpointError,
        match="masks or position embeddings differ from those of the interrupted run",
    ):
        quantize(model, output, gptq)


# --- a full disk ------------------------------------------------------------


def full(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


PLACES: list[Any] = [
    pytest.param((ShardWriter, "add"), 30, id="a tensor"),
    pytest.param((ShardWriter, "sync"), 2, id="tensors made durable"),
    pytest.param((ShardWriter, "finish"), 1, id="a shard put together"),
    pytest.param((resume.Journal, "append"), 3, id="the journal"),
    pytest.param((StateStore, "save"), 2, id="hidden states"),
    pytest.param((CheckpointWriter, "copy_side_files"), 1, id="side files"),
]


@pytest.mark.parametrize(("place", "call"), PLACES)
def test_a_full_disk_says_what_to_free_and_is_continued(
    deep: Path,
    gptq: Recipe,
    tmp_path: Path,
    twin: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    place: Any,
    call: int,
) -> None:
    owner, name = place
    whole, calls = getattr(owner, name), 0

    def until_full(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < call:
            return whole(*args, **kwargs)
        with (
            args[0]._disk()
            if isinstance(args[0], CheckpointWriter)
            else pytest.MonkeyPatch.context()
        ):
            return full()

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, until_full)
        with pytest.raises(DiskError) as refused:
            quantize(deep, tmp_path / "out", gptq)
    told = str(refused.value)
    assert "failed: No space left on device; free some space and run again: " in told
    assert "blocks are saved next to out; run the same command to resume" in told
    assert f"MB more are needed in {tmp_path}" in told
    assert quantize(deep, tmp_path / "out", gptq).resumed >= 1
    assert hashes(tmp_path / "out") == twin


# --- memory -----------------------------------------------------------------

SPILLED = [
    pytest.param({}, id="gptq"),
    pytest.param({"awq": {"grid": 4}, "include": ["*"], "ignore": []}, id="awq+gptq with the head"),
    pytest.param({"gptq.asymmetric": 0.5, "tune": TUNE}, id="asymmetric, tuned to the block"),
    pytest.param(
        {"method": "rtn", "tune": {**TUNE, "target": "original"}}, id="rtn tuned to the original"
    ),
]


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The most state files that stood there at once, in front of any block."""
    most = [0]
    read = InFile.stored

    def stored(self: InFile, index: int) -> Tensor:
        most[0] = max(most[0], len(list(self.path.parent.glob("states-*.bin"))))
        return read(self, index)

    monkeypatch.setattr(InFile, "stored", stored)
    return most


@pytest.mark.parametrize("changes", SPILLED)
def test_states_in_files_give_the_same_files(
    deep: Path, gptq: Recipe, tmp_path: Path, watched: list[int], changes: dict[str, Any]
) -> None:
    recipe = gptq.updated(changes)
    expected = hashes(quantize(deep, tmp_path / "in memory" / "out", recipe).path)
    assert watched == [0]
    # With the reference: two streams, its outputs, the targets; of those that are saved the
    # generation before as well.
    for kept, most in ((False, 4), (True, 6)):
        folder, notes = tmp_path / f"kept {kept}", []
        options = QuantizeOptions(max_memory=1, resume=kept)
        quantize(
            deep,
            folder / "out",
            recipe,
            options,
            Events(on_note=lambda n, k=notes: None if of_engines(n) else k.append(n)),
        )
        assert notes == [
            f"hidden states are kept in {folder / '.out.resume'}: they do not fit in memory"
        ]
        assert 1 <= watched[0] <= most
        assert hashes(folder / "out") == expected
        assert [p.name for p in folder.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("before", "after"), [(1, None), (None, 1)], ids=["files then memory", "memory then files"]
)
def test_a_run_may_be_continued_with_another_limit(
    deep: Path,
    gptq: Recipe,
    tmp_path: Path,
    twin: dict[str, str],
    before: int | None,
    after: int | None,
) -> None:
    interrupted(deep, tmp_path / "out", gptq, 2, QuantizeOptions(max_memory=before))
    assert quantize(deep, tmp_path / "out", gptq, QuantizeOptions(max_memory=after)).resumed == 2
    assert hashes(tmp_path / "out") == twin


# --- the log ----------------------------------------------------------------


def test_the_log_has_every_linear_and_block_of_both_runs(
    deep: Path, gptq: Recipe, tmp_path: Path, twin: dict[str, str]
) -> None:
    options = QuantizeOptions(log=tmp_path / "log.jsonl")
    interrupted(deep, tmp_path / "out", gptq, 2, options)
    quantize(deep, tmp_path / "out", gptq, options)
    lines = [
        json.loads(line)
        for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    turns = [line["event"] for line in lines if line["event"] != "module"]
    assert turns == [
        "start",
        "block",
        "block",
        "interrupted",
        "start",
        "block",
        "writing",
        "proving",
        "done",
    ]
    modules = [line for line in lines if line["event"] == "module"]
    assert len({line["module"] for line in modules}) == len(modules) == 21
    for line in modules:
        assert line["output_error"] > 0
        assert line["damping"] == 0.01
        assert line["seconds"] > 0
        assert line["peak_bytes"] > 10_000_000
    assert [(line["block"], line["of"]) for line in lines if line["event"] == "block"] == [
        (1, 3),
        (2, 3),
        (3, 3),
    ]
    assert hashes(tmp_path / "out") == twin


def test_a_failure_stands_in_the_log(
    deep: Path, gptq: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise LlmquantError("boom")

    monkeypatch.setattr(pipeline, "prove", fail)
    with pytest.raises(LlmquantError, match="boom"):
        quantize(deep, tmp_path / "out", gptq, QuantizeOptions(log=tmp_path / "log.jsonl"))
    last = json.loads((tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert (last["event"], last["error"], last["finished"]) == ("failed", "boom", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
