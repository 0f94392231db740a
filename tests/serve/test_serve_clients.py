"""Programs written for OpenAI's API, unchanged: LangChain, lm-eval's two clients, and schemathesis
over our own OpenAPI."""

from __future__ import annotations

import math

import pytest
import schemathesis
import torch
from hypothesis import Phase, given, settings
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import response_schema_conformance, status_code_conformance
from serving import NAME, TEXTS, TINY, greedy

from llmquant_serve.generation.detokenize import decode

TURNS = [SystemMessage("Be brief."), HumanMessage("Tell me about the history of the river.")]


@pytest.fixture(scope="module")
def chat(server):
    return ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        model=NAME,
        temperature=0,
        max_tokens=24,
        max_retries=0,
    )


def test_langchain(chat, model, tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": TURNS[1].content},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    expected = decode(tokenizer, greedy(model, ids, 24))
    answer = chat.invoke(TURNS)
    assert answer.content == expected
    assert answer.usage_metadata["input_tokens"] == len(ids)
    assert "".join(part.content for part in chat.stream(TURNS)) == expected
    again = chat.bind(logprobs=True, top_logprobs=2).invoke(
        [*TURNS, AIMessage(expected), HumanMessage("And then?")]
    )
    assert (
        len(again.response_metadata["logprobs"]["content"]) == again.usage_metadata["output_tokens"]
    )
    assert all(a.content for a in chat.batch([TURNS, TURNS[1:]]))


def instances(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)
    ]


def test_lm_eval_completions(server, model, tokenizer):
    client = LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=NAME,
        tokenizer=str(TINY),
        tokenizer_backend="huggingface",
        num_concurrent=1,
        max_length=512,
        batch_size=2,
    )
    pairs = [(TEXTS[0], " the river"), (TEXTS[3], " 1983"), (TEXTS[4], " London, England")]
    answers = client.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (loglikelihood, is_greedy) in zip(pairs, answers, strict=True):
        before, after = tokenizer.encode(context, add_special_tokens=False), None
        whole = tokenizer.encode(context + continuation, add_special_tokens=False)
        after = whole[len(before) :]
        with torch.inference_mode():
            rows = torch.log_softmax(model(torch.tensor([whole])).logits[0].float(), -1)[
                len(before) - 1 : -1
            ]
        assert loglikelihood == pytest.approx(
            sum(float(r[t]) for r, t in zip(rows, after, strict=True)), abs=1e-3
        )
        assert is_greedy == all(int(r.argmax()) == t for r, t in zip(rows, after, strict=True))
    asked = [(TEXTS[0], {"until": [".", "\n"], "max_gen_toks": 16, "temperature": 0})]
    [text] = client.generate_until(instances("generate_until", asked), disable_tqdm=True)
    ids = tokenizer.encode(TEXTS[0], add_special_tokens=False)
    assert text == decode(tokenizer, greedy(model, ids, 16)).split(".")[0].split("\n")[0]


def test_lm_eval_chat(server):
    client = LocalChatCompletion(
        base_url=f"{server.url}/v1/chat/completions",
        model=NAME,
        num_concurrent=1,
        tokenizer_backend=None,
    )
    turns = client.apply_chat_template([{"role": "user", "content": "Tell me about the river."}])
    asked = [(turns, {"until": ["\n\n"], "max_gen_toks": 12, "temperature": 0})]
    [text] = client.generate_until(instances("generate_until", asked), disable_tqdm=True)
    assert text
    assert not math.isnan(len(text))


CHECKS = [not_a_server_error, status_code_conformance, response_schema_conformance]
PATHS = [
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/v1/models/{model}",
    "/tokenize",
    "/detokenize",
    "/health",
    "/metrics",
    "/drift",
]


@pytest.fixture(scope="module")
def operations(server):
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return {result.ok().path: result.ok() for result in schema.get_all_operations()}


def test_every_path_is_tried(operations):
    assert sorted(operations) == sorted(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_whatever_the_schema_allows_gets_an_answer_of_the_schema(operations, path):
    """No 5xx, no status and no shape that the schema does not announce."""

    @settings(
        max_examples=30, deadline=None, derandomize=True, database=None, phases=[Phase.generate]
    )
    @given(case=operations[path].as_strategy())
    def check(case):
        if isinstance(case.body, dict):
            case.body |= (
                {"max_tokens": 2} if "completions" in path else {}
            )  # answers of a few tokens suffice
            case.body.pop("max_completion_tokens", None)
        case.validate_response(case.call(), checks=CHECKS)

    check()
