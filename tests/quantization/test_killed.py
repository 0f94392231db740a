"""Runs killed with SIGKILL at every kind of instant, continued by the same command, must end with
the same bytes.

The process that is killed is a fork of ``killing.py``, which has imported everything once. After
every second kill the files get what a power loss may leave behind: bytes that no fsync covered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmquant.checkpoint.manifest import verify
from llmquant.checkpoint.reader import sha256_file
from llmquant.recipe import Recipe

Ask = Callable[..., dict[str, Any]]
TUNE = {
    "steps": 8,
    "lr": 0.01,
    "scale_lr": 0.002,
    "batch_size": 2,
    "checks": 2,
    "patience": 2,
    "target": "block",
}
# 60 kB is about a block of the small model, so shards end inside, between and behind blocks.
ONE_SHARD, MANY = 5_000_000_000, 60_000


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """A quantization in a child of a warm process; returns what became of it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, str(Path(__file__).parents[1] / "killing.py")]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as warm:
        assert warm.stdin is not None
        assert warm.stdout is not None

        def ask_(**job: Any) -> dict[str, Any]:
            warm.stdin.write(
                json.dumps({k: str(v) if isinstance(v, Path) else v for k, v in job.items()}) + "\n"
            )
            warm.stdin.flush()
            answer: dict[str, Any] = json.loads(warm.stdout.readline())
            return answer

        yield ask_
        warm.stdin.close()


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in sorted(folder.iterdir())}


def lose_power(folder: Path, step: int) -> None:
    """Leave what was never synced: bytes behind the end of files that were in work, a file that
    nobody names, a torn line."""
    for path in sorted(folder.glob(".out.*/*")):
        if path.name.endswith((".data", "journal.jsonl")):
            with path.open("ab") as file:
                file.write(b"0123456789abcdef {" * (1 + step % 3))
    for name in (".out.partial/shard-00007.safetensors", ".out.resume/states-000999.bin"):
        if (folder / name).parent.is_dir():
            (folder / name).write_bytes(b"half")


def case(recipe: Recipe, **changes: Any) -> dict[str, Any]:
    return recipe.updated(changes).model_dump(mode="json")


RUNS = [
    pytest.param(
        {"method": "gptq", "include": ["*"], "ignore": []},
        MANY,
        None,
        28,
        id="gptq, head too, many shards",
    ),
    pytest.param(
        {"method": "gptq", "gptq.asymmetric": 0.5, "tune": TUNE},
        ONE_SHARD,
        1,
        6,
        id="gptq+tune, spilled",
    ),
    pytest.param({"method": "rtn"}, MANY, None, 10, id="rtn, many shards"),
    pytest.param(
        {"method": "gptq", "gptq.asymmetric": 0.5, "embeddings": {"bits": 8}},
        MANY,
        None,
        12,
        id="packed embeddings, two streams",
    ),
]


@pytest.mark.parametrize(("changes", "shard", "memory", "kills"), RUNS)
def test_killed_anywhere_it_ends_with_the_same_files(
    ask: Ask,
    model: Path,
    gptq: Recipe,
    tmp_path: Path,
    changes: dict[str, Any],
    shard: int,
    memory: int | None,
    kills: int,
) -> None:
    job = {
        "model": model,
        "recipe": case(gptq, **changes),
        "max_shard_size": shard,
        "max_memory": memory,
    }
    whole = ask(output=tmp_path / "whole" / "out", count=True, **job)
    expected = hashes(tmp_path / "whole" / "out")
    assert (whole["killed"], whole["resumed"]) == (False, 0)
    seen = set()
    # Spread over the run, and the last few one by one: there the folder gets its name and the state
    # goes.
    last = whole["instants"] - kills // 4
    spread = [1 + (last - 1) * i // (kills - kills // 4) for i in range(kills - kills // 4)]
    for i, at in enumerate([*spread, *range(last + 1, whole["instants"] + 1)]):
        folder = tmp_path / f"at-{at}"
        assert ask(output=folder / "out", kill=at, behind=bool(i % 2), **job)["killed"], (
            f"instant {at}"
        )
        if i % 2:
            lose_power(folder, i)
        whole_already = (folder / "out").exists()
        ended = ask(output=folder / "out", **job)
        if whole_already and "error" in ended:
            assert "already exists" in ended["error"], f"instant {at}: {ended['error']}"
        else:
            assert "error" not in ended, f"instant {at}: {ended['error']}"
            seen.add(ended["resumed"])
        assert hashes(folder / "out") == expected, f"instant {at} of {whole['instants']}"
        assert [p.name for p in folder.iterdir()] == ["out"], f"instant {at}"
    assert seen >= {0, 1, 2}  # something was always kept: no run began anew behind its first block
    verify(folder / "out")


def test_killed_again_and_again_at_random_moments(
    ask: Ask, model: Path, gptq: Recipe, tmp_path: Path
) -> None:
    job = {"model": model, "recipe": case(gptq), "max_shard_size": MANY}
    seconds = ask(output=tmp_path / "whole" / "out", **job)["seconds"]
    for _ in range(5):
        ask(output=tmp_path / "killed" / "out", after_seconds=seconds, **job)
    if not (tmp_path / "killed" / "out").exists():
        ask(output=tmp_path / "killed" / "out", **job)
    assert hashes(tmp_path / "killed" / "out") == hashes(tmp_path / "whole" / "out")


@pytest.mark.parametrize("limit", [30_000, 1_050_000], ids=lambda n: f"{n} bytes")
def test_a_file_that_the_kernel_cuts_short_is_told_and_continued(
    ask: Ask, model: Path, gptq: Recipe, tmp_path: Path, limit: int
) -> None:
    job = {"model": model, "recipe": case(gptq), "max_shard_size": ONE_SHARD}
    ask(output=tmp_path / "whole" / "out", **job)
    refused = ask(output=tmp_path / "short" / "out", file_limit=limit, **job)
    assert "File too large" in refused.get("error", ""), refused
    assert not (tmp_path / "short" / "out").exists()
    ask(output=tmp_path / "short" / "out", **job)
    assert hashes(tmp_path / "short" / "out") == hashes(tmp_path / "whole" / "out")
