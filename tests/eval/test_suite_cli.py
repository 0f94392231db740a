"""``llmquant eval --suite`` as it is typed: what it refuses, what it writes, what it says when a
part fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from suite_kit import RTN, recipe, suite_of

from llmquant.cli import main


class Ran(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def suite_file(base_model: Path, words: Path, tmp_path: Path) -> Path:
    """A suite of one recipe, with its outputs beside it."""
    models = [{"label": "coarse", "recipe": str(recipe(tmp_path))}]
    outputs = {
        "results": str(tmp_path / "results"),
        "markdown": str(tmp_path / "BOARD.md"),
        "html": str(tmp_path / "board.html"),
    }
    suite = suite_of(base_model, words, models, outputs=outputs)
    path = tmp_path / "mine.yaml"
    path.write_text(
        yaml.safe_dump(suite.model_dump(mode="json", exclude_none=True)), encoding="utf-8"
    )
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run ``llmquant eval`` in this process, with a cache of its own."""

    def run_(*args: object) -> Ran:
        cache = ["--cache", str(tmp_path / "cache")]
        monkeypatch.setattr("sys.argv", ["llmquant", "eval", *map(str, args), *cache])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        code = ended.value.code
        return Ran(code if isinstance(code, int) else 0, out, err)

    return run_


def edited(path: Path, **changes: object) -> Path:
    """The suite file with keys replaced."""
    path.write_text(
        yaml.safe_dump(yaml.safe_load(path.read_text(encoding="utf-8")) | changes), encoding="utf-8"
    )
    return path


def test_it_writes_what_it_was_asked_for_and_then_has_nothing_left_to_do(
    run, suite_file: Path, tmp_path: Path
) -> None:
    first = run("--suite", suite_file)
    assert first.code == 0, first.err
    (written,) = (tmp_path / "results").iterdir()
    assert json.loads(written.read_text(encoding="utf-8"))["models"][-1]["label"] == "coarse"
    assert "coarse" in (tmp_path / "BOARD.md").read_text(encoding="utf-8")
    assert "<html" in (tmp_path / "board.html").read_text(encoding="utf-8")
    assert "coarse" in first.out

    before = written.read_bytes()
    again = run("--suite", suite_file)
    assert again.code == 0, again.err
    assert again.err.splitlines()[-1].startswith("0 measured now")
    assert written.read_bytes() == before

    missing = run("--suite", suite_file, "--missing")
    assert missing.code == 0, missing.err
    assert "0 measured now; wrote 0 reports" in missing.err


def test_missing_says_why_it_measures_a_changed_recipe(
    run, suite_file: Path, tmp_path: Path
) -> None:
    assert run("--suite", suite_file).code == 0
    recipe(tmp_path, RTN.replace("bits: 4", "bits: 8"))
    ran = run("--suite", suite_file, "--missing")
    assert ran.code == 0, ran.err
    assert ran.err.startswith("coarse: ")
    assert "1 measured now" in ran.err


def test_a_model_without_numbers_fails_the_run_and_keeps_the_others(
    run, suite_file: Path, tmp_path: Path, altered: Callable[..., Path]
) -> None:
    models = yaml.safe_load(suite_file.read_text(encoding="utf-8"))["models"]
    broken = {"label": "broken", "model": str(altered("broken", lambda w: w * float("nan")))}
    ran = run("--suite", edited(suite_file, models=[broken, *models]))
    assert ran.code == 1
    assert "1 measurement failed, the others are kept: broken" in ran.err
    assert "Traceback" not in ran.err
    assert [p.name.startswith("coarse") for p in (tmp_path / "results").iterdir()] == [True]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        pytest.param(
            ("--suite", "{s}", "--limit", "3"),
            "--limit does not go with --suite",
            id="option of another kind",
        ),
        pytest.param(("--suite", "nothing.yaml"), "nothing.yaml", id="no such suite"),
        pytest.param(
            ("--suite", "{s}", "--output", "{s}"),
            "is a file; a suite writes one report per model",
            id="output",
        ),
        pytest.param(("--suite", "{s}", "--protocol", "ppl/odd"), "ppl/odd", id="protocol"),
        pytest.param(("--suite", "{s}", "--text", "file:nothing.txt"), "nothing.txt", id="text"),
    ],
)
def test_what_cannot_be_run_is_refused_before_any_work(
    run, suite_file: Path, args: tuple[str, ...], words: str, tmp_path: Path
) -> None:
    ran = run(*(a.format(s=suite_file) for a in args))
    assert ran.code == 2, ran.err
    assert words in ran.err
    assert not (tmp_path / "results").exists()


def test_a_suite_with_an_unknown_key_names_it(run, suite_file: Path) -> None:
    ran = run("--suite", edited(suite_file, protocol="ppl/gptq"))
    assert ran.code == 2
    assert "protocol" in ran.err
    assert "Traceback" not in ran.err
