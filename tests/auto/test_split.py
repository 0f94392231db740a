"""No document calibrates and judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import llmquant
from llmquant.errors import LlmquantError, SourceError
from llmquant_eval.auto.split import FEW, check_disjoint, make_split


def jsonl(path: Path, rows: list[object]) -> str:
    path.write_text("".join(json.dumps({"text": r}) + "\n" for r in rows), encoding="utf-8")
    return f"jsonl:{path}#text"


def rows_of(source: str) -> list[object]:
    return list(llmquant.read_documents(source).rows)


@pytest.fixture
def many(tmp_path):
    return [f"document {i} " + "word " * (i % 7) for i in range(60)]


def test_whole_documents_go_to_one_part(tmp_path, many):
    source = jsonl(tmp_path / "d.jsonl", [*many, many[3], " ", many[7]])
    split = make_split([source], None, tmp_path / "data")
    first, second = rows_of(split.calibration.source), rows_of(split.heldout.source)
    assert sorted([*first, *second]) == sorted(many)
    assert 0.4 < split.calibration.characters / sum(map(len, many)) < 0.6
    check_disjoint(split)


def test_the_division_does_not_depend_on_the_order(tmp_path, many):
    hashes = set()
    for i, order in enumerate((many, many[::-1])):
        source = jsonl(tmp_path / f"{i}.jsonl", order)
        split = make_split([source], None, tmp_path / f"data{i}")
        hashes.add((split.calibration.rows_sha256, split.heldout.rows_sha256))
    assert len(hashes) == 1


def test_several_sources_are_one_text(tmp_path, many):
    halves = [jsonl(tmp_path / f"{i}.jsonl", many[i::2]) for i in range(2)]
    whole = make_split([jsonl(tmp_path / "all.jsonl", many)], None, tmp_path / "a")
    assert make_split(halves, None, tmp_path / "b").heldout.rows_sha256 == (
        whole.heldout.rows_sha256
    )


def test_few_documents_are_cut_at_a_blank_line(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("a" * 30 + "\n\n" + "b" * 30 + "\n \n" + "c" * 90, encoding="utf-8")
    split = make_split([f"file:{path}"], None, tmp_path / "data")
    assert rows_of(split.calibration.source) == ["a" * 30 + "\n\n" + "b" * 30]
    assert rows_of(split.heldout.source) == ["c" * 90]
    assert "cut at a blank line" in split.how


def test_a_beginning_that_is_another_one_s_end_is_not_judged(tmp_path):
    source = jsonl(tmp_path / "d.jsonl", ["same\n\nother", "mine\n\nsame"])
    split = make_split([source], None, tmp_path / "data")
    assert rows_of(split.heldout.source) == ["other"]
    check_disjoint(split)


def test_with_a_calibration_source_all_is_held_out_but_what_it_has(tmp_path, many):
    data = jsonl(tmp_path / "d.jsonl", many)
    calibration = jsonl(tmp_path / "c.jsonl", [*many[:4], "another"])
    split = make_split([data], calibration, tmp_path / "data")
    assert split.calibration.source == calibration
    assert rows_of(split.heldout.source) == many[4:]
    assert split.shared == 4
    check_disjoint(split)


@pytest.mark.parametrize(
    ("rows", "calibration", "message"),
    [
        pytest.param(["one line"], None, "cannot be divided", id="nowhere to cut"),
        pytest.param(["a", "b"], ["b", "a"], "every document is in --calibration", id="all shared"),
        pytest.param([" "], None, "no row of text", id="empty"),
        pytest.param(
            [[{"role": "user", "content": "Hi"}]],
            None,
            "has 1 different chats; give",
            id="one chat",
        ),
        pytest.param(
            [[{"role": "user", "content": "Hi"}], "plain"],
            None,
            "1 of 2 documents are chats",
            id="chats beside text",
        ),
    ],
)
def test_too_little_is_refused(tmp_path, rows, calibration, message):
    source = jsonl(tmp_path / "d.jsonl", rows)
    other = None if calibration is None else jsonl(tmp_path / "c.jsonl", calibration)
    with pytest.raises(SourceError, match=message):
        make_split([source], other, tmp_path / "data")


def test_a_part_that_was_changed_is_found(tmp_path, many):
    split = make_split([jsonl(tmp_path / "d.jsonl", many)], None, tmp_path / "data")
    path = tmp_path / "data" / "heldout.jsonl"
    path.write_text(path.read_text(encoding="utf-8") + '{"text": "more"}\n', encoding="utf-8")
    with pytest.raises(LlmquantError, match="changed during the search"):
        check_disjoint(split)


def test_a_document_in_both_is_found(tmp_path, many):
    split = make_split([jsonl(tmp_path / "d.jsonl", many)], None, tmp_path / "data")
    with pytest.raises(LlmquantError, match="in the calibration and in the held-out"):
        check_disjoint(split.model_copy(update={"heldout": split.calibration}))


def test_the_files_are_left_alone_where_nothing_changed(tmp_path, many):
    source = jsonl(tmp_path / "d.jsonl", many)
    make_split([source], None, tmp_path / "data")
    before = (tmp_path / "data" / "heldout.jsonl").stat().st_mtime_ns
    make_split([source], None, tmp_path / "data")
    assert (tmp_path / "data" / "heldout.jsonl").stat().st_mtime_ns == before


def test_twenty_documents_are_many(tmp_path):
    rows = [f"{i}\n\n{i}{i}" for i in range(FEW)]
    split = make_split([jsonl(tmp_path / "d.jsonl", rows)], None, tmp_path / "data")
    assert set(rows_of(split.heldout.source)) < set(rows)


def test_chats_are_divided_whole_tools_and_all(tmp_path):
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
    turns = [
        [
            {"role": "user", "content": f"{i}?"},
            {"role": "assistant", "content": "", "tool_calls": calls},
        ]
        for i in range(6)
    ]
    path = tmp_path / "chats.jsonl"
    lines = [{"messages": t, "tools": tools} for t in [*turns, turns[2]]]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    source = f"jsonl:{path}#messages"
    split = make_split([source], None, tmp_path / "data")
    assert split.chats
    first, second = rows_of(split.calibration.source), rows_of(split.heldout.source)
    assert {*first, *second} == set(rows_of(source))
    assert len(first) + len(second) == 6
    check_disjoint(split)
    whole = make_split([source], split.calibration.source, tmp_path / "again")
    assert whole.shared == len(first)
    assert rows_of(whole.heldout.source) == [r for r in rows_of(source)[:6] if r in second]
