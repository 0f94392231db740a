"""The journal: whole lines count, whatever was cut or changed behind them does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmquant.quantization.state.journal import Journal, read_journal

RECORDS = [{"a": 1, "b": [0.1, None]}, {"text": "é\n\r\u2028"}, {"c": {}}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal(tmp_path / "journal.jsonl")
    for record in RECORDS:
        journal.append(record)
    journal.close()
    return tmp_path / "journal.jsonl"


def test_what_was_appended_is_read(path: Path) -> None:
    assert read_journal(path) == (RECORDS, path.stat().st_size)


def test_no_file_is_an_empty_journal(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none") == ([], 0)


def test_cut_anywhere_the_whole_lines_count_and_the_next_append_follows_them(path: Path) -> None:
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        count = sum(end <= cut for end in ends)
        records, end = read_journal(path)
        assert (records, end) == (RECORDS[:count], ([0, *ends])[count])
        journal = Journal(path, end)
        journal.append({"more": cut})
        journal.close()
        assert read_journal(path)[0] == [*RECORDS[:count], {"more": cut}]


def test_a_bit_flipped_anywhere_ends_it_there(path: Path) -> None:
    data = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(data) if byte == 10]
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        assert read_journal(path)[0] == RECORDS[: sum(end <= at for end in ends)]
