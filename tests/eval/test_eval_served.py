"""A running server as a model: the same numbers as from its folder, and clear words where it cannot
give them."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer, serving

from llmquant.errors import LlmquantError, QuantizationError, UsageError
from llmquant_eval.report.schema import Report
from llmquant_eval.report.table import row
from llmquant_eval.report.terminal import render
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.plan import make_plan
from llmquant_eval.run.request import Request

WINDOW = 48


@pytest.mark.parametrize("dialect", ["ids", "echo"])
@pytest.mark.parametrize("protocol", ["ppl/gptq", "ppl/strided", "ppl/word"])
def test_a_served_model_scores_as_its_folder_does(
    dialect: str, protocol: str, tiny_llama: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        (tiny_llama / "heldout.txt").read_text(encoding="utf-8")[:1500], encoding="utf-8"
    )
    with serving(tiny_llama, dialect) as fake:
        served = f"{fake.url}#{fake.name}"
        request = Request(
            (served,),
            str(text),
            reference=str(tiny_llama),
            protocol=protocol,
            window=WINDOW,
            dtype="float32",
            cost=False,
        )
        report = evaluate(request)
    local, remote = report.models
    assert (remote.label, remote.source, remote.scheme) == ("tiny-llama (served)", served, "served")
    assert (remote.weights_sha256, remote.bytes_on_disk, remote.parameters) == (None, None, None)
    assert remote.tokenizer_sha256 == local.tokenizer_sha256
    for name, metric in local.metrics.items():
        assert remote.metrics[name].value == pytest.approx(metric.value, rel=2e-5)
        assert remote.metrics[name].tokens == metric.tokens
    ratio = next(m.value for name, m in remote.metrics.items() if name.endswith("ratio"))
    assert ratio == pytest.approx(1.0, abs=2e-5)
    assert not any(name.startswith("kl") for name in remote.metrics)
    assert not [name for name in report.protocols if name.startswith("kl")]
    assert report.noise_floor is None  # there is no KL to read by it
    assert Report.from_json(report.to_json()) == report
    assert row(remote)[4] == ("–", "")  # no bytes
    assert render(report, 120)


def test_the_dialect_is_settled_once(base_model: Path, words: Path) -> None:
    with serving(base_model, "echo") as fake:
        request = Request((fake.url,), str(words), tokenizer=str(base_model), window=64, cost=False)
        report = evaluate(request)
    assert report.models[0].source == fake.url  # one model: its name need not be given
    assert ["prompt_logprobs" in body for body in fake.requests] == [True] + [False] * 10
    assert all(len(body["prompt"]) == 64 and body["max_tokens"] == 1 for body in fake.requests)


@pytest.mark.filterwarnings("ignore")  # lm-eval's own
def test_tasks_over_a_server_equal_those_over_the_folder(tiny_llama: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    data = Path(__file__).parent / "data"
    tasks = f"arc_easy_local={data / 'arc.jsonl'},lambada_local={data / 'lambada.jsonl'}"
    with serving(tiny_llama) as fake:
        request = Request(
            (fake.url,), reference=str(tiny_llama), tasks=tasks, dtype="float32", cost=False
        )
        local, remote = evaluate(request).models
    assert fake.requests
    for mine, theirs in zip(local.tasks, remote.tasks, strict=True):
        assert theirs.items_sha256 == mine.items_sha256
        for name, metric in mine.metrics.items():
            assert theirs.metrics[name].correct == metric.correct
            assert theirs.metrics[name].value == pytest.approx(metric.value, rel=1e-4)
    assert {p.lost + p.gained for t in remote.tasks for p in t.paired.values()} == {0}


@pytest.mark.filterwarnings("ignore")
def test_rolling_likelihoods_and_generation_over_a_server(tiny_llama: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")
    from lm_eval.api.instance import Instance
    from transformers import AutoTokenizer

    import llmquant
    from llmquant_eval.models.endpoint import Endpoint
    from llmquant_eval.tasks.harness_models import LocalModel, ServedLM

    text = (tiny_llama / "heldout.txt").read_text(encoding="utf-8")[:400]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    local = LocalModel(llmquant.load(tiny_llama, dtype="float32"), tokenizer, batch_size=1)
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0)]
    options = {"until": ["."], "max_gen_toks": 12, "do_sample": False}
    writing = [Instance("generate_until", {}, ("The river", options), 0)]
    with serving(tiny_llama, context=2048) as fake:
        served = ServedLM(Endpoint(fake.url), tokenizer)
        assert served.loglikelihood_rolling(rolling) == pytest.approx(
            local.loglikelihood_rolling(rolling), rel=1e-5
        )
        assert served.generate_until(writing) == local.generate_until(writing)


def spoil_logprob(value: float) -> Any:
    def change(answer: dict[str, Any]) -> dict[str, Any]:
        entries = answer["choices"][0]["prompt_logprobs"]
        for entry in entries[5].values():
            entry["logprob"] = value
        return answer

    return change


def drop_token(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["prompt_logprobs"][5] = {"-1": {"logprob": -1.0, "rank": 1}}
    return answer


def shorten(answer: dict[str, Any]) -> dict[str, Any]:
    answer["choices"][0]["prompt_logprobs"].pop()
    return answer


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        pytest.param(
            spoil_logprob(-9999.0),
            QuantizationError,
            "infinite loss at 1 of 63 tokens of window 0",
            id="-inf",
        ),
        pytest.param(
            drop_token, LlmquantError, "lack its token .* at position 5", id="another token"
        ),
        pytest.param(
            shorten, LlmquantError, "scored 63 tokens of a prompt of 64", id="another length"
        ),
        pytest.param(lambda a: {"choices": []}, LlmquantError, "without choices", id="no choices"),
        pytest.param(lambda a: [], LlmquantError, "not an object", id="no object"),
    ],
)
def test_answers_that_cannot_be_right(
    spoil: Any, error: type[LlmquantError], message: str, base_model: Path, words: Path
) -> None:
    with serving(base_model) as fake:
        fake.spoil = spoil
        with pytest.raises(error, match=message):
            evaluate(
                Request((fake.url,), str(words), tokenizer=str(base_model), window=64, cost=False)
            )


def test_a_server_without_prompt_logprobs_is_refused(base_model: Path, words: Path) -> None:
    request = {"text": str(words), "tokenizer": str(base_model), "window": 64, "cost": False}
    with (
        serving(base_model, "none") as fake,
        pytest.raises(LlmquantError, match="does not give log-probabilities of a"),
    ):
        evaluate(Request((fake.url,), **request))


@pytest.mark.parametrize(
    ("suffix", "options", "message"),
    [
        ("#other", {}, "no model 'other'; it serves: base"),
        ("", {"tokenizer": None}, "give the folder of its model with --tokenizer"),
        ("", {"window": 99}, "longer than the 98 that base .served. takes"),
        ("", {"reference": "{url}", "candidates": ("{base}",)}, "name a folder as the reference"),
        ("", {"candidates": ("{url}", "{url}#base")}, "given twice"),
        ("", {"candidates": ("{base}",)}, "--tokenizer .* is for served models"),
    ],
    ids=["unknown model", "no tokenizer", "context", "reference", "twice", "tokenizer of a folder"],
)
def test_misuse(
    suffix: str, options: dict[str, Any], message: str, base_model: Path, words: Path
) -> None:
    with serving(base_model, context=100) as fake:
        names = {"url": fake.url, "base": str(base_model)}
        fields: dict[str, Any] = {
            "candidates": (fake.url + suffix,),
            "tokenizer": str(base_model),
            "window": 64,
        } | options
        fields["candidates"] = tuple(c.format(**names) for c in fields["candidates"])
        if "reference" in fields:
            fields["reference"] = fields["reference"].format(**names)
        with pytest.raises(UsageError, match=message):
            make_plan(Request(text=str(words), **fields))


@pytest.mark.parametrize("url", ["http://", "http:///v1"])
def test_what_is_no_address(url: str, words: Path) -> None:
    with pytest.raises(UsageError, match="not a server's address"):
        make_plan(Request((url,), str(words)))


def test_a_server_that_is_not_there(words: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(LlmquantError, match=r"cannot be reached: .*is the server running"):
        make_plan(Request((f"http://127.0.0.1:{port}/v1",), str(words), retry_for=0.0))


def test_what_lists_no_models(
    base_model: Path, words: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(base_model) as fake:
        monkeypatch.setattr(FakeServer, "models", lambda self: {"object": "list"})
        with pytest.raises(LlmquantError, match="does not list models"):
            make_plan(Request((fake.url,), str(words)))


def test_a_key_goes_with_every_request(base_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import urllib.request

    from llmquant_eval.models.endpoint import Endpoint

    seen: list[str | None] = []
    original = urllib.request.urlopen

    def watch(request: urllib.request.Request, **options: Any) -> Any:
        seen.append(request.get_header("Authorization"))
        return original(request, **options)

    monkeypatch.setattr(urllib.request, "urlopen", watch)
    monkeypatch.setenv("OPENAI_API_KEY", "abc")
    with serving(base_model) as fake:
        scores = Endpoint(fake.url).score([3, 4, 5])
    assert seen == ["Bearer abc"] * 2
    assert len(scores.logprobs) == len(scores.greedy) == 2
    assert all(math.isfinite(value) for value in scores.logprobs)
