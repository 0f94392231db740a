"""``eval`` of a server that is busy, restarts, dies or comes late: asked again, resumed, and what
is missing is said."""

from __future__ import annotations

import json
import random
import shutil
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import fake_server
import pytest
import torch
import yaml
from eval_kit import Ran, llmquant_command
from fake_server import Fault, cut, cut_without_length, hang_up, serving, status
from safetensors.torch import load_file, save_file
from tiny_models import EXAMPLE

from llmquant_eval.models import retrying
from llmquant_eval.models.kept_answers import KeptAnswers, Prompt

BASE = Path(__file__).parents[1] / "golden" / "base"
WINDOWS, GOOD = 12, 4


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Short waits, and a user's cache of this test alone."""
    monkeypatch.setattr(retrying, "_FIRST_WAIT", 0.01)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retries") / "words.txt"
    draw = random.Random(0)
    text = " ".join(f"w{draw.randrange(3, 64)}" for _ in range(32 * WINDOWS))
    path.write_text(text, encoding="utf-8")
    return path


def evaluate(source: str, words: Path, *options: object) -> Ran:
    window = () if "--protocol" in options else ("--window", 32)
    return llmquant_command(
        "eval", source, "--text", words, "--tokenizer", BASE, *window, "--no-cost", *options
    )


def perplexity(path: Path) -> float:
    return float(json.loads(path.read_text())["models"][0]["metrics"]["perplexity"]["value"])


@pytest.fixture(scope="module")
def truth(words: Path, tmp_path_factory: pytest.TempPathFactory) -> float:
    """The perplexity by a server that always answers."""
    output = tmp_path_factory.mktemp("truth") / "report.json"
    with serving(BASE) as fake:
        assert evaluate(fake.url, words, "--output", output, "--cache", output.parent).code == 0
    return perplexity(output)


def kept(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.jsonl"))


FAULTS: dict[str, Fault] = {
    "429": status(429),
    "429 with seconds": status(429, retry_after="0"),
    "429 with words": status(429, retry_after="soon"),
    "502": status(502),
    "503 with a date": status(503, retry_after=format_datetime(datetime.now(UTC), usegmt=True)),
    "504": status(504),
    "hangs up": hang_up,
    "a cut answer": cut,
    "a cut answer without a length": cut_without_length,
}


@pytest.mark.parametrize(
    ("name", "good"), [("429", 0), ("hangs up", 0), *((name, GOOD) for name in FAULTS)]
)
def test_a_fault_that_passes_changes_nothing(
    name: str, good: int, words: Path, truth: float, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    with serving(BASE) as fake:
        fake.faults, fake.good = [FAULTS[name]] * 3, good
        ran = evaluate(fake.url, words, "--output", output)
    assert ran.code == 0, ran.err
    assert perplexity(output) == truth
    assert "asking again" in ran.err
    assert json.loads(output.read_text())["missing"] == []
    assert not kept(tmp_path)  # what a finished run needs no longer


def busy(code: int, form: str) -> Fault:
    """Asks to come back in one to two seconds."""

    def answer(handler: Any) -> None:
        when = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        status(code, retry_after="1" if form == "seconds" else when)(handler)

    return answer


@pytest.mark.parametrize(("code", "form"), [(429, "seconds"), (503, "date")])
def test_retry_after_is_heeded(code: int, form: str, words: Path) -> None:
    with serving(BASE) as fake:
        fake.faults = [busy(code, form)]
        ran = evaluate(fake.url, words, "--max-windows", 1)
    assert ran.code == 0
    first, second = fake.asked
    assert 0.9 <= second - first < 5


def test_too_long_a_wait_is_not_waited(words: Path) -> None:
    started = time.monotonic()
    with serving(BASE) as fake:
        fake.faults = [status(429, retry_after="3600")]
        ran = evaluate(fake.url, words)
    assert ran.code == 1
    assert "come back in 3,600 s" in ran.err
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("code", [400, 401, 404, 500])
def test_an_answer_is_not_asked_for_again(code: int, words: Path) -> None:
    with serving(BASE) as fake:
        fake.faults, fake.dies = [status(code)], True
        ran = evaluate(fake.url, words)
    assert ran.code == 1
    assert f"answered {code}: " in ran.err
    assert len(fake.asked) <= 3  # the dialects


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_server_that_comes_late(port: int, words: Path, truth: float, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    done = threading.Event()

    def come() -> None:
        time.sleep(0.3)
        with serving(BASE, port=port):
            done.wait(60)

    thread = threading.Thread(target=come)
    thread.start()
    try:
        ran = evaluate(f"http://127.0.0.1:{port}/v1", words, "--output", output)
    finally:
        done.set()
        thread.join()
    assert ran.code == 0, ran.err
    assert perplexity(output) == truth


@pytest.mark.parametrize("death", ["hangs up", "429"])
def test_a_server_that_dies_is_resumed(
    death: str, port: int, words: Path, truth: float, tmp_path: Path
) -> None:
    output = tmp_path / "report.json"
    with serving(BASE, port=port) as fake:
        fake.faults, fake.good, fake.dies = [FAULTS[death]], GOOD, True
        ran = evaluate(fake.url, words, "--output", output, "--retry-for", 0.2)
    assert ran.code == 1
    assert f"base (served): {WINDOWS - GOOD} of {WINDOWS} windows of ppl/gptq-32" in ran.err
    assert "run the same command again to resume" in ran.err
    assert "Traceback" not in ran.err
    (gap,) = json.loads(output.read_text())["missing"]
    assert (gap["windows"], gap["windows_wanted"]) == (WINDOWS - GOOD, WINDOWS)
    assert json.loads(output.read_text())["models"][0]["metrics"] == {}  # no figure of a part
    assert "NOT MEASURED" in ran.out

    with serving(BASE, port=port) as fake:
        ran = evaluate(fake.url, words, "--output", output, "--retry-for", 0.2)
    assert ran.code == 0, ran.err
    assert len(fake.requests) == WINDOWS - GOOD + 1  # one kept answer is asked again
    assert perplexity(output) == truth
    assert not kept(tmp_path)


def eighth_bits(t: torch.Tensor) -> torch.Tensor:
    """Rounded to 8 bits with a scale for each row, as far as it is a matrix."""
    scale = t.abs().amax(-1, keepdim=True) / 127
    return (t / scale).round() * scale if t.ndim == 2 else t


CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "coarse weights": lambda t: (t * 16).round() / 16,
    "8-bit weights": eighth_bits,
}


def changed(folder: Path, change: str) -> Path:
    """The base model with other weights under the same name."""
    folder = folder / "other" / BASE.name
    shutil.copytree(BASE, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: CHANGES[change](t.float()).to(t.dtype) for name, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def break_off(folder: Path, port: int, words: Path, *options: object) -> Ran:
    """A run whose server dies after ``GOOD`` prompts."""
    with serving(folder, port=port) as fake:
        fake.faults, fake.good, fake.dies = [hang_up], GOOD, True
        ran = evaluate(fake.url, words, "--retry-for", 0.2, *options)
    assert ran.code == 1
    return ran


@pytest.mark.parametrize("change", CHANGES)
def test_answers_of_another_model_are_not_mixed_in(
    change: str, port: int, words: Path, truth: float, tmp_path: Path
) -> None:
    output, other = tmp_path / "report.json", changed(tmp_path, change)
    with serving(other) as fake:
        assert evaluate(fake.url, words, "--output", output).code == 0
    wanted = perplexity(output)
    break_off(BASE, port, words)
    with serving(other, port=port) as fake:
        ran = evaluate(fake.url, words, "--output", output)
    assert ran.code == 0
    assert "answers otherwise than in an earlier run" in ran.err
    assert len(fake.requests) == WINDOWS + 1  # one kept answer is asked again
    assert perplexity(output) == wanted != truth


def test_answers_of_another_model_are_not_kept_beside(
    port: int, words: Path, truth: float, tmp_path: Path
) -> None:
    """Two runs of two models that ask other prompts, then one that asks both."""
    output, other = tmp_path / "report.json", changed(tmp_path, "8-bit weights")
    break_off(other, port, words)
    again = break_off(BASE, port, words, "--protocol", "ppl/strided-24")
    assert "answers otherwise than in an earlier run" in again.err
    with serving(BASE, port=port) as fake:
        protocols = ("--protocol", "ppl/strided-24,ppl/gptq-32", "--output", output)
        ran = evaluate(fake.url, words, *protocols)
    assert ran.code == 0, ran.err
    assert "resumes" in ran.err
    metrics = json.loads(output.read_text())["models"][0]["metrics"]
    assert metrics["perplexity@ppl/gptq-32"]["value"] == truth


def test_a_server_with_less_context_starts_over(
    port: int, words: Path, truth: float, tmp_path: Path
) -> None:
    break_off(BASE, port, words, "--protocol", "ppl/gptq-48")
    output = tmp_path / "report.json"
    with serving(BASE, port=port, context=40) as fake:
        ran = evaluate(fake.url, words, "--output", output)
    assert ran.code == 0, ran.err
    assert "answers otherwise than in an earlier run" in ran.err
    assert perplexity(output) == truth


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_after_a_lost_connection_is_an_error(
    change: str, words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = KeptAnswers.add

    def slowly(self: KeptAnswers, prompt: Prompt, answer: Any) -> None:
        time.sleep(0.05)  # while other requests find out
        plain(self, prompt, answer)

    monkeypatch.setattr(KeptAnswers, "add", slowly)
    with serving(BASE) as fake:
        other = fake_server.FakeServer(changed(tmp_path, change), "ids", None)

        def restart(handler: Any) -> None:
            fake.model = other.model
            hang_up(handler)

        fake.faults, fake.good = [restart], GOOD
        ran = evaluate(fake.url, words)
    assert ran.code == 1
    assert "came back with another model" in ran.err
    assert not kept(tmp_path)


def test_what_the_others_scored_is_not_lost(words: Path, tmp_path: Path) -> None:
    output = tmp_path / "report.json"
    with serving(BASE) as fake:
        fake.faults, fake.good, fake.dies = [status(503)], WINDOWS + 3, True
        ran = llmquant_command(
            "eval", fake.url, "--reference", BASE, "--text", words, "--protocol",
            "ppl/gptq-32,ppl/strided-32", "--no-cost", "--output", output, "--retry-for", 0.2,
        )  # fmt: skip
    assert ran.code == 1
    report = json.loads(output.read_text())
    local, remote = (set(m["metrics"]) for m in report["models"])
    assert remote == {"perplexity", "perplexity_ratio"}
    assert local == {"perplexity", "perplexity@ppl/strided-32-16"}
    assert [m["protocol"] for m in report["missing"]] == ["ppl/strided-32-16"]
    shown = llmquant_command("leaderboard", tmp_path)
    assert shown.code == 0, shown.err


def test_a_suite_says_that_it_waits(words: Path, tmp_path: Path) -> None:
    suite = tmp_path / "suite.yaml"
    with serving(BASE) as fake:
        fake.faults = [status(429)]
        keys = {
            "reference": str(BASE),
            "models": [{"label": "served", "model": fake.url}],
            "texts": [{"name": "words", "source": str(words)}],
            "protocols": ["ppl/gptq-32"],
            "cost": False,
        }
        suite.write_text(yaml.safe_dump(keys), encoding="utf-8")
        ran = llmquant_command("eval", "--suite", suite)
    assert ran.code == 0, ran.err
    assert "answered 429" in ran.err
    assert "asking again" in ran.err


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_tasks_resume_too(port: int, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    tasks = Path(__file__).parents[1] / "eval" / "data" / "lambada.jsonl"
    command = (
        "eval", f"http://127.0.0.1:{port}/v1", "--tokenizer", EXAMPLE, "--retry-for", 0.2,
        "--tasks", f"lambada_local={tasks}", "--output", tmp_path / "report.json",
    )  # fmt: skip
    with serving(EXAMPLE, port=port) as fake:
        fake.faults, fake.good, fake.dies = [hang_up], 3, True
        ran = llmquant_command(*command)
    assert ran.code == 1
    assert "not measured: tiny-llama (served): tasks" in ran.err
    with serving(EXAMPLE, port=port) as fake:
        resumed = llmquant_command(*command)
        again = len(fake.requests)
    assert resumed.code == 0, resumed.err
    assert again == len(tasks.read_text().splitlines()) - 3 + 1


@pytest.mark.parametrize(
    ("options", "words_of_it"),
    [
        pytest.param(["--retry-for", "-1"], "--retry-for -1.0 is no time", id="negative"),
        pytest.param(["--retry-for", "nan"], "is no time", id="not a number"),
        pytest.param(["--retry-for", "x"], "--retry-for", id="a word"),
    ],
)
def test_misuse(options: list[str], words_of_it: str, words: Path) -> None:
    ran = evaluate("http://127.0.0.1:9/v1", words, *options)
    assert ran.code == 2
    assert words_of_it in ran.said


def test_a_folder_is_not_retried(words: Path) -> None:
    ran = llmquant_command("eval", BASE, "--text", words, "--retry-for", 3)
    assert (ran.code, "--retry-for is for served models" in ran.said) == (2, True)


def test_a_server_that_is_not_there_says_so_soon(port: int, words: Path) -> None:
    ran = evaluate(f"http://127.0.0.1:{port}/v1", words, "--retry-for", 0)
    assert ran.code == 1
    assert "cannot be reached: " in ran.err
    assert "is the server running?" in ran.err
