"""A served model: what it is asked, what is read of its answers, and what survives its failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from chat_server import chatting
from children import Run
from fake_server import serving
from validate_kit import write_rows

from llmquant_eval.validate.run import journal_of

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def validate(run: Run, url: str, data: Path, *more: object) -> Any:
    return run("validate", url, "--data", data, "-o", "a.json", "--retry-for", 1, *more)


def scores(file: str = "a.json") -> dict[str, dict[str, float]]:
    items = json.loads(Path(file).read_text())["items"]
    return {item["id"]: item["scores"] for item in items}


def numbered(folder: Path, count: int) -> Path:
    rows = [{"id": f"q{i}", "prompt": f"Number {i}?", "answer": str(i)} for i in range(count)]
    return write_rows(folder / "prod.jsonl", *rows)


def last(body: Any) -> str:
    return str(body["messages"][-1]["content"])


def test_what_is_asked_and_what_is_read(run: Run, tmp_path: Path) -> None:
    rows = [
        {"id": "text", "prompt": "Hi", "answer": "hello", "system": "Be brief."},
        {"id": "call", "prompt": "Call", "tools": [TOOL], "tool_call": CALL},
    ]
    said = {
        "Hi": {"content": " hello ", "reasoning_content": "hm"},
        "Call": {"content": None, "tool_calls": [CALL]},
    }
    with chatting(lambda body: said[last(body)]) as server:
        done = validate(run, server.url, write_rows(tmp_path / "p.jsonl", *rows))
    assert done.code == 0
    got = scores()
    assert (got["text"]["exact_match"], got["text"]["answer_tokens"]) == (1, 3)
    assert (got["call"]["tool_call"], got["call"]["tool_call_valid"]) == (1, 1)
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    bodies = {last(body): body for _, body in server.requests}
    assert [m["role"] for m in bodies["Hi"]["messages"]] == ["system", "user"]
    assert (bodies["Hi"]["temperature"], bodies["Hi"]["max_tokens"]) == (0, 256)
    assert ("tools" in bodies["Hi"], bodies["Call"]["tools"]) == (False, [TOOL])
    assert "left out, because it needs log-probabilities (--tokenizer): answer_logprob" in done.err


def test_raw_prompts_are_continued(run: Run, tmp_path: Path) -> None:
    with chatting(lambda _: {"content": "hello"}) as server:
        server.finish = "length"
        validate(run, server.url, numbered(tmp_path, 1), "--raw")
    assert server.requests[0][0] == "/v1/completions"
    assert server.requests[0][1]["prompt"] == "Number 0?"
    assert scores()["q0"]["end_of_turn"] == 0


def test_a_character_that_a_server_cut_in_half_is_a_question_mark(run: Run, tmp_path: Path) -> None:
    with chatting(lambda _: {"content": "hello \ud83d", "reasoning": "\ud83d"}) as server:
        done = validate(run, server.url, numbered(tmp_path, 1))
    assert done.code == 0
    assert json.loads(Path("a.json").read_text())["items"][0]["answer"] == "hello ?"


def test_a_server_that_wants_the_newer_name_of_the_limit_gets_it(run: Run, tmp_path: Path) -> None:
    def answer(body: Any) -> Any:
        return 400 if "max_tokens" in body else {"content": "x"}

    with chatting(answer) as server:
        respond = server.respond

        def worded(path: str, body: Any) -> Any:
            status, said = respond(path, body)
            return status, said if status == 200 else {"error": "use 'max_completion_tokens'"}

        server.respond = worded  # type: ignore[method-assign]
        assert validate(run, server.url, numbered(tmp_path, 3), "--max-tokens", 7).code == 0
    assert [b.get("max_completion_tokens") for _, b in server.requests] == [None, 7, 7, 7]


def test_a_refused_prompt_names_its_line_and_loses_nothing(run: Run, tmp_path: Path) -> None:
    data, refused = numbered(tmp_path, 12), {"Number 5?"}
    with chatting(lambda b: 400 if last(b) in refused else {"content": last(b)[7:-1]}) as server:
        failed = validate(run, server.url, data)
        assert failed.code == 1
        assert f"{data}, line 6: " in failed.said
        assert "no, 400" in failed.said
        asked = {last(body) for _, body in server.requests}
        kept = journal_of(Path("a.json")).read_text().count('"key"')
        assert kept == len(asked) - 1
        refused.clear()
        server.requests.clear()
        done = validate(run, server.url, data)
    assert done.code == 0
    assert f"resumes: {kept} of 12 items are measured" in done.err
    # What was kept is not asked again, but for the first, which tells whether it is this model.
    assert len(server.requests) == 12 - kept + 1
    assert all(s["exact_match"] == 1 for s in scores().values())


def test_another_model_at_the_address_starts_over(run: Run, tmp_path: Path) -> None:
    data, name = numbered(tmp_path, 6), "old"
    with chatting(lambda b: 500 if last(b) == "Number 5?" and name == "old" else {"content": name}) as server:  # fmt: skip
        assert validate(run, server.url, data).code == 1
        name = "new"
        done = validate(run, server.url, data)
    assert "answers otherwise than in an earlier run, whose answers are not used" in done.said
    answers = [i["answer"] for i in json.loads(Path("a.json").read_text())["items"]]
    assert answers == ["new"] * 6


def test_log_probabilities_of_a_server_are_those_of_its_folder(
    run: Run, model: Path, tmp_path: Path
) -> None:
    rows = [{"id": "a", "prompt": "Red?", "choices": ["red", "blue"], "answer": 0},
            {"id": "b", "prompt": "Blue?", "answer": "yes"}]  # fmt: skip
    data = write_rows(tmp_path / "p.jsonl", *rows)
    names = ("--metric", "choice_accuracy", "--metric", "answer_logprob")
    with serving(model) as server:
        served = validate(run, f"{server.url}#{server.name}", data, *names, "--tokenizer", model)
        asked = validate(run, f"{server.url}#{server.name}", data, *names, "--overwrite")
    assert served.code == 0
    assert (asked.code, "needs log-probabilities of a server; give --tokenizer" in asked.said) == (
        2,
        True,
    )
    run("validate", model, "--data", data, "-o", "b.json", "--dtype", "float32", *names)
    ours, theirs = scores("a.json"), scores("b.json")
    assert ours["a"] == theirs["a"]
    assert ours["b"]["answer_logprob"] == pytest.approx(theirs["b"]["answer_logprob"], abs=1e-4)
