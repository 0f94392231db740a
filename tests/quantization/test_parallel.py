"""Two processes quantize one model: bit for bit what one process computes when it sums the same
shares in the same order.

The processes run for real, under torchrun with gloo on the CPU; they are started twice, because
each start imports torch twice.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nearly_equal import check_nearly_equal
from pretend_device import NAME
from torch import Tensor, nn

from llmquant.checkpoint.manifest import Manifest, file_hashes, read_manifest, verify
from llmquant.errors import UsageError
from llmquant.models.block_inputs import BlockInput
from llmquant.quantization import calibrated
from llmquant.quantization.blocks import original as reference
from llmquant.quantization.blocks.capture import observe, observe_pairs
from llmquant.quantization.options import Events, QuantizeOptions
from llmquant.quantization.plan import Progress
from llmquant.quantization.run import quantize
from llmquant.quantization.steps import channel_scaling as scaling
from llmquant.recipe import Recipe
from llmquant.runtime.distributed import ALONE, World, joined
from llmquant.stats import InputStats

TESTS = Path(__file__).parents[1]
AWQ = {"awq.grid": 4, "calibration.first_token_share": 0.25}
ASYMMETRIC = {"gptq.asymmetric": 0.5}
SMOOTH = {
    "smooth": {},
    "weights.bits": 8,
    "weights.group_size": -1,
    "weights.activations": "int8-dynamic",
}


def torchrun(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Two processes; ``--standalone`` finds a free port."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *arguments,
    ]
    paths = os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    return subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.fixture(scope="module")
def batched(gptq: Recipe) -> Recipe:
    """Three batches: shares of two and of one."""
    return gptq.updated({"calibration.batch_size": 2})


@pytest.fixture(scope="module")
def runs(batched: Recipe) -> dict[str, tuple[Recipe, int | None]]:
    """Recipe and memory limit of each run; a limit of one byte puts all hidden states into
    files."""
    return {
        "rtn": (batched.updated({"method": "rtn", "calibration.source": None}), None),
        "gptq": (batched, None),
        "again": (batched, None),
        "spilled": (batched, 1),
        "asymmetric": (batched.updated(ASYMMETRIC), None),
        "awq": (batched.updated(AWQ), None),
        "head": (batched.updated({"ignore": ()}), None),
        "gptq on a device": (batched, None),
        "awq on a device": (batched.updated(AWQ), 1),
    }


def device_of(run: str) -> str:
    return NAME if "device" in run else "cpu"


@pytest.fixture(scope="module")
def together(
    model: Path,
    runs: dict[str, tuple[Recipe, int | None]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with one folder for each run of two processes."""
    folder = tmp_path_factory.mktemp("together")
    wanted = [
        {
            "output": str(folder / name),
            "recipe": recipe.model_dump(mode="json"),
            "max_memory": limit,
            "device": device_of(name),
        }
        for name, (recipe, limit) in runs.items()
    ]
    failing = {"output": str(folder / "failing"), "recipe": runs["gptq"][0].model_dump(mode="json")}
    request = folder / "request.json"
    request.write_text(
        json.dumps({"model": str(model), "runs": wanted, "failing": failing}), encoding="utf-8"
    )
    done = torchrun(str(TESTS / "parallel_worker.py"), str(request), cwd=folder)
    assert (folder / "error-0.txt").is_file(), done.stderr
    return folder


def by_shares(batches: Sequence[BlockInput], observed: Any) -> Mapping[str, InputStats]:
    """What two processes have together: each share's statistics, the second added to the first."""
    first, second = (observed(range(rank, len(batches), 2)) for rank in range(2))
    for name, stats in first.items():
        stats.merge(second[name])
    result: Mapping[str, InputStats] = first
    return result


def renumbered(arguments: Sequence[Any], share: Sequence[int]) -> list[Any]:
    """What is entered around a batch is asked for by the batch's number in the whole."""
    return [(lambda n, a=a: a(share[n])) if callable(a) else a for a in arguments]


@pytest.fixture
def summed_by_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that sums as two do."""

    def shares(
        block: nn.Module,
        wanted: Mapping[str, nn.Linear],
        batches: Sequence[BlockInput],
        *more: Any,
        **named: Any,
    ) -> Any:
        return by_shares(
            batches,
            lambda share: observe(
                block, wanted, [batches[i] for i in share], *renumbered(more, share), **named
            ),
        )

    def pairs(
        block: nn.Module,
        wanted: Mapping[str, nn.Linear],
        batches: Sequence[BlockInput],
        originals: Mapping[str, Tensor],
        hidden: Sequence[Tensor],
        *more: Any,
    ) -> Any:
        def observed(share: Sequence[int]) -> Any:
            return observe_pairs(
                block,
                wanted,
                [batches[i] for i in share],
                originals,
                [hidden[i] for i in share],
                *renumbered(more, share),
            )

        return by_shares(batches, observed)

    monkeypatch.setattr(calibrated, "observe", shares)
    monkeypatch.setattr(scaling, "observe", shares)
    monkeypatch.setattr(reference, "observe_pairs", pairs)


def digests(folder: Path) -> dict[str, str]:
    """What each linear came out as."""
    return {n: m.digest for n, m in read_manifest(folder).modules.items()}


def alike(manifest: Manifest) -> dict[str, Any]:
    """What must not depend on the number of processes."""
    return manifest.model_dump(exclude={"processes"})


@pytest.mark.parametrize("name", ["gptq", "asymmetric", "awq"])
@pytest.mark.usefixtures("summed_by_shares")
def test_two_processes_give_what_one_gives_that_sums_their_shares(
    model: Path,
    together: Path,
    runs: dict[str, tuple[Recipe, int | None]],
    tmp_path: Path,
    name: str,
) -> None:
    quantize(model, tmp_path / "one", runs[name][0])
    one, two = read_manifest(tmp_path / "one"), verify(together / name)
    assert (one.processes, two.processes) == (1, 2)
    assert alike(two) == alike(one)
    assert name != "awq" or any(
        pair.ratio is not None for pairs in one.scaled.values() for pair in pairs
    )


def test_a_data_free_method_gives_the_same_files_in_two_processes(
    model: Path, together: Path, runs: dict[str, tuple[Recipe, int | None]], tmp_path: Path
) -> None:
    quantize(model, tmp_path / "one", runs["rtn"][0])
    assert alike(verify(together / "rtn")) == alike(read_manifest(tmp_path / "one"))


@pytest.mark.parametrize("other", ["again", "spilled"])
def test_two_processes_give_the_same_files_again(together: Path, other: str) -> None:
    assert file_hashes(together / other) == file_hashes(together / "gptq")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_two_processes_give_nearly_the_same_weights_on_a_device(
    together: Path, method: str
) -> None:
    """The pretend one, with hidden states in files for AWQ."""
    check_nearly_equal(together / f"{method} on a device", together / method)


def test_the_head_sees_the_tokens_of_all_processes(together: Path) -> None:
    blocks, head = verify(together / "gptq").modules, verify(together / "head").modules
    assert {n: m for n, m in head.items() if n != "lm_head"} == blocks
    assert head["lm_head"].tokens == 6 * 32


def test_the_processes_left_nothing_beside_their_folders(
    together: Path, runs: dict[str, Any]
) -> None:
    assert {p.name for p in together.iterdir()} == {
        *runs,
        "request.json",
        "error-0.txt",
        "error-1.txt",
    }


def test_a_process_that_fails_ends_the_others_with_a_word(together: Path) -> None:
    assert (together / "error-1.txt").read_text(encoding="utf-8") == "QuantizationError: deliberate"
    told = (together / "error-0.txt").read_text(encoding="utf-8")
    assert told.startswith("ParallelError: process 0 of 2 lost contact with the other processes")


def test_torchrun_starts_the_command_line(
    model: Path, text: Path, together: Path, tmp_path: Path
) -> None:
    recipe = f"weights: {{group_size: 32}}\nscales: {{steps: 4}}\ncalibration: {{source: 'file:{text}', batch_size: 2}}\n"
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    done = torchrun(
        "-m",
        "llmquant",
        "quantize",
        str(model),
        "-o",
        "q",
        "--recipe",
        "recipe.yaml",
        "--nsamples",
        "6",
        "--seqlen",
        "32",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("proved ") == 1, "only the first process prints"
    assert (
        done.stderr.count(
            "2 processes share the work; a run of several processes keeps nothing to continue from"
        )
        == 1
    )
    assert file_hashes(tmp_path / "q").keys() == file_hashes(together / "gptq").keys()
    assert {n: m.digest for n, m in verify(tmp_path / "q").modules.items()} == digests(
        together / "gptq"
    )


# --- what is refused, without starting anything -----------------------------


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        pytest.param({"WORLD_SIZE": "two"}, "must be numbers", id="words"),
        pytest.param({"WORLD_SIZE": "2", "RANK": "2"}, "RANK 2 is not in 0 … 1", id="no such rank"),
        pytest.param({"WORLD_SIZE": "0"}, "is not in", id="nobody"),
    ],
)
def test_a_launchers_variables_are_checked(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        World.of(environment)


def test_without_a_launcher_a_process_is_alone() -> None:
    with joined(World.of({})) as world:
        assert world == ALONE
        stats = InputStats(2)
        stats.add(torch.ones(3, 2))
        world.all_reduce(stats)
        world.barrier()
        assert (stats.tokens, stats.hessian.sum()) == (3, 12)
        assert world.scatter_gather(["a", "b"], str.upper) == {"a": "A", "b": "B"}
        assert world.device("cuda:1") == "cuda:1"


def test_every_process_takes_a_gpu_of_its_own() -> None:
    world = World(rank=5, size=8, local=4, local_rank=1)
    assert [world.device("cpu"), world.device("cuda")] == ["cpu", "cuda:1"]
    with pytest.raises(UsageError, match="8 processes cannot share cuda:0"):
        world.device("cuda:0")


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        pytest.param({"tune": {}}, 2, "tune works in one process only, not in 2", id="tune"),
        pytest.param(SMOOTH, 2, "smooth works in one process only, not in 2", id="smooth"),
        pytest.param(
            {},
            4,
            "4 processes share 3 calibration batches of up to 2 windows",
            id="too few batches",
        ),
    ],
)
def test_what_processes_cannot_share_is_refused(
    model: Path, batched: Recipe, tmp_path: Path, changes: dict[str, Any], size: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        quantize(
            model, tmp_path / "q", batched.updated(changes), QuantizeOptions(world=World(size=size))
        )
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_of_one_process_is_not_continued_by_two(
    model: Path, batched: Recipe, tmp_path: Path
) -> None:
    def interrupt(where: Progress) -> None:
        if where.block == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "q", batched, events=Events(on_progress=interrupt))
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(
        UsageError, match="has the saved state of an interrupted run of one process"
    ):
        quantize(model, tmp_path / "q", batched, QuantizeOptions(world=World(size=2)))
    assert sorted(p.name for p in tmp_path.iterdir()) == before == [".q.partial", ".q.resume"]
