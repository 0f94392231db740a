"""The leaderboard as a Gradio app: it answers on 127.0.0.1 alone, with the rows and the commands of
the rankings.

The app runs as a user runs it, in a process of its own: its threads and sockets would outlive a
test.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import board_kit as kit
import pytest
from children import heeding_interrupts

from llmquant_eval.leaderboard.app import HOST, table
from llmquant_eval.leaderboard.ranking import make_boards

COMMAND = [sys.executable, "-c", "from llmquant.cli import main; main()", "leaderboard"]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    (tmp_path / "four.json").write_text(kit.four().to_json(), encoding="utf-8")
    return tmp_path


@pytest.fixture
def address(results: Path) -> Iterator[str]:
    """Of the running app."""
    command = [*COMMAND, str(results), "--serve", "--port", "0", "--title", "Ours"]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        heeding_interrupts(command), stdout=pipe, stderr=pipe, text=True
    ) as running:
        assert running.stdout is not None
        said = running.stdout.readline()
        try:
            yield next(word for word in said.split() if word.startswith("http"))
        finally:
            running.send_signal(signal.SIGINT)
            try:
                running.communicate(timeout=60)
            finally:
                running.kill()


def test_numbers_stay_numbers() -> None:
    (board,) = make_boards(kit.stored(kit.four()))
    headers, kinds, rows = table(board)
    assert headers[:4] == ["#", "model", "scheme", "ratio"]
    assert [row[:4] for row in rows[:2]] == [
        ["base", "base", "float16", 1.0],
        ["1", "good", "W4 g128 sym", 1.01],
    ]
    assert all(len(row) == len(headers) == len(kinds) for row in rows)


def test_it_shows_rankings_on_this_machine_alone(address: str) -> None:
    assert address.startswith(f"http://{HOST}:")
    with urllib.request.urlopen(f"{address}config", timeout=30) as answer:
        config: dict[str, Any] = json.load(answer)
    assert config["title"] == "Ours"
    assert config["analytics_enabled"] is False
    kinds = [component["type"] for component in config["components"]]
    assert [kinds.count(kind) for kind in ("tabitem", "dataframe", "html", "dropdown", "code")] == [
        1
    ] * 5
    (code,) = [
        component["props"]["value"]
        for component in config["components"]
        if component["type"] == "code"
    ]
    assert code == "llmquant quantize m -o out/x\nllmquant eval out/x --text file:t.txt"


def test_a_taken_port_is_an_error(results: Path) -> None:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        command = [*COMMAND, str(results), "--serve", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "choose another --port" in done.stderr
    assert "Traceback" not in done.stderr
