"""What ``llmquant eval`` shows of its progress where no terminal draws bars."""

from __future__ import annotations

import pytest

from llmquant_eval.cli import _progress


@pytest.mark.parametrize(
    ("windows", "lines"),
    [
        pytest.param(2, ["0/2", "1/2", "2/2"], id="a line each"),
        pytest.param(242, 11, id="a line per tenth"),
        pytest.param(0, ["0/0"], id="nothing to do"),
    ],
)
def test_a_log_gets_a_line_per_tenth(
    windows: int, lines: list[str] | int, capsys: pytest.CaptureFixture[str]
) -> None:
    with _progress(hidden=False) as (advance, _):
        for done in range(windows + 1):
            advance("ppl/gptq-512", done, windows)
    written = capsys.readouterr().err.splitlines()
    if isinstance(lines, int):
        assert len(written) == lines
        assert written[-1] == "ppl/gptq-512: 242/242"
    else:
        assert written == [f"ppl/gptq-512: {line}" for line in lines]


def test_quiet_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with _progress(hidden=True) as (advance, tell):
        advance("ppl/gptq-512", 0, 2)
        tell("a note")
    assert capsys.readouterr().err == ""
