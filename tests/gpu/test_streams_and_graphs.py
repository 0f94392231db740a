"""On a GPU: copies beside the computation, steps recorded as graphs, and a card that is full."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from llmquant.checkpoint.reader import sha256_file
from llmquant.errors import LlmquantError
from llmquant.kernels.gpu.attention import grouped_sdpa
from llmquant.models.load import load
from llmquant.quantization.blocks import hidden_states
from llmquant.quantization.blocks.transfers import Streamed, Transfers, behind, transfers_of
from llmquant.quantization.options import QuantizeOptions
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant_serve.engines import local
from llmquant_serve.engines.base import Sampling
from llmquant_serve.engines.batching.step_graph import CudaGraphs
from llmquant_serve.engines.local import LocalEngine

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
REQUESTS = [([9, 8, 7, 6], 40), ([11, 12], 9), ([5, 20, 30, 40, 50], 25)]


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in folder.iterdir() if p.suffix == ".safetensors"}


@pytest.mark.parametrize("max_memory", [None, 1], ids=["in memory", "in files"])
def test_copies_beside_the_computation_move_the_same(
    max_memory: int | None, model: Path, gptq: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    recipe = gptq.updated({"calibration.batch_size": 1, "gptq.asymmetric": 0.5})
    options = QuantizeOptions(device=DEVICE, max_memory=max_memory)
    assert type(transfers_of(torch.device(DEVICE))) is Streamed
    found = quantize(model, tmp_path / "streamed", recipe, options).path
    monkeypatch.setattr(hidden_states, "transfers_of", Transfers)
    assert hashes(found) == hashes(quantize(model, tmp_path / "plain", recipe, options).path)


def answers(model: Any) -> list[list[int]]:
    async def asked() -> list[list[int]]:
        engine = LocalEngine(model)
        await engine.start()

        async def one(prompt: list[int], tokens: int) -> list[int]:
            sampling = Sampling(max_tokens=tokens, temperature=0.0, ignore_eos=True)
            return [t.id async for step in engine.generate(prompt, sampling) for t in step.tokens]

        found = await asyncio.gather(*(one(*request) for request in REQUESTS))
        again = await one(*REQUESTS[0])
        await engine.close()
        return [*found, again]

    return asyncio.run(asked())


def test_recorded_steps_give_the_same_tokens(
    quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(quantized, dtype="float32", device=DEVICE, kernel="reference")
    plain, recordings = local.recorder_for(model), []
    assert plain is not None

    def record(run: Any) -> Any:
        recordings.append(run)
        return plain(run)

    monkeypatch.setattr(local, "recorder_for", lambda _: record)
    found = answers(model)
    monkeypatch.setattr(local, "recorder_for", lambda _: None)
    assert found == answers(model)
    assert recordings


def test_a_full_card_is_a_sentence(model: Path, gptq: Recipe, tmp_path: Path) -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-5)
    try:
        with pytest.raises(LlmquantError, match=r"cuda(:\d+)? has no memory left"):
            quantize(model, tmp_path / "out", gptq, QuantizeOptions(device=DEVICE))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert list(tmp_path.iterdir()) == []


def test_what_waits_is_told_and_spoils_no_recording() -> None:
    record, ones = CudaGraphs(torch.device(DEVICE)), torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="a step waits for the device"):
        record(lambda: ones * ones.sum().item())
    assert record(lambda: ones * 2)().tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError, match="captur"):  # no longer looked for: CUDA refuses it
        record(lambda: ones * ones.sum().item())
    torch.cuda.empty_cache()
    assert record(lambda: ones * 3)().tolist() == [3, 3, 3]


def test_what_is_let_go_while_it_is_copied_arrives_whole() -> None:
    moving = Streamed(torch.device(DEVICE))  # without a number, as --device cuda names it
    filled = (torch.full((1 << 24,), float(i), device=DEVICE) for i in range(24))
    for i, arrived in enumerate(behind(map(moving.fetch, filled))):
        assert arrived.eq(i).all()


def test_a_prompt_in_float32_needs_no_scores_of_all_heads() -> None:
    module = torch.nn.Module()
    module.num_key_value_groups, module.is_causal = 4, True
    query = torch.randn(1, 8, 4096, 64, device=DEVICE)
    key, value = torch.randn(2, 1, 2, 4096, 64, device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grouped_sdpa(module, query, key, value, None)
    scores = 8 * 4096**2 * 4
    assert torch.cuda.max_memory_allocated() - before < scores / 4
