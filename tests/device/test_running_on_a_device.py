"""A packed model on a device: loaded, evaluated, generating and served, with the CPU's numbers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from children import Run
from pretend_device import NAME, ledger, no_waiting, on_device

from llmquant.kernels.packed_linear import PackedLinear
from llmquant.models.load import load
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant_serve.engines.base import Sampling
from llmquant_serve.engines.local import LocalEngine

pytestmark = pytest.mark.device
IDS = torch.randint(6, 4096, (1, 12), generator=torch.Generator().manual_seed(1))
KERNEL = "reference"  # the one that both have


@pytest.fixture(scope="module")
def here(quantized: Path) -> torch.nn.Module:
    return load(quantized, dtype="float32", device="cpu", kernel=KERNEL)


@pytest.fixture(scope="module")
def there(quantized: Path) -> torch.nn.Module:
    return load(quantized, dtype="float32", device=NAME, kernel=KERNEL)


def test_everything_is_on_the_device(there: torch.nn.Module) -> None:
    tensors = {**dict(there.named_parameters()), **dict(there.named_buffers())}
    assert {n for n, t in tensors.items() if not on_device(t)} == set()


def test_loading_holds_no_second_copy(
    make_model: Callable[..., Path], gptq: Recipe, tmp_path: Path
) -> None:
    """Beside the model there is at most what one linear takes while it is packed."""
    rtn = gptq.updated({"method": "rtn", "calibration.source": None})
    path = quantize(make_model(num_hidden_layers=6), tmp_path / "out", rtn).path
    with ledger() as seen:
        loaded = load(path, dtype="float32", device=NAME, kernel=KERNEL)
        held = seen.live - seen.base
    largest = max(
        m.in_features * m.out_features for m in loaded.modules() if isinstance(m, PackedLinear)
    )
    assert held > 20 * largest
    assert seen.peak < held + 8 * largest


@torch.inference_mode()
def test_logits_are_the_cpus(here: torch.nn.Module, there: torch.nn.Module) -> None:
    found = there(IDS.to(NAME)).logits.cpu()
    torch.testing.assert_close(
        found, here(IDS).logits, atol=1e-4, rtol=0
    )  # attention sums otherwise


@torch.inference_mode()
def test_a_step_waits_for_nothing(there: torch.nn.Module) -> None:
    out = there(IDS.to(NAME), use_cache=True)
    token = out.logits[:, -1:].argmax(-1)
    with no_waiting():
        there(token, past_key_values=out.past_key_values, use_cache=True)


@torch.inference_mode()
def test_generation_is_the_cpus(here: torch.nn.Module, there: torch.nn.Module) -> None:
    options = {"max_new_tokens": 8, "do_sample": False}
    found = there.generate(IDS.to(NAME), **options)
    assert torch.equal(found.cpu(), here.generate(IDS, **options))


def test_an_engine_serves_the_cpus_tokens(here: torch.nn.Module, there: torch.nn.Module) -> None:
    prompts = [IDS[0, :5].tolist(), IDS[0, 3:].tolist()]
    sampling = Sampling(max_tokens=6, temperature=0.0, logprobs=2)

    async def answers(model: torch.nn.Module) -> list[list[int]]:
        engine = LocalEngine(model)
        await engine.start()

        async def one(prompt: list[int]) -> list[int]:
            return [t.id async for step in engine.generate(prompt, sampling) for t in step.tokens]

        found = await asyncio.gather(*map(one, prompts))
        await engine.close()
        return found

    with ledger() as seen:
        found = asyncio.run(answers(there))
    assert found == asyncio.run(answers(here))
    assert seen.waits  # for tokens and log-probabilities, which are what a user reads


def test_an_evaluation_measures_the_same(run: Run, quantized: Path, text: Path) -> None:
    """Of the packed model alone: on a device of wrappers transformers' own loader, which reads an
    unquantized one, leaves a buffer unset."""

    def measured(device: str) -> float:
        done = run(
            "eval", quantized, "--text", f"file:{text}", "--window", "32",
            "--max-windows", "3", "--dtype", "float32", "--device", device, "--kernel", KERNEL,
            "--no-cost", "--no-noise-floor", "--json",
        )  # fmt: skip
        assert done.code == 0, done.err
        (found,) = json.loads(done.out)["models"]
        return float(found["metrics"]["perplexity"]["value"])

    with ledger() as seen:
        there = measured(NAME)
    assert seen.to_device > 0
    assert there == pytest.approx(measured("cpu"), rel=1e-4)
