"""The ``vllm`` engine against the real vLLM (CPU build, ``make vllm-env``): the same clients,
shapes and tokens."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import openai
import pytest
import torch
from langchain_openai import ChatOpenAI
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from serving import NAME, TEXTS, TINY, running

import llmquant
from llmquant.formats.engines import VLLM_NO_AVX512, vllm_here
from llmquant_serve.build import build_engine
from llmquant_serve.engines.options import ModelOptions
from llmquant_serve.generation.text_model import TextModel
from llmquant_serve.service import Limits, Service

pytestmark = pytest.mark.vllm

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("LLMQUANT_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
ARGUMENTS = ("--enforce-eager", "--dtype=float16")
ROUNDING = 0.05  # between engines at float16; see tests/vllm
CHAT = [{"role": "user", "content": "Tell me about the history of the river."}]


@pytest.fixture(scope="module")
def served(packed):
    """What vLLM takes on this CPU: packed weights with AVX-512, else the dense model. The subject
    is what stands around it."""
    return packed if vllm_here() != VLLM_NO_AVX512 else TINY


@pytest.fixture(scope="module")
def live(served):
    if not PYTHON.is_file():
        if os.environ.get("CI"):
            pytest.fail(f"no vLLM environment at {PYTHON}")
        pytest.skip(
            f"no vLLM environment at {PYTHON}: run `make vllm-env` or set LLMQUANT_VLLM_PYTHON"
        )
    options = ModelOptions(
        model=str(served), engine="vllm", vllm_python=str(PYTHON), vllm_args=ARGUMENTS, context=512
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        engine, _ = build_engine(options, 8)
        with running(Service(engine, TextModel(TINY, engine.info.vocab), NAME, Limits())) as server:
            until(lambda: engine.health().ok, 240)
            yield server


def until(holds, seconds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def dense(served):
    return llmquant.load(served, dtype="float32", kernel="dense")


def rows(dense, ids):
    with torch.no_grad():
        return torch.log_softmax(dense(torch.tensor([ids])).logits[0].float(), -1)


def test_the_model_is_packed(record_property):
    """On a CPU where vLLM multiplies packed weights; elsewhere the tests here run with the dense
    model, and say so at the end."""
    if vllm_here() == VLLM_NO_AVX512:
        record_property(
            "not run", "vllm (CPU with AVX-512): llmquant serve --engine vllm with packed weights"
        )
        pytest.skip(
            "vLLM takes no packed weights on this CPU; the tests here run with the dense model"
        )


def test_greedy_tokens_and_logprobs(live, dense, tokenizer):
    """Every token is the best or within rounding of it, and every log-probability is the model's
    within rounding."""
    asked = {"model": NAME, "prompt": TEXTS[0], "max_tokens": 24, "temperature": 0, "logprobs": 3}
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as api:
        whole = api.completions.create(
            **asked, echo=True, extra_body={"return_token_ids": True}
        ).choices[0]
        parts = list(
            api.completions.create(**asked, stream=True, extra_body={"return_token_ids": True})
        )
        ids = tokenizer.encode(TEXTS[0])
        assert whole.prompt_token_ids == ids
        assert [i for p in parts for i in p.choices[0].token_ids] == whole.token_ids
        assert TEXTS[0] + "".join(p.choices[0].text for p in parts) == whole.text
        expected = rows(dense, ids + whole.token_ids)
        for i, (token, logprob) in enumerate(
            zip((ids + whole.token_ids)[1:], whole.logprobs.token_logprobs[1:], strict=True)
        ):
            assert logprob == pytest.approx(float(expected[i, token]), abs=ROUNDING)
            assert i < len(ids) - 1 or float(expected[i].max() - expected[i, token]) <= ROUNDING
        with pytest.raises(openai.BadRequestError) as caught:
            api.completions.create(**(asked | {"max_tokens": 600}))
        assert caught.value.param == "max_tokens"


def test_json_is_enforced(live):
    with openai.OpenAI(
        base_url=f"{live.url}/v1", api_key="none", max_retries=0, _strict_response_validation=True
    ) as api:
        answer = api.chat.completions.create(
            model=NAME, messages=CHAT, max_tokens=20, response_format={"type": "json_object"}
        )
    assert answer.choices[0].message.content.lstrip().startswith("{")


def test_langchain(live):
    chat = ChatOpenAI(
        base_url=f"{live.url}/v1",
        api_key="none",
        model=NAME,
        temperature=0,
        max_tokens=16,
        max_retries=0,
    )
    answer = chat.invoke(CHAT)
    assert answer.content == "".join(part.content for part in chat.stream(CHAT))
    assert answer.usage_metadata["output_tokens"] <= 16


def test_lm_eval(live, dense, tokenizer):
    client = LocalCompletionsAPI(
        base_url=f"{live.url}/v1/completions",
        model=NAME,
        tokenizer=str(TINY),
        tokenizer_backend="huggingface",
        max_length=512,
    )
    request = Instance(
        request_type="loglikelihood", doc={}, arguments=(TEXTS[0], " the river"), idx=0
    )
    [(loglikelihood, _)] = client.loglikelihood([request], disable_tqdm=True)
    before = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    whole = tokenizer.encode(TEXTS[0] + " the river", add_special_tokens=False)
    expected = rows(dense, whole)
    score = sum(float(expected[i - 1, whole[i]]) for i in range(len(before), len(whole)))
    assert loglikelihood == pytest.approx(score, abs=ROUNDING * (len(whole) - len(before)))
    chats = LocalChatCompletion(
        base_url=f"{live.url}/v1/chat/completions", model=NAME, tokenizer_backend=None
    )
    asked = (
        chats.apply_chat_template(CHAT),
        {"until": ["\n\n"], "max_gen_toks": 8, "temperature": 0},
    )
    [text] = chats.generate_until(
        [Instance(request_type="generate_until", doc={}, arguments=asked, idx=0)], disable_tqdm=True
    )
    assert text


def test_a_crash_is_seen_and_the_child_restarted(live):
    engine = live.service.engine
    os.kill(engine._child._process.pid, signal.SIGKILL)
    with live.client as client:
        until(lambda: client.get("/health").status_code == 503, 20)
        refused = client.post("/v1/completions", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_unavailable")
        until(lambda: client.get("/health").status_code == 200, 240)
        assert client.get("/health").json()["restarts"] == 1
        assert (
            client.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).status_code == 200
        )
