"""What each metric says of an answer, as tables."""

from __future__ import annotations

import json
from typing import Any

import pytest
from validate_kit import example, said

from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.validate.metrics.registry import METRICS, chosen, continuations

BY_NAME = {metric.name: metric for metric in METRICS}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": CITY}}]
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
RIGHT_CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
ON = {"name": "lamp", "arguments": {"on": 1}}
WRONG_CALL = '{"name": "weather", "arguments": {"town": "Oslo"}}'
SERVED = ({"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},)
CUT = ({"type": "function", "function": {"name": "weather", "arguments": '{"city": "Os'}},)


def score(name: str, row: dict[str, Any], text: str, **more: Any) -> float | None:
    metric, of = BY_NAME[name], example(**row)
    assert metric.applies(of)
    return metric.score(of, said(text, **more))


@pytest.mark.parametrize(
    ("name", "row", "text", "expected"),
    [
        ("exact_match", {"answer": "Paris"}, " Paris\n", 1),
        ("exact_match", {"answer": "Paris"}, "paris", 0),
        ("exact_match", {"answer": "Paris"}, "Paris.", 0),
        ("exact_match", {"answers": ["Rome", "Paris"]}, "Paris", 1),
        ("exact_match", {"answer": 56}, "56", 1),
        ("exact_match", {"answer": {"a": 1, "b": 2}}, '```json\n{"b": 2, "a": 1}\n```', 1),
        ("exact_match", {"answer": {"a": 1}}, '{"a": 2}', 0),
        ("exact_match", {"answer": "Café"}, "Cafe\u0301", 1),
        ("exact_match", {"answer": "yes"}, "<think>no?</think>\n yes", 1),
        ("exact_match", {"answer": "yes"}, "<think>yes", 0),
        ("contains_answer", {"answer": "paris"}, "It is Paris.", 1),
        ("contains_answer", {"answer": "5"}, "It is 56.", 0),
        ("contains_answer", {"answer": "a+b"}, "so a+b holds", 1),
        ("regex", {"regex": r"\d+"}, "it is 7", 1),
        ("regex", {"regex": [r"\d", "x"]}, "it is 7", 0),
        ("json_valid", {"schema": CITY}, '{"town": 1}', 1),
        ("json_valid", {"schema": CITY}, '```json\n{"town": 1}\n```', 1),
        ("json_valid", {"schema": CITY}, 'Here: {"town": 1}', 0),
        ("json_valid", {"schema": CITY}, '{"a": NaN}', 0),
        ("json_valid", {"answer": {"a": 1}}, "{", 0),
        ("schema_valid", {"schema": CITY}, '{"city": "Oslo"}', 1),
        ("schema_valid", {"schema": CITY}, '{"city": 5}', 0),
        ("schema_valid", {"schema": CITY}, "null", 0),
        ("tool_call", {"tool_call": CALL}, f"<tool_call>\n{RIGHT_CALL}\n</tool_call>", 1),
        ("tool_call", {"tool_call": CALL}, RIGHT_CALL.replace("arguments", "parameters"), 1),
        ("tool_call", {"tool_call": CALL}, f"[TOOL_CALLS][{RIGHT_CALL}]", 1),
        ("tool_call", {"tool_call": CALL}, f"<tool_call>{WRONG_CALL}</tool_call>", 0),
        ("tool_call", {"tool_call": CALL}, "It is sunny.", 0),
        ("tool_call", {"tool_call": ON | {"arguments": {"on": True}}}, json.dumps(ON), 0),
        ("tool_call", {"tool_call": ON}, json.dumps(ON), 1),
        ("exact_match", {"answer": {"ok": [True]}}, '{"ok": [true]}', 1),
        ("exact_match", {"answer": {"ok": [True]}}, '{"ok": [1]}', 0),
        ("exact_match", {"answer": {"ok": [1]}}, '{"ok": [1.0]}', 1),
        ("tool_call", {"tool_call": CALL}, f"[{RIGHT_CALL}, {RIGHT_CALL}]", 0),
        ("tool_call_valid", {"tools": TOOLS}, f"<tool_call>{RIGHT_CALL}</tool_call>", 1),
        ("tool_call_valid", {"tools": TOOLS}, f"<tool_call>{WRONG_CALL}</tool_call>", 0),
        ("tool_call_valid", {"tools": TOOLS}, '<tool_call>{"name": "wea', 0),
        ("tool_call_valid", {"tools": TOOLS}, RIGHT_CALL.replace("weather", "wether"), 0),
        ("tool_call_valid", {"tools": TOOLS}, "It is sunny.", 1),
        ("tool_call_valid", {"tools": TOOLS, "tool_call": CALL}, "It is sunny.", 0),
        ("tool_call_valid", {"tools": TOOLS}, '{"answer": 5}', 1),
        ("repetition", {}, "a b c d e f", 0),
        ("repetition", {}, "a b c d a b c d", 0.2),
        ("repetition", {}, "", 0),
        ("loop", {}, "One. " + "The answer is 54. " * 4, 1),
        ("loop", {}, "One. " + "The answer is 54. " * 3, 0),
        ("loop", {}, "The answer is 54. " * 4 + "Done.", 0),
        ("loop", {}, "no " * 15 + "yes", 0),
        ("loop", {}, "no " * 16, 1),
        ("loop", {}, "是" * 20, 1),
        ("loop", {}, "=" * 200, 1),
        ("loop", {}, "你好吗我很好" * 4, 1),
        ("refusal", {}, "I'm sorry, but I can't help with that.", 1),
        ("refusal", {}, "I cannot assist with this request.", 1),
        ("refusal", {}, "As an AI language model, I am not able to do this.", 1),
        ("refusal", {}, "Lo siento, no puedo ayudar.", 1),
        ("refusal", {}, "抱歉，我无法回答。", 1),
        ("refusal", {}, "Sure! You can't go wrong with butter.", 0),
        ("refusal", {}, "I can help with that.", 0),
        ("refusal", {}, "I don't think so.", 0),
        ("refused", {"refuse": True}, "I can't help with that.", 1),
        ("refused", {"refuse": True}, "Sure.", 0),
    ],
)
def test_scores(name: str, row: dict[str, Any], text: str, expected: float) -> None:
    assert score(name, row, text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "text", "more", "expected"),
    [
        pytest.param("end_of_turn", "hi", {}, 1, id="ended"),
        pytest.param("end_of_turn", "hi", {"ended": False}, 0, id="cut off"),
        pytest.param("think_closed", "hi", {}, 1, id="did not think"),
        pytest.param("think_closed", "<think>so</think>hi", {}, 1, id="closed"),
        pytest.param("think_closed", "<think>so", {}, 0, id="not closed"),
        pytest.param("think_closed", "so", {"opened": True}, 0, id="opened by the prompt"),
        pytest.param("think_closed", "so</think>", {"opened": True}, 1, id="closed for the prompt"),
        pytest.param("think_closed", "", {"thoughts": "so"}, 0, id="a server's, no answer"),
        pytest.param("think_closed", "hi", {"thoughts": "so"}, 1, id="a server's, answered"),
        pytest.param("answer_tokens", "hi", {"tokens": 7}, 7, id="tokens"),
        pytest.param("answer_tokens", "hi", {"tokens": None}, None, id="tokens are not known"),
        pytest.param("tool_call", "", {"calls": SERVED}, 1, id="a server's call"),
        pytest.param("tool_call", "", {"calls": CUT}, 0, id="a server's cut call"),
        pytest.param("tool_call_valid", "", {"calls": CUT}, 0, id="a cut call is not valid"),
        pytest.param(
            "tool_call", "", {"marked": f"<|python_tag|>{RIGHT_CALL}"}, 1, id="a special mark"
        ),
    ],
)
def test_scores_of_what_is_beside_the_text(
    name: str, text: str, more: dict[str, Any], expected: float | None
) -> None:
    assert score(name, {"tools": TOOLS, "tool_call": CALL}, text, **more) == expected


@pytest.mark.parametrize(
    ("scored", "right"),
    [
        pytest.param(((-4.0, 1), (-4.1, 1), (-9.0, 1)), "red", id="the likeliest"),
        pytest.param(((-4.0, 1), (-3.9, 1), (-9.0, 1)), "tan", id="another"),
        pytest.param(((-4.0, 1), (-4.1, 1), (-5.0, 3)), "yellow", id="per byte"),
    ],
)
def test_choices_are_compared_per_byte(scored: tuple[tuple[float, int], ...], right: str) -> None:
    choices = ["red", "tan", "yellow"]
    for answer in choices:
        row = {"choices": choices, "answer": answer}
        assert score("choice_accuracy", row, "", scored=scored) == float(answer == right)


def test_the_likeliest_of_several_answers_counts_per_token() -> None:
    row = {"answers": ["a", "b"]}
    assert score("answer_logprob", row, "", scored=((-6.0, 3), (-3.0, 1))) == -2.0


def test_what_an_example_gets_is_told_by_the_data_alone() -> None:
    rows = {
        "probes": {},
        "answer": {"answer": "x"},
        "choice": {"choices": ["x", "y"], "answer": 0},
        "refuse": {"refuse": True},
    }
    got = {k: {m.name for m in METRICS if m.applies(example(**row))} for k, row in rows.items()}
    probes = got["probes"]
    assert probes == {m for m in BY_NAME if m in probes}
    assert got["answer"] - probes == {"exact_match", "contains_answer", "answer_logprob"}
    assert got["choice"] - probes == {"choice_accuracy"}
    assert (got["refuse"] - probes, probes - got["refuse"]) == ({"refused"}, {"refusal"})


def test_only_what_is_needed_is_scored() -> None:
    of = example(choices=["x", "y"], answer=0)
    assert continuations(of, METRICS) == ("x", "y")
    assert continuations(of, chosen(["loop"], thinks=False)) == ()
    assert continuations(example(answer="z"), METRICS) == ("z",)
    assert continuations(example(), METRICS) == ()


def test_metrics_are_chosen_by_name() -> None:
    assert [m.name for m in chosen(["loop", "regex"], thinks=False)] == ["regex", "loop"]
    everything = {m.name for m in chosen([], thinks=True)}
    assert everything - {m.name for m in chosen([], thinks=False)} == {"think_closed"}
    assert [m.name for m in chosen(["think_closed"], thinks=False)] == ["think_closed"]
    with pytest.raises(UsageError, match="--metric lop does not exist"):
        chosen(["lop"], thinks=False)


def test_a_pattern_that_takes_years_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmquant_eval.validate.metrics.right._PATIENCE", 0.1)
    with pytest.raises(LlmquantError, match="took more than"):
        score("regex", {"regex": r"(a|aa)+$"}, "a" * 60 + "b")
