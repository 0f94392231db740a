"""Copies beside the computation: what arrives is what was sent, however late somebody waits."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend_device import NAME, PretendTensor, WaitedError, ledger, no_waiting
from pretend_streams import Module, RaceError, streaming

from llmquant.checkpoint.reader import sha256_file
from llmquant.errors import QuantizationError
from llmquant.quantization import calibrated
from llmquant.quantization.blocks import hidden_states, transfers
from llmquant.quantization.blocks.transfers import Streamed, Transfers, behind, transfers_of
from llmquant.quantization.options import QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant.stats import InputStats

pytestmark = pytest.mark.device


@pytest.fixture
def streams() -> Iterator[Module]:
    with streaming() as module:
        yield module


def test_who_has_streams_uses_them(streams: Module) -> None:
    assert type(transfers_of(torch.device(NAME))) is Streamed
    assert type(transfers_of(torch.device("cpu"))) is Transfers


def test_without_streams_a_copy_is_a_copy() -> None:
    assert type(transfers_of(torch.device(NAME))) is Transfers


def test_what_arrives_is_what_was_sent_and_nothing_is_waited_for(streams: Module) -> None:
    moving = Streamed(torch.device(NAME))
    batches = [torch.randn(2, 3) for _ in range(3)]
    with no_waiting():
        there = list(behind(map(moving.send, batches)))
        results = [t * 2 for t in there]
        here = list(behind(map(moving.fetch, results)))
    assert all(torch.equal(h, b * 2) for h, b in zip(here, batches, strict=True))
    assert streams.copies == 6


def test_the_next_is_on_its_way_while_one_is_worked_on(streams: Module) -> None:
    sent: list[int] = []

    def send(number: int) -> transfers.Arrival:
        sent.append(number)
        return lambda: torch.tensor(number)

    worked = [(int(t), len(sent)) for t in behind(map(send, range(3)))]
    assert worked == [(0, 2), (1, 3), (2, 3)]


def test_what_is_written_to_later_is_copied_in_its_order(streams: Module) -> None:
    there = torch.ones(3, device=NAME)
    arrival = Streamed(torch.device(NAME)).fetch(there, final=False)
    there.zero_()
    assert torch.equal(arrival(), torch.ones(3))


def test_memory_that_is_needed_no_more_is_used_again(streams: Module) -> None:
    moving = Streamed(torch.device(NAME))
    first = moving.fetch(torch.ones(3, device=NAME))()
    assert moving.fetch(torch.zeros(3, device=NAME), first)() is first
    assert moving.fetch(torch.zeros(4, device=NAME), first)() is not first
    assert moving.fetch(torch.zeros(3, device=NAME), torch.ones(3))().is_pinned()


def test_a_copy_that_does_not_wait_for_its_source_is_caught(
    streams: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving = Streamed(torch.device(NAME))
    monkeypatch.setattr(moving._copies, "wait_event", lambda _: None)
    with pytest.raises(RaceError):
        moving.fetch(torch.ones(3, device=NAME) * 2)


@pytest.mark.parametrize("named", [NAME, f"{NAME}:0"])
def test_memory_is_not_given_away_while_it_is_copied(named: str, streams: Module) -> None:
    moving = Streamed(torch.device(named))
    arrival = moving.fetch(torch.ones(3, device=NAME) * 2)
    assert torch.equal(arrival(), torch.full((3,), 2.0))


def test_memory_that_is_given_away_while_it_is_copied_is_caught(
    gptq: Recipe, model: Path, tmp_path: Path, streams: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PretendTensor, "record_stream", lambda *_: None)
    recipe = gptq.updated({"calibration.batch_size": 2, "gptq.asymmetric": 0.5})
    with pytest.raises(RaceError, match="given away"):
        quantize(model, tmp_path / "out", recipe, QuantizeOptions(device=NAME))


def test_python_is_at_most_two_batches_ahead(
    streams: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    moving, done = Streamed(torch.device(NAME)), list[int]()

    @dataclass(frozen=True)
    class Numbered:
        number: int

        def synchronize(self) -> None:
            done.append(self.number)

    events = map(Numbered, itertools.count())
    monkeypatch.setattr(type(streams.current_stream()), "record_event", lambda _: next(events))
    batches = map(torch.tensor, range(5))
    assert [(int(t), len(done)) for t in moving.paced(batches)] == [
        (0, 0), (1, 0), (2, 1), (3, 2), (4, 3),
    ]  # fmt: skip


def test_without_memory_to_pin_a_copy_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = torch.empty

    def empty(*args: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory")
        return plain(*args, **more)

    monkeypatch.setattr(torch, "empty", empty)
    for _ in range(2):
        assert transfers.pinned(torch.ones(3)).tolist() == [1, 1, 1]
    assert caplog.messages == [
        "the system gives no more pinned memory (CUDA error: out of memory), so copies are waited for"
    ]


def test_memory_that_is_not_pinned_is_waited_for(streams: Module) -> None:
    with no_waiting(), pytest.raises(WaitedError):
        torch.empty(3).copy_(torch.ones(3, device=NAME), non_blocking=True)


CHANGES = {
    "gptq": {},
    "gptaq": {"gptq": {"asymmetric": 0.5}},
    "tune": {
        "tune": {"steps": 2, "lr": 0.01, "scale_lr": 0.002, "batch_size": 2, "checks": 1, "patience": 2}
    },
}  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in folder.iterdir() if p.suffix == ".safetensors"}


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES.keys())
def test_a_run_gives_the_same(
    changes: dict[str, object], gptq: Recipe, model: Path, tmp_path: Path
) -> None:
    """As copies one after the other do, with hidden states in memory and in files."""
    recipe = gptq.updated({"calibration.batch_size": 2, **changes})
    plain = quantize(model, tmp_path / "plain", recipe, QuantizeOptions(device=NAME)).path
    for max_memory in (None, 1) if "tune" in changes else (None,):
        options = QuantizeOptions(device=NAME, max_memory=max_memory)
        with streaming() as streams:
            found = quantize(model, tmp_path / f"streamed-{max_memory}", recipe, options).path
        assert hashes(found) == hashes(plain)
        assert streams.copies > 0


def test_who_does_not_wait_for_a_copy_is_caught(
    gptq: Recipe, model: Path, tmp_path: Path, streams: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hasty(Streamed):
        def send(self, tensor: torch.Tensor) -> transfers.Arrival:
            arrival = super().send(tensor)
            there = arrival.__closure__ and next(
                c.cell_contents for c in arrival.__closure__ if isinstance(c.cell_contents, torch.Tensor)
            )  # fmt: skip
            return lambda: there

    monkeypatch.setattr(hidden_states, "transfers_of", Hasty)
    with pytest.raises(QuantizationError, match=r"NaN|no finite"):
        quantize(model, tmp_path / "out", gptq, QuantizeOptions(device=NAME))


def test_two_batches_are_on_the_device_and_not_all(
    gptq: Recipe, model: Path, tmp_path: Path, streams: Module
) -> None:
    def peak(nsamples: int) -> int:
        recipe = gptq.updated({"calibration.batch_size": 1, "calibration.nsamples": nsamples})
        with ledger() as seen:
            quantize(model, tmp_path / f"out-{nsamples}", recipe, QuantizeOptions(device=NAME))
        return seen.peak

    assert peak(12) < peak(2) + 32 * 64 * 4


@pytest.fixture
def quiet_passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Passes over the batches may not wait for the device; how often each part ran."""
    ran: Counter[str] = Counter()

    def guard(owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            ran[name] += 1
            with no_waiting():
                return plain(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    for name in ("observe", "run_block", "finite_there"):
        guard(calibrated, name)
    for name in ("send", "fetch"):
        guard(Streamed, name)
    return ran


def test_nothing_waits_in_a_pass(
    gptq: Recipe, model: Path, tmp_path: Path, streams: Module, quiet_passes: Counter[str]
) -> None:
    recipe = gptq.updated({"calibration.batch_size": 2})
    quantize(model, tmp_path / "out", recipe, QuantizeOptions(device=NAME))
    assert quiet_passes["run_block"] == quiet_passes["finite_there"] == 2 * 3  # blocks, batches
    assert set(quiet_passes) == {"observe", "run_block", "finite_there", "send", "fetch"}


def test_a_wait_in_a_pass_is_caught(
    gptq: Recipe, model: Path, tmp_path: Path, streams: Module, monkeypatch: pytest.MonkeyPatch,
    quiet_passes: Counter[str],
) -> None:  # fmt: skip
    plain = InputStats.add

    def asking(self: InputStats, x: torch.Tensor) -> None:
        if bool(torch.isfinite(x).all()):
            plain(self, x)

    monkeypatch.setattr(InputStats, "add", asking)
    with pytest.raises(WaitedError):
        quantize(model, tmp_path / "out", gptq, QuantizeOptions(device=NAME))
