"""Steps that are recorded once and repeated give the tokens of steps that are run anew."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_graph import FakeGraph, fake_graph
from pretend_device import NAME, ledger, no_waiting
from tiny_models import save

from llmquant.models.load import load
from llmquant_serve.engines import local
from llmquant_serve.engines.base import Sampling, Token
from llmquant_serve.engines.batching import row_cache, step_graph
from llmquant_serve.engines.batching.row_cache import RowCache
from llmquant_serve.engines.batching.step_graph import (
    CudaGraphs,
    StaticStep,
    StepGraphs,
    recorder_for,
    trial,
    why_not,
)
from llmquant_serve.engines.local import LocalEngine

pytestmark = pytest.mark.device
DRAWN = torch.Generator().manual_seed(3)
# Rows join and leave, and with 16 columns at first the cache moves.
REQUESTS = [
    (torch.randint(6, 4096, (length,), generator=DRAWN).tolist(), tokens)
    for length, tokens in ((5, 30), (11, 4), (2, 18), (7, 9))
]


@pytest.fixture(scope="module")
def loaded(quantized: Path) -> Any:
    return load(quantized, dtype="float32", device="cpu", kernel="reference")


@pytest.fixture(autouse=True)
def few_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_cache, "_FIRST_COLUMNS", 16)


def answers(model: Any, max_streams: int = 3) -> list[list[Token]]:
    """Of all requests, two of them one after the other."""

    async def asked() -> list[list[Token]]:
        engine = LocalEngine(model, max_streams)
        await engine.start()

        async def one(prompt: list[int], tokens: int) -> list[Token]:
            sampling = Sampling(max_tokens=tokens, temperature=0.0, logprobs=0, ignore_eos=True)
            return [t async for step in engine.generate(prompt, sampling) for t in step.tokens]

        found = await asyncio.gather(*(one(*request) for request in REQUESTS))
        again = await one(*REQUESTS[1])
        await engine.close()
        return [*found, again]

    return asyncio.run(asked())


def close(found: list[list[Token]], wanted: list[list[Token]]) -> bool:
    return all(
        [t.id for t in mine] == [t.id for t in theirs]
        and [t.logprob for t in mine] == pytest.approx([t.logprob for t in theirs], abs=1e-3)
        for mine, theirs in zip(found, wanted, strict=True)
    )


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Steps are recorded; for each recording its number of rows."""
    rows: list[int] = []

    def record(run: Any) -> Any:
        rows.append(run.__self__.rows)
        return fake_graph(run)

    monkeypatch.setattr(local, "recorder_for", lambda _: record)
    return rows


def test_the_answers_are_those_of_steps_run_anew(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, recorded: list[int]
) -> None:
    found = answers(loaded)
    monkeypatch.setattr(local, "recorder_for", lambda _: None)
    assert close(found, answers(loaded))
    assert set(recorded) == {1, 2, 3}
    assert 4 <= len(recorded) < sum(tokens for _, tokens in REQUESTS) / 2


def freeze(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Recorded steps keep the first columns, or the new one, of their recording."""
    plain = StaticStep.run

    def run(self: StaticStep) -> torch.Tensor:
        live = self.numbers
        self.numbers = live.clone()
        part = slice(-1, None) if what == "column" else slice(2 * self.rows, 3 * self.rows)
        with torch.utils._python_dispatch._disable_current_modes():
            constant = torch.tensor(live[part].tolist())
        self.numbers[part] = constant
        try:
            return plain(self)
        finally:
            self.numbers = live

    monkeypatch.setattr(StaticStep, "run", run)


def forget_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer that moved is not recorded anew."""
    plain = StepGraphs.step

    def forgetful(self: StepGraphs, last: Any) -> torch.Tensor:
        self._moves = self._cache.window.moves
        return plain(self, last)

    monkeypatch.setattr(StepGraphs, "step", forgetful)


@pytest.mark.parametrize("frozen", ["column", "first"])
def test_what_python_knows_and_a_graph_does_not_is_caught(
    frozen: str, loaded: Any, monkeypatch: pytest.MonkeyPatch, recorded: list[int]
) -> None:
    freeze(monkeypatch, frozen)
    found = answers(loaded)
    monkeypatch.setattr(local, "recorder_for", lambda _: None)
    assert not close(found, answers(loaded))


@pytest.mark.parametrize("frozen", [None, "column", "first"])
def test_a_trial_tells_whether_recordings_are_right(
    frozen: str | None, loaded: Any, monkeypatch: pytest.MonkeyPatch, recorded: list[int]
) -> None:
    if frozen is not None:
        freeze(monkeypatch, frozen)
    reason = trial(loaded, fake_graph)
    assert reason is None if frozen is None else "a step's logits were off by" in (reason or "")


def refuse(run: Any) -> Any:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


def test_what_cannot_be_recorded_fails_the_trial(loaded: Any) -> None:
    assert trial(loaded, refuse) == "CUDA error: operation not permitted when stream is capturing"


def test_a_step_that_cannot_be_recorded_is_run_anew(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(local, "recorder_for", lambda _: refuse)
    found = answers(loaded)
    assert caplog.messages == [
        "steps are run anew, not repeated as CUDA graphs: CUDA error: operation not permitted when stream is capturing"
    ]
    monkeypatch.setattr(local, "recorder_for", lambda _: None)
    assert close(found, answers(loaded))


def test_a_buffer_that_moved_is_recorded_anew(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_moves(monkeypatch)
    assert "a step's logits were off by" in (trial(loaded, fake_graph) or "")


def test_a_wait_cannot_be_recorded() -> None:
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"), FakeGraph():
        torch.ones(2).sum().item()


@pytest.mark.parametrize("rows", [1, 3])
@torch.inference_mode()
def test_a_step_waits_for_nothing_on_a_device(rows: int, quantized: Path) -> None:
    there: Any = load(quantized, dtype="float32", device=NAME, kernel="reference")
    cache = RowCache(2, 4)
    for length in range(3, 3 + rows):
        prompt = torch.arange(10, 10 + length)[None].to(NAME)
        cache.join(there(prompt, use_cache=True).past_key_values, length)
    numbers = torch.arange(3 * rows + 1).to(NAME)
    with no_waiting():
        StaticStep(there, cache, rows, 16, numbers).run()


def test_a_token_of_all_rows_is_waited_for_once(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "recorder_for", lambda _: lambda run: run)
    there = load(quantized, dtype="float32", device=NAME, kernel="reference")
    engine = LocalEngine(there)

    async def one() -> list[int]:
        sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
        await engine.start()
        found = [t.id async for s in engine.generate([9, 8, 7], sampling) for t in s.tokens]
        await engine.close()
        return found

    with ledger() as seen:
        assert len(asyncio.run(one())) == 12
    assert seen.waits["tolist"] == 12
    assert seen.waits.total() - seen.waits["tolist"] <= 2  # the prompt's


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("llama", {}, None),
        ("gemma2", {}, "blocks look at parts of the context"),
        ("mistral", {"sliding_window": 8}, "blocks look at parts of the context"),
    ],
)
def test_which_models_are_not_recorded(
    kind: str, changes: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    found = load(save(kind, tmp_path / "model", **changes), dtype="float32")
    assert why_not(found) == reason
    assert recorder_for(found) is None  # not on a GPU
    if reason is None:
        found.set_attn_implementation("eager")
        assert why_not(found) == "attention is eager, not sdpa"


def test_a_gpus_recorder_is_what_a_gpu_gets(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(type(loaded), "device", torch.device("cuda", 0))
    monkeypatch.setattr(step_graph, "CudaGraphs", lambda device: f"records on {device}")
    monkeypatch.setattr(step_graph, "trial", lambda *_: None)
    assert recorder_for(loaded) == "records on cuda:0"
    monkeypatch.setattr(step_graph, "trial", lambda *_: "it is off")
    assert recorder_for(loaded) is None
    assert caplog.messages == ["steps are run anew, not repeated as CUDA graphs: it is off"]


class PretendGraph:
    """As on an H100: a pool has to be new or to have a graph that lives, random numbers are told of
    a recording first of all, and one that failed fails again when it is ended."""

    def __init__(self, cuda: PretendCuda) -> None:
        self.cuda, self.pool = cuda, None

    def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
        assert capture_error_mode == "thread_local"
        self.cuda.random.recording = True
        if pool in self.cuda.users and not self.cuda.users[pool]:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        self.cuda.users.setdefault(pool, weakref.WeakSet()).add(self)
        self.cuda.under_way = pool
        self.cuda.said.append(f"begin {pool}")

    def capture_end(self) -> None:
        self.cuda.said.append("end")
        if self.cuda.broken or self.cuda.under_way is None:
            raise RuntimeError("failed due to a previous error during capture")
        self.cuda.under_way, self.cuda.random.recording = None, False

    def replay(self) -> None:
        self.cuda.said.append("replay")


class PretendRandom:
    """A generator that is recorded until a recording ends well, or its state is another one."""

    recording = False

    def clone_state(self) -> PretendRandom:
        return PretendRandom()

    def graphsafe_set_state(self, state: PretendRandom) -> None:
        self.recording = state.recording


class PretendCuda:
    """What of ``torch.cuda`` a recorder calls, in a list.

    Attributes:
        broken: a recording is going to fail.
        users: living graphs by the pool they were begun with.
        under_way: the pool of the recording that memory is taken for.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self.broken = False
        self.users: dict[Any, weakref.WeakSet[PretendGraph]] = {}
        self.under_way: Any = None
        self.random = PretendRandom()
        self.default_generators = (PretendRandom(), self.random)
        self.pools = 6

    def current_device(self) -> int:
        return 1

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    def current_stream(self, _device: Any) -> Any:
        return SimpleNamespace(wait_stream=lambda _: None)

    def Stream(self, device: Any) -> Any:  # noqa: N802
        return SimpleNamespace(wait_stream=lambda _: None)

    @contextmanager
    def stream(self, _stream: Any) -> Iterator[None]:
        self.said.append("stream")
        try:
            yield
        finally:
            self.said.append("back")

    def synchronize(self, _device: Any) -> None:
        self.said.append("synchronize")

    def set_sync_debug_mode(self, mode: str) -> None:
        self.said.append(f"waits: {mode}")

    def CUDAGraph(self) -> PretendGraph:  # noqa: N802
        return PretendGraph(self)

    def give_up(self, device: int, pool: Any) -> None:
        """``torch._C._cuda_endAllocateToPool``."""
        if self.under_way != pool:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.under_way = None
        self.said.append(f"given up {device} {pool}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendCuda:
    pretend = PretendCuda()
    monkeypatch.setattr(step_graph.torch, "cuda", pretend)
    monkeypatch.setattr(
        step_graph.torch._C, "_cuda_endAllocateToPool", pretend.give_up, raising=False
    )
    return pretend


def test_a_recording_is_begun_ended_and_repeated(cuda: PretendCuda) -> None:
    record = CudaGraphs(torch.device("cuda"))
    first = record(lambda: torch.ones(1))
    assert cuda.said == [
        "stream", "waits: error", "waits: default", "synchronize", "begin (0, 7)", "end", "back",
    ]  # fmt: skip
    assert first() == torch.ones(1)
    cuda.said.clear()
    record(lambda: torch.ones(1))
    assert cuda.said == ["stream", "synchronize", "begin (0, 7)", "end", "back"]


def test_what_waits_is_found_before_it_is_recorded(cuda: PretendCuda) -> None:
    def run() -> torch.Tensor:
        if "waits: error" in cuda.said:
            raise RuntimeError("called a synchronizing CUDA operation")
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="a step waits for the device: called a synchronizing"):
        CudaGraphs(torch.device("cuda"))(run)
    assert cuda.said == ["stream", "waits: error", "waits: default", "back"]


@pytest.mark.parametrize("before", [0, 1], ids=["the first", "a later one"])
@pytest.mark.parametrize("broken", [False, True])
def test_a_recording_that_fails_leaves_nothing_under_way(
    broken: bool, before: int, cuda: PretendCuda
) -> None:
    record = CudaGraphs(torch.device("cuda"))
    for _ in range(before):
        record(lambda: torch.ones(1))
    cuda.said.clear()
    cuda.broken = broken

    def run() -> torch.Tensor:
        if any(said.startswith("begin") for said in cuda.said):
            raise RuntimeError("operation not permitted when stream is capturing")
        return torch.ones(1)

    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        record(run)
    assert cuda.said[-3:] == (["end", "given up 1 (0, 7)", "back"] if broken else ["begin (0, 7)", "end", "back"])  # fmt: skip
    assert gc.isenabled()
    assert (cuda.under_way, cuda.random.recording) == (None, False)
    cuda.broken = False
    assert record(lambda: torch.ones(1))() == torch.ones(1)  # nothing is locked, nor the pool dead


def test_a_recording_whose_end_fails_leaves_nothing_under_way(cuda: PretendCuda) -> None:
    cuda.broken = True
    record = CudaGraphs(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="previous error"):
        record(lambda: torch.ones(1))
    assert (cuda.under_way, cuda.random.recording) == (None, False)


def test_a_recording_that_cannot_begin_leaves_random_numbers_as_they_were(
    cuda: PretendCuda,
) -> None:
    record = CudaGraphs(torch.device("cuda"))
    cuda.users[record._pool] = weakref.WeakSet()
    with pytest.raises(RuntimeError, match="use_count"):
        record(lambda: torch.ones(1))
    assert not cuda.random.recording
    record(lambda: torch.ones(1))


def test_recordings_that_are_let_go_leave_a_pool_for_the_next(cuda: PretendCuda) -> None:
    """As the trial's are, and all of them when the cache moves: torch refuses a pool without users.
    So it was on an H100."""
    record = CudaGraphs(torch.device("cuda"))
    for _ in range(3):
        replay = record(lambda: torch.ones(1))
        del replay
    assert {s for s in cuda.said if s.startswith("begin")} == {"begin (0, 7)"}
