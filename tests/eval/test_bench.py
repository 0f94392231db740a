"""``llmquant bench``: turns, ratios within rounds, failures that keep what was measured."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from children import Run

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.models.resolve import ModelFolder, resolve_models
from llmquant_eval.speed import process, rounds
from llmquant_eval.speed.process import Conditions, measure_apart
from llmquant_eval.speed.rounds import Bench, fitting_points, run_bench
from llmquant_eval.speed.schema import Point, ProcessTimes, SpeedReport, Spread, Timing

ONE = Point(prompt_tokens=100, batch_size=2)


@pytest.fixture
def two(base_model: Path, model: Path) -> list[ModelFolder]:
    return [m for m in resolve_models([str(base_model), str(model)]) if isinstance(m, ModelFolder)]


Measure = Callable[[Path, Sequence[Point], Conditions], ProcessTimes]


def slower_each_time(calls: list[Path], slow: Path, fails: tuple[Path, int] | None) -> Measure:
    """A machine that takes twice as long in each process as in the one before; ``slow`` takes four
    times as long. The model of ``fails`` fails in its n-th process."""

    def measure(path: Path, points: Sequence[Point], conditions: Conditions) -> ProcessTimes:
        calls.append(path)
        if fails == (path, calls.count(path)):
            raise LlmquantError("it broke")
        seconds = 2.0 ** len(calls) * (4 if path == slow else 1)
        timings = tuple(
            Timing(
                point=point,
                prefill_seconds=(seconds,),
                decode_seconds=(2 * seconds,),
                peak_memory_bytes=len(calls),
                device_peak_bytes=None,
            )
            for point in points
        )
        return ProcessTimes(
            load_seconds=seconds,
            threads=2,
            dtype="float32",
            kernels={},
            memory_floor_bytes=1,
            timings=timings,
        )

    return measure


@pytest.fixture
def bench(two: list[ModelFolder]) -> Bench:
    return Bench(two, [ONE], Conditions(new_tokens=10), rounds=4)


def test_models_take_turns_and_ratios_are_within_rounds(
    bench: Bench, two: list[ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (m.path for m in two)
    calls: list[Path] = []
    monkeypatch.setattr(rounds, "measure_apart", slower_each_time(calls, second, None))
    report = run_bench(bench)
    assert calls == [first, second, second, first, first, second, second, first]
    one, other = (m.points[0] for m in report.models)
    assert (one.prefill_ratio, one.decode_ratio) == (None, None)
    assert other.decode_ratio == Spread.of([1 / 8, 1 / 2, 1 / 8, 1 / 2])
    assert other.prefill_ratio == other.decode_ratio
    assert one.first_token_seconds.values == (2, 16, 32, 256)
    assert one.prefill_tokens_per_second == Spread.of(2 * 100 / s for s in (2, 16, 32, 256))
    assert one.decode_tokens_per_second.median == (2 * 10 / 32 + 2 * 10 / 64) / 2
    assert other.peak_memory_bytes == 7


@pytest.mark.parametrize(("which", "number", "rounds_of_it"), [(0, 1, 0), (1, 1, 0), (1, 3, 2)])
def test_a_model_that_fails_keeps_its_rounds_and_the_other_goes_on(
    bench: Bench,
    two: list[ModelFolder],
    which: int,
    number: int,
    rounds_of_it: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = slower_each_time([], two[1].path, (two[which].path, number))
    monkeypatch.setattr(rounds, "measure_apart", fake)
    kept: list[SpeedReport] = []
    lines: list[str] = []
    report = run_bench(bench, lines.append, kept.append)
    broken, other = report.models[which], report.models[1 - which]
    assert (broken.failure, other.failure) == ("it broke", None)
    assert [len(p.load_seconds.values) if p.load_seconds else 0 for p in (broken, other)] == [
        rounds_of_it,
        4,
    ]
    assert [r.rounds_done for r in kept] == [1, 2, 3, 4]
    assert len([x for x in lines if x.endswith("it broke")]) == 1
    assert SpeedReport.model_validate_json(report.to_json()) == report


def test_the_default_prompt_is_what_all_contexts_take(two: list[ModelFolder]) -> None:
    assert [str(p) for p in fitting_points(two, [], [1], 3)] == ["1 × 124 tokens"]
    assert fitting_points([], [], [1], 3) == [Point(prompt_tokens=512, batch_size=1)]
    order = fitting_points(two, [9, 3], [2, 1], 3)
    assert [str(p) for p in order] == [
        "1 × 3 tokens",
        "1 × 9 tokens",
        "2 × 3 tokens",
        "2 × 9 tokens",
    ]
    with pytest.raises(UsageError, match=r"takes 128 tokens: a prompt of 125 and 3 new ones"):
        fitting_points(two, [125], [1], 3)


def test_a_process_that_the_system_kills(
    two: list[ModelFolder], monkeypatch: pytest.MonkeyPatch
) -> None:
    kill = "import os; os.kill(os.getpid(), 9)"
    real = process.subprocess.run
    monkeypatch.setattr(
        process.subprocess, "run", lambda command, **how: real([command[0], "-c", kill], **how)
    )
    with pytest.raises(LlmquantError, match="was killed, probably by the system for memory"):
        measure_apart(two[0].path, [ONE], Conditions())


def test_from_the_command_line(run: Run, base_model: Path, quantized: Path, tmp_path: Path) -> None:
    options = (
        "--prompt-tokens",
        "8,16",
        "--new-tokens",
        "2",
        "--rounds",
        "2",
        "--dtype",
        "float32",
    )
    done = run("bench", base_model, quantized, *options, "-o", tmp_path / "b.json")
    assert done.code == 0, done.err
    assert done.err.count("tokens/s") == 2 * 2 * 2
    report = SpeedReport.model_validate_json((tmp_path / "b.json").read_text())
    assert [m.label for m in report.models] == [base_model.name, quantized.name]
    assert (report.rounds_done, report.models[1].kernels) == (2, {"cpu": 14})
    assert [str(p.point) for p in report.models[0].points] == ["1 × 8 tokens", "1 × 16 tokens"]
    assert done.out.count("decode") == 2
    assert all(m.scheme in done.out for m in report.models)
    again = run("bench", base_model, *options[2:4], "--rounds", "1", "--json", "--quiet")
    assert json.loads(again.out)["kind"] == "speed"
    assert again.err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--prompt-tokens", "0"), "--prompt-tokens '0' is no number of 1 or more"),
        (("--batch-size", "1,two"), "--batch-size 'two' is no number"),
        (("--prompt-tokens", "5000"), "a prompt of 5000 and 64 new ones do not fit"),
        (("--device", "tpu"), "tpu"),
        (("--dtype", "int3"), "int3"),
        (("-o", "no/such/folder/b.json"), "does not exist; make it first"),
        (("http://127.0.0.1:9/v1#m",), "is a server"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_misuse(run: Run, base_model: Path, arguments: tuple[str, ...], says: str) -> None:
    done = run("bench", base_model, *arguments)
    assert (done.code, done.out, says in done.err) == (2, "", True), done.err


def test_a_model_that_fails_is_exit_code_1(
    run: Run, base_model: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = slower_each_time([], quantized, (base_model, 1))
    monkeypatch.setattr(rounds, "measure_apart", fake)
    done = run("bench", base_model, quantized, "--prompt-tokens", "8")
    assert (done.code, "base could not be measured; see above" in done.err) == (1, True)
    assert "base failed: it broke" in done.out
    assert "1 × 8 tokens" in done.out


def test_a_damaged_model_is_refused_before_anything_is_measured(
    run: Run, base_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(base_model, tmp_path / "broken")
    weights = tmp_path / "broken" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run("bench", base_model, tmp_path / "broken")
    assert (done.code, done.out, "broken" in done.err, "round" in done.err) == (1, "", True, False)


def test_interrupted_it_shows_the_rounds_that_were_done(
    run: Run, base_model: Path, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Path] = []
    fake = slower_each_time(calls, quantized, None)

    def interrupted(path: Path, points: Sequence[Point], conditions: Conditions) -> ProcessTimes:
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fake(path, points, conditions)

    monkeypatch.setattr(rounds, "measure_apart", interrupted)
    done = run("bench", base_model, quantized, "--prompt-tokens", "8")
    assert done.code == 130
    assert "the median of 1 round in turn" in done.out
    assert "2 of 3 rounds were not measured" in done.out
