"""An evaluation that was stopped anywhere resumes: the same command ends with the figures of a run
that was not, and runs no batch twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from children import heeding_interrupts

import llmquant
from llmquant_eval.models import resolve
from llmquant_eval.models.kept_answers import PromptScores
from llmquant_eval.models.kept_work import kept_work
from llmquant_eval.report.results import Cost
from llmquant_eval.report.schema import Report
from llmquant_eval.run import cost as cost_of_models
from llmquant_eval.run import loaded, noise
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.request import Request

DATA = Path(__file__).parent / "data"
COST = Cost(
    load_seconds=1.0, prefill_tokens_per_second=1.0, decode_tokens_per_second=1.0, prompt_tokens=1,
    new_tokens=1, repeats=1, threads=1, peak_memory_bytes=1, memory_floor_bytes=1,
    device_peak_bytes=None,
)  # fmt: skip


@dataclass
class Passes:
    """How often a model was run, or a cost measured; ``stop`` of them end as Ctrl-C does."""

    stop: int | None = None
    done: int = 0

    def count(self) -> None:
        if self.done == self.stop:
            raise KeyboardInterrupt
        self.done += 1


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Passes:
    """What runs of this test do; set ``stop`` anew before each."""
    seen = Passes()
    load = resolve.load_model

    def counted(*args: Any) -> Any:
        model = load(*args)
        model.register_forward_pre_hook(lambda *_: seen.count())
        return model

    def cost(*_: object) -> Cost:
        seen.count()
        return COST.model_copy(update={"load_seconds": float(seen.done)})

    for module in (loaded, noise):
        monkeypatch.setattr(module, "load_model", counted)
    monkeypatch.setattr(cost_of_models, "measure_cost", cost)
    return seen


def figures(report: Report) -> dict[str, Any]:
    """What was measured, without when and where."""
    whole = json.loads(report.to_json())
    for model in whole["models"]:
        model["cost"] = model["cost"] and model["cost"]["repeats"]
        for task in model["tasks"]:
            task["samples"] = None
    return {k: whole[k] for k in ("models", "noise_floor", "passes", "protocols")}


def in_turns(request: Request, passes: Passes, every: int) -> tuple[Report, int]:
    """Run until it ends, stopped after each ``every`` passes; the passes made in all."""
    made = 0
    for _ in range(200):
        passes.stop, passes.done = every, 0
        try:
            report = evaluate(request)
        except KeyboardInterrupt:
            made += passes.done
        else:
            return report, made + passes.done
    raise AssertionError("it never ended")


def whole(request: Request, passes: Passes) -> tuple[Report, int]:
    passes.stop, passes.done = None, 0
    return evaluate(request), passes.done


def unfinished(folder: Path | None = None) -> list[Path]:
    return sorted((folder or llmquant.user_cache("eval")).glob("*.unfinished.jsonl"))


@pytest.fixture
def request_of(base_model: Path, altered: Callable[..., Path], words: Path) -> Request:
    """A reference and two candidates on ten windows, two at a time."""
    return Request(
        (
            str(altered("coarse", lambda w: (w * 32).round() / 32)),
            str(altered("half", lambda w: w * 0.5)),
        ),
        str(words), reference=str(base_model), window=64, batch_size=2, protocol=None,
        dtype="float32",
    )  # fmt: skip


def test_windows_and_costs_resume(request_of: Request, passes: Passes) -> None:
    expected, needed = whole(request_of, passes)
    assert not unfinished()
    report, made = in_turns(request_of, passes, every=4)
    assert figures(report) == figures(expected)
    # Of a batch that was begun the passes are made again.
    assert needed < made <= 2 * needed
    assert not unfinished()


def test_a_stop_at_any_pass_loses_a_batch_at_most(request_of: Request, passes: Passes) -> None:
    request = replace(request_of, cost=False, noise_floor=False, text=request_of.text)
    expected, needed = whole(request, passes)
    assert needed == 15  # five batches, three models
    for stop in range(4, needed):
        passes.stop, passes.done = stop, 0
        with pytest.raises(KeyboardInterrupt, match="the same command resumes"):
            evaluate(request)
        report, made = whole(request, passes)
        assert figures(report) == figures(expected)
        assert made == needed - stop // 3 * 3


def test_a_recorded_reference_goes_on(
    request_of: Request, passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmquant_eval.scoring import reference_cache

    monkeypatch.setattr(reference_cache, "_SHARD_BYTES", 1)  # a shard for each window
    request = replace(request_of, cost=False, noise_floor=False, cache=str(tmp_path / "one"))
    expected, needed = whole(request, passes)
    other = replace(request, cache=str(tmp_path / "other"))
    passes.stop, passes.done = 3, 0
    with pytest.raises(KeyboardInterrupt):
        evaluate(other)
    report, made = whole(other, passes)
    assert figures(report) == figures(expected)
    assert made == needed - 3
    (cache,) = (tmp_path / "other").iterdir()
    assert not (cache / "shards.json").exists()
    assert not unfinished(tmp_path / "other")


def test_a_damaged_shard_of_an_unfinished_reference_is_made_anew(
    request_of: Request, passes: Passes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmquant_eval.scoring import reference_cache

    monkeypatch.setattr(reference_cache, "_SHARD_BYTES", 1)
    request = replace(request_of, cost=False, noise_floor=False, cache=str(tmp_path / "one"))
    passes.stop, passes.done = 3, 0
    with pytest.raises(KeyboardInterrupt):
        evaluate(request)
    (shard, *_) = sorted((tmp_path / "one").rglob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    _, made = whole(request, passes)
    assert made == 5 + 10


def test_with_a_cache_the_candidates_resume(
    request_of: Request, passes: Passes, tmp_path: Path
) -> None:
    request = replace(request_of, cost=False, cache=str(tmp_path / "one"))
    expected, _ = whole(request, passes)
    other = replace(request, cache=str(tmp_path / "other"), cache_form="top-8")
    compact, _ = whole(replace(other, cache=str(tmp_path / "third")), passes)
    for form, want in ((None, expected), ("top-8", compact)):
        report, _ = in_turns(replace(other, cache_form=form), passes, every=6)
        assert figures(report) == figures(want)


@pytest.mark.parametrize("what", ["weight", "config", "text", "option"])
def test_another_run_finds_nothing(what: str, request_of: Request, passes: Passes) -> None:
    request = replace(request_of, cost=False, noise_floor=False)
    _, needed = whole(request, passes)
    passes.stop, passes.done = 9, 0
    with pytest.raises(KeyboardInterrupt):
        evaluate(request)
    candidate = Path(request.candidates[0])
    if what == "weight":
        other = Path(request.candidates[1]) / "model.safetensors"
        (candidate / "model.safetensors").write_bytes(other.read_bytes())
    elif what == "config":
        config = json.loads((candidate / "config.json").read_text())
        config["rms_norm_eps"] = 1e-3
        (candidate / "config.json").write_text(json.dumps(config))
    elif what == "text":
        assert request.text is not None
        text = Path(request.text)
        text.write_text(text.read_text().replace("w3 ", "w4 "))
    else:
        request = replace(request, kernel="dense")
    _, made = whole(request, passes)
    assert made == needed


@pytest.mark.filterwarnings("ignore")  # lm-eval's and datasets' own
def test_tasks_resume(tiny_llama: Path, passes: Passes, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    names = {"arc_easy_local": "arc", "piqa_local": "piqa", "lambada_local": "lambada"}
    request = Request(
        (str(tiny_llama),), dtype="float32", cost=False, batch_size=8,
        tasks=",".join(f"{name}={DATA / file}.jsonl" for name, file in names.items()),
        log_samples=str(tmp_path / "samples"),
    )  # fmt: skip
    expected, needed = whole(request, passes)
    samples = {p.name: p.read_bytes() for p in (tmp_path / "samples").iterdir()}
    report, made = in_turns(request, passes, every=3)
    assert figures(report) == figures(expected)
    assert {p.name: p.read_bytes() for p in (tmp_path / "samples").iterdir()} == samples
    # A batch is on disk when the next begins.
    assert made - needed <= -(-needed // 2)
    assert not unfinished()


class Export:
    """Answers as an ONNX export does, and stops."""

    context = 64

    def __init__(self, passes: Passes) -> None:
        self._passes = passes

    def score_all(self, prompts: Sequence[Sequence[int]]) -> Iterator[PromptScores]:
        for ids in prompts:
            self._passes.count()
            yield PromptScores([-0.1 * i for i in ids[1:]], [True] * (len(ids) - 1))

    def complete(self, ids: Sequence[int], *_: object) -> str:
        self._passes.count()
        return f"{len(ids)} tokens"


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_answers_of_an_export_resume(kind: str, base_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    from lm_eval.api.instance import Instance

    from llmquant_eval.tasks.harness_models import ServedLM
    from llmquant_eval.tasks.kept_requests import keep_requests

    arguments: dict[str, list[Any]] = {
        "loglikelihood": [("w3 w4", f" w{i}") for i in range(5, 10)],
        "loglikelihood_rolling": [(f"w3 w4 w{i}",) for i in range(5, 10)],
        "generate_until": [(f"w3 w{i}", {"until": ["w9"], "max_gen_toks": 4}) for i in range(5, 10)],
    }  # fmt: skip
    tokenizer = llmquant.load_tokenizer(base_model)

    def answers(stop: int | None) -> tuple[list[Any], int]:
        passes = Passes(stop)
        with kept_work(tmp_path, "a", print) as kept:
            model = ServedLM(Export(passes), tokenizer)  # type: ignore[arg-type]
            keep_requests(model, kept, "export")
            requests = [
                Instance(kind, {}, args, i) for i, args in enumerate(arguments[kind])  # type: ignore[arg-type]
            ]  # fmt: skip
            return getattr(model, kind)(requests), passes.done

    expected, needed = answers(None)
    with pytest.raises(KeyboardInterrupt):
        answers(3)
    found, rest = answers(None)
    assert found == expected
    assert (needed, rest) == (5, 2)


def test_drawn_answers_are_drawn_again(base_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    from lm_eval.api.instance import Instance

    from llmquant_eval.tasks.harness_models import ServedLM
    from llmquant_eval.tasks.kept_requests import keep_requests

    passes = Passes()
    with kept_work(tmp_path, "a", print) as kept:
        model = ServedLM(Export(passes), llmquant.load_tokenizer(base_model))  # type: ignore[arg-type]
        keep_requests(model, kept, "export")
        drawn = Instance("generate_until", {}, ("w3", {"until": [], "temperature": 0.7}), 0)  # type: ignore[arg-type]
        model.generate_until([drawn])
        model.generate_until([drawn])
    assert passes.done == 2


def test_without_a_place_to_keep_it_an_evaluation_runs(
    base_model: Path, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")  # root may write into any folder
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    told: list[str] = []
    request = Request((str(base_model),), str(words), window=64, cost=False)
    report = evaluate(request, tell=told.append)
    assert report.models[0].metrics["perplexity"].value > 1
    assert len(told) == 1
    assert "cannot be resumed" in told[0]


def test_the_same_command_beside_it_runs_too(tmp_path: Path) -> None:
    told: list[str] = []
    with (
        kept_work(tmp_path, "a", told.append),
        kept_work(tmp_path, "a", told.append) as second,
    ):
        second.add(1, "x")
        assert second.get("x") is None
    assert len(told) == 1
    assert "another run" in told[0]


def test_keeping_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    with kept_work(tmp_path, "a", told.append) as kept:
        monkeypatch.setattr(os, "fsync", full)
        kept.add(1, "x")
        kept.add(2, "y")
    assert len(told) == 1
    assert "cannot be resumed" in told[0]
    assert "No space" in told[0]


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_what_nobody_resumed_goes_after_thirty_days(tmp_path: Path) -> None:
    old, recent = (tmp_path / f"{age}.unfinished.jsonl" for age in ("old", "new"))
    for path, days in ((old, 31), (recent, 29)):
        path.write_text("")
        then = time.time() - days * 24 * 3600
        os.utime(path, (then, then))
    with kept_work(tmp_path, "a", print):
        pass
    assert (old.exists(), recent.exists()) == (False, True)


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_killed_resumes(by: signal.Signals, tiny_llama: Path) -> None:
    line = [
        sys.executable, "-m", "llmquant", "eval", str(tiny_llama), "--no-cost",
        "--text", str(tiny_llama / "heldout.txt"), "--window", "128", "--batch-size", "1",
        "--max-windows", "60", "--dtype", "float32", "--json",
    ]  # fmt: skip
    expected = json.loads(subprocess.run(line, check=True, capture_output=True).stdout)
    process = subprocess.Popen(
        heeding_interrupts(line), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    limit = time.monotonic() + 120
    while not any(p.stat().st_size > 20_000 for p in unfinished()):
        assert process.poll() is None, "it ended before it was stopped"
        assert time.monotonic() < limit
        time.sleep(0.01)
    process.send_signal(by)
    out, err = process.communicate()
    assert (out, process.returncode) == ("", -9 if by == signal.SIGKILL else 130)
    (path,) = unfinished()
    assert by == signal.SIGKILL or f"kept in {path}; the same command resumes" in err
    again = subprocess.run([*line, "--quiet"], check=True, capture_output=True, text=True)
    assert json.loads(again.stdout)["models"] == expected["models"]
    assert not unfinished()
