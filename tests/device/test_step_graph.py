"""Steps that are recorded once and repeated give the tokens of steps that are run anew."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_graph import FakeGraph, fake_graph
from pretend_device import NAME, ledger, no_waiting
from tiny_models import save

from llmquant.models.load import load
from llmquant_serve.engines import local, row_cache, step_graph
from llmquant_serve.engines.base import EngineError, Sampling, Token
from llmquant_serve.engines.local import LocalEngine
from llmquant_serve.engines.row_cache import RowCache
from llmquant_serve.engines.step_graph import StaticStep, StepGraphs, recorder_for, trial, why_not

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


def test_a_buffer_that_moved_is_recorded_anew(
    loaded: Any, monkeypatch: pytest.MonkeyPatch, recorded: list[int]
) -> None:
    forget_moves(monkeypatch)
    with pytest.raises(EngineError, match="out of bounds"):
        answers(loaded)


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
        StaticStep(there, cache, rows, numbers).run()


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
    monkeypatch.setattr(step_graph, "trial", lambda *_: None)
    assert recorder_for(loaded) is step_graph.cuda_graph
    monkeypatch.setattr(step_graph, "trial", lambda *_: "it is off")
    assert recorder_for(loaded) is None
    assert caplog.messages == ["steps are run anew, not repeated as CUDA graphs: it is off"]
