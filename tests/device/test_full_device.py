"""A device that is full, at any point of a run: a sentence that says what of this run needs less,
nothing half written, and the same command resumes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from children import Run
from pretend_device import LEDGER, NAME, ledger

from llmquant.checkpoint.reader import sha256_file
from llmquant.errors import LlmquantError, ParallelError
from llmquant.models.block_inputs import first_inputs
from llmquant.planning.timing import time_blocks
from llmquant.quantization import workers
from llmquant.quantization.blocks.full_device import less
from llmquant.quantization.blocks.hidden_states import IN_MEMORY
from llmquant.quantization.options import Events, QuantizeOptions
from llmquant.quantization.plan import Progress
from llmquant.quantization.prepare import prepare
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.distributed import World, _reached
from llmquant.runtime.memory import out_of_memory

pytestmark = pytest.mark.device
TUNE = {"steps": 2, "lr": 0.01, "scale_lr": 0.002, "batch_size": 2, "checks": 1, "patience": 2}
ON = QuantizeOptions(device=NAME)
CHANGES: dict[str, dict[str, Any]] = {
    "rtn": {"method": "rtn", "calibration": {"source": None}},
    "gptq": {},
    "smooth": {
        "method": "rtn",
        "smooth": {},
        "weights": {"bits": 8, "group_size": -1, "activations": "int8-dynamic"},
    },
    "tune": {"tune": TUNE},
}


@pytest.fixture(scope="module")
def wide(make_model: Callable[..., Path]) -> Path:
    """Blocks larger than the embeddings, so that those are what fills a device."""
    return make_model(intermediate_size=512)


@pytest.fixture(scope="module", params=CHANGES.values(), ids=CHANGES.keys())
def recipe(request: pytest.FixtureRequest, gptq: Recipe) -> Recipe:
    return gptq.updated({"scales": {"steps": 0}, **request.param})


@pytest.fixture(scope="module")
def whole(recipe: Recipe, wide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run with memory enough, and what it took."""
    with ledger() as seen:
        done = quantize(wide, tmp_path_factory.mktemp("whole") / "out", recipe, ON)
    return done.path, seen.peak


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in folder.iterdir() if p.suffix == ".safetensors"}


@pytest.mark.parametrize("share", [0, 0.4, 0.6, 0.8, 0.95])
def test_it_is_a_sentence_and_leaves_nothing(
    share: float, recipe: Recipe, wide: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    with ledger(cap=int(whole[1] * share)), pytest.raises(LlmquantError) as refused:
        quantize(wide, tmp_path / "out", recipe, ON)
    said = str(refused.value)
    assert type(refused.value) is LlmquantError
    assert said.startswith(f"{NAME} has no memory left (pretend out of memory. Tried to allocate ")
    assert "in block 1 of 2: no incomplete output remains. Less is needed with" in said
    assert list(tmp_path.iterdir()) == []


def test_the_same_command_resumes(
    recipe: Recipe, wide: Path, whole: tuple[Path, int], tmp_path: Path
) -> None:
    def fill(at: Progress) -> None:
        if at.block == 1:
            LEDGER.cap = LEDGER.live

    with ledger(), pytest.raises(LlmquantError) as refused:
        quantize(wide, tmp_path / "out", recipe, ON, Events(on_progress=fill))
    said = str(refused.value)
    assert (
        "in block 2 of 2: 1 of 2 blocks are saved next to out; run the same command to resume"
        in said
    )
    assert not (tmp_path / "out").exists()
    again = quantize(wide, tmp_path / "out", recipe, ON)
    assert again.resumed == 1
    assert hashes(again.path) == hashes(whole[0])


@pytest.mark.parametrize(
    ("changes", "dtype", "expected"),
    [
        ({}, "auto", ["calibration.batch_size below 8 in the recipe", "--seqlen below 32", "--dtype bfloat16"]),
        ({"calibration.batch_size": 1}, "bfloat16", ["--seqlen below 32"]),
        ({"tune": TUNE}, "bfloat16", ["tune.batch_size below 2 in the recipe", "--seqlen below 32"]),
        (
            {"gptq.true_sequential": False, "calibration.batch_size": 1}, "bfloat16",
            ["--seqlen below 32", "gptq.true_sequential (one Hessian at a time)"],
        ),
        ({"method": "rtn", "calibration": {"source": None}}, "auto", []),
    ],
    ids=["gptq", "one window in bfloat16", "tune", "all Hessians at once", "without a text"],
)  # fmt: skip
def test_what_needs_less_is_of_this_run(
    changes: dict[str, Any], dtype: str, expected: list[str], gptq: Recipe, model: Path
) -> None:
    plan = prepare(model, gptq.updated(changes), NAME, dtype)
    assert less(plan.recipe, plan.dtype) == [*expected, "--device cpu"]


def test_the_command_ends_with_one(run: Run, wide: Path, text: Path) -> None:
    with ledger(cap=2_000_000):
        done = run(
            "quantize", wide, "-o", "out", "--group-size", "32", "--calibration", f"file:{text}",
            "--nsamples", "4", "--seqlen", "32", "--device", NAME,
        )  # fmt: skip
    assert done.code == 1
    assert "error: pretend has no memory left" in done.err
    assert "Traceback" not in done.err
    assert [p.name for p in Path().iterdir()] == ["out.quantize.log.jsonl"]


def test_so_does_a_command_that_knows_no_better(run: Run, quantized: Path) -> None:
    with ledger(cap=100_000):
        done = run("generate", quantized, "Once", "--device", NAME)
    assert done.code == 1
    assert "error: there is no memory left: pretend out of memory" in done.err


def test_a_plan_that_times_blocks_says_it_too(gptq: Recipe, wide: Path) -> None:
    with ledger(cap=2_000_000), pytest.raises(LlmquantError, match="pretend has no memory left"):
        time_blocks(wide, gptq, ON)


def test_a_process_beside_the_first_says_whose_device_it_was(
    gptq: Recipe, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: Any) -> Any:
        raise torch.OutOfMemoryError("pretend out of memory.")

    monkeypatch.setattr(workers, "walk", fill)
    plan = prepare(wide, gptq, NAME, world=World(1, 2))
    with pytest.raises(LlmquantError, match="process 1 of 2 ends, and the run with it"):
        workers.assist(plan, (), tmp_path / "out", IN_MEMORY)


def test_it_is_no_lost_process_and_no_unknown_model() -> None:
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with pytest.raises(torch.OutOfMemoryError), _reached(World(0, 2)):
        raise full
    with pytest.raises(ParallelError), _reached(World(0, 2)):
        raise RuntimeError("Connection closed by peer")

    def model(**_: Any) -> Any:
        raise full

    with pytest.raises(torch.OutOfMemoryError):
        first_inputs(model, [SimpleNamespace()], [torch.zeros(1, 1)])


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
    ids=["CUDA", "cuBLAS", "cuSOLVER", "CPU", "Python", "a wrong shape", "another kind"],
)
def test_which_errors_mean_it(error: Exception, full: bool) -> None:
    assert out_of_memory(error) is full
