"""``--profile``: what answers are like, observed while they are generated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from children import Run
from validate_kit import example, write_rows

import llmquant
from llmquant_eval.models.resolve import ModelFolder
from llmquant_eval.validate.answers import Task
from llmquant_eval.validate.engines.engine import Generation
from llmquant_eval.validate.engines.local import LocalEngine
from llmquant_eval.validate.engines.observing import Observer

FLAGS = ("--max-tokens", "6", "--dtype", "float32")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    words = ["the", "river", "runs", "through", "a", "town", "where", "people", "build", "boats"]
    return write_rows(
        tmp_path / "many.jsonl",
        *({"id": str(i), "prompt": " ".join(words[i % 5 : i % 7 + 6])} for i in range(44)),
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7], ids=["greedy", "drawn"])
def test_what_is_observed_is_what_the_model_says_of_its_answer(
    model: Path, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[tuple[list[int], list[int]]] = []
    observed = Observer.observed

    def spy(self: Observer, prompts: Any, news: Any, answers: Any) -> Any:
        generated.extend(zip(prompts, news, strict=True))
        return observed(self, prompts, news, answers)

    monkeypatch.setattr(Observer, "observed", spy)
    generation = Generation(max_tokens=9, temperature=temperature, raw=True)
    folder = ModelFolder(str(model), model, "small")
    engine = LocalEngine(folder, generation, ("float32", "cpu", "auto"), 2, observing=True)
    texts = ("The river", "A castle on the hill was built by")
    ((_, measured),) = engine.measure([[Task(example(prompt=t), True, ()) for t in texts]])
    twin = llmquant.load(model, dtype="float32")
    for (prompt, new), found in zip(generated, measured, strict=True):
        assert found.answer is not None
        seen, said = found.answer.observed, new[: found.answer.tokens]
        assert seen is not None
        with torch.inference_mode():
            logits = twin(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
        log_p = logits.double().log_softmax(-1)
        own, entropy = log_p.gather(1, torch.tensor(said)[:, None]), -(log_p.exp() * log_p).sum(-1)
        assert (seen.prompt_length, seen.answer_length) == (len(prompt), len(said))
        assert seen.logprob == pytest.approx(float(own.mean()), abs=1e-3)
        assert seen.entropy == pytest.approx(float(entropy.mean()), abs=1e-3)


def test_the_profile_is_written_beside_the_results(run: Run, model: Path, prompts: Path) -> None:
    command = ("validate", model, "--data", prompts, "--raw", *FLAGS)
    assert run(*command, "-o", "plain.json").code == 0
    assert run(*command, "-o", "seen.json", "--profile", "profile.json").code == 0
    profile = llmquant.load_drift_profile(Path("profile.json"))
    assert profile.requests == 44
    assert profile.tokenizer_sha256 == llmquant.tokenizer_fingerprint(
        llmquant.load_tokenizer(model)
    )
    assert {"logprob", "entropy", "ended"} <= profile.statistics.keys()
    assert Path("plain.json").read_text() == Path("seen.json").read_text()
    assert "river" not in Path("profile.json").read_text()
    again = run(*command, "-o", "again.json", "--profile", "profile.json")
    assert (again.code, "--profile profile.json is there already" in again.said) == (2, True)


def test_a_profile_of_few_prompts_is_refused_before_any_work(
    run: Run, model: Path, data: Path
) -> None:
    done = run("validate", model, "--data", data, "-o", "a.json", "--profile", "p.json")
    assert (done.code, done.out) == (2, "")
    assert "--profile needs 40 prompts or more" in done.said
