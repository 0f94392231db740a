"""``llmquant validate`` as people run it: what comes out, what is refused, what survives."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from children import Run
from validate_kit import write_rows

from llmquant_eval.validate.run import journal_of

FLAGS = ("--max-tokens", "8", "--dtype", "float32")
SCORERS = """
from __future__ import annotations
from dataclasses import dataclass

def length(item, answer):
    return len(answer)

def several(item, answer):
    print("words on stdout")
    return {"has_id": "id" in item, "nothing": None}

def fails_on_json(item, answer):
    if item["id"] == "json":
        raise ValueError("no idea")
    return 1

def gives_nan(item, answer):
    return float("nan") if item["id"] == "json" else 0

def gives_text(item, answer):
    return "0.5"

def leaves(item, answer):
    raise SystemExit(0)

def gives_two(item, answer):
    import torch
    return torch.ones(2)

@dataclass
class Kept:
    id: str

def takes_away(item, answer):
    kept = Kept(item["id"])
    return len(item.pop("choices", ())) + len(item.get("messages", [{}])[0].pop("role", ""))
"""


def validate(run: Run, model: Path, data: Path, out: str, *more: object) -> Any:
    return run("validate", model, "--data", data, "-o", out, *FLAGS, *more)


@pytest.fixture
def scorers(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(SCORERS, encoding="utf-8")
    return path


def test_results_are_what_compare_takes(run: Run, model: Path, quantized: Path, data: Path) -> None:
    first = validate(run, model, data, "a.json")
    assert first.code == 0
    assert "validate QUANTIZED --data" in first.out  # not the original again
    assert "-o quantized.json --reference a.json" in first.out
    assert "llmquant compare a.json quantized.json" in first.out
    alone = validate(run, quantized, data, "c.json")
    assert "validate ORIGINAL --data" in alone.out
    assert "llmquant compare original.json c.json" in alone.out
    done = validate(run, quantized, data, "b.json", "--reference", "a.json")
    assert (done.code, journal_of(Path("b.json")).exists()) == (0, False)
    assert "llmquant compare a.json b.json --margin 1% --margin answer_tokens=10%" in done.out
    rows = {row[0]: row[1:] for row in map(str.split, done.out.splitlines()) if row}
    assert rows["choice_accuracy"][2] == "1"
    assert rows["contains_answer"][-1] in ("0", "1")  # the reference's
    verdict = run("compare", "a.json", "b.json", "--json")
    metrics = json.loads(verdict.out)["metrics"]
    assert verdict.code == 3
    assert {m["metric"]: (m["items"], m["groups"]) for m in metrics} == {
        "exact_match": (1, None), "contains_answer": (1, None), "choice_accuracy": (1, None),
        "answer_logprob": (2, None), "json_valid": (1, None), "schema_valid": (1, None),
        "end_of_turn": (5, 4), "answer_tokens": (5, 4), "repetition": (5, 4), "loop": (5, 4),
        "language_switch": (5, 4), "refusal": (5, 4),
    }  # fmt: skip


def test_what_is_in_the_results(run: Run, model: Path, data: Path) -> None:
    validate(run, model, data, "a.json", "--system", "Be brief.")
    got = json.loads(Path("a.json").read_text())
    assert (got["kind"], got["schema_version"], got["model"]) == ("items", 1, model.name)
    assert got["lower_is_better"] == [
        "answer_tokens", "language_switch", "loop", "refusal", "repetition",
    ]  # fmt: skip
    assert got["notes"] == ["generated: greedy, at most 8 tokens"]
    assert got["conditions"] == {
        "generation": "greedy, at most 8 tokens",
        "prompts": "as chats",
        "--system": f"sha256 {hashlib.sha256(b'Be brief.').hexdigest()}",
    }
    assert got["computing"].keys() == {"dtype", "device", "kernel"}
    items = {item["id"]: item for item in got["items"]}
    assert list(items) == ["plain", "right", "choice", "talk", "json"]
    assert items["plain"]["prompt"] == "system: Be brief.\nuser: Hello there"
    assert items["plain"]["answer"]
    assert (items["right"]["group"], "group" in items["plain"]) == ("sums", False)


@pytest.mark.parametrize(
    ("options", "what"),
    [(("--max-tokens", "9"), "generation"), (("--system", "Be brief."), "--system")],
)
def test_results_that_were_asked_for_otherwise_are_not_compared(
    run: Run, model: Path, data: Path, options: tuple[str, str], what: str
) -> None:
    """Before a model is loaded, where the other result is --reference."""
    validate(run, model, data, "a.json")
    done = validate(run, model, data, "b.json", *options, "--reference", "a.json")
    assert (done.code, f"not asked alike, {what}:" in done.said) == (2, True)
    assert validate(run, model, data, "b.json", *options).code == 0
    done = run("compare", "a.json", "b.json")
    assert (done.code, f"not asked alike, {what}:" in done.said) == (2, True)


def test_a_system_message_that_no_prompt_lacks_changes_nothing(
    run: Run, model: Path, tmp_path: Path
) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "Hello", "system": "Be brief."}\n')
    assert validate(run, model, own, "a.json").code == 0
    assert validate(run, model, own, "b.json", "--system", "x", "--reference", "a.json").code == 0


def test_no_text_leaves_out_what_was_said_and_nothing_else(
    run: Run, model: Path, data: Path
) -> None:
    validate(run, model, data, "a.json")
    validate(run, model, data, "b.json", "--no-text")
    with_text, without = (json.loads(Path(f).read_text()) for f in ("a.json", "b.json"))
    assert "Hello there" not in Path("b.json").read_text()
    for item in with_text["items"]:
        del item["prompt"], item["answer"]
    assert with_text == without


def test_one_metric_measures_no_more_than_it_needs(run: Run, model: Path, data: Path) -> None:
    validate(run, model, data, "a.json", "--metric", "choice_accuracy", "--json")
    items = json.loads(Path("a.json").read_text())["items"]
    assert [list(item["scores"]) for item in items] == [[], [], ["choice_accuracy"], [], []]
    assert items[2]["answer"] in ("red", "blue")


def test_scorers_of_the_users_own(run: Run, model: Path, data: Path, scorers: Path) -> None:
    mine = [f"--scorer={scorers}:{name}" for name in ("length", "several")]
    done = validate(run, model, data, "a.json", *mine, "--lower-is-better", "length", "--json")
    got = json.loads(done.out)
    assert "words on stdout" in done.err
    assert "length" in got["lower_is_better"]
    for item in got["items"]:
        assert item["scores"]["length"] > 0
        assert item["scores"]["has_id"] == 1.0
        assert "nothing" not in item["scores"]


def test_what_a_scorer_does_to_its_row_stays_there(
    run: Run, model: Path, data: Path, scorers: Path
) -> None:
    """Another scorer of the same row gets it whole; and a scorer's file may have dataclasses."""
    other = scorers.with_name("other.py")
    other.write_text(scorers.read_text().replace("def takes_away(", "def too("))
    mine = (f"--scorer={scorers}:takes_away", f"--scorer={other}:too")
    done = validate(run, model, data, "a.json", *mine, "--json")
    scores = [item["scores"] for item in json.loads(done.out)["items"]]
    assert [s["takes_away"] for s in scores] == [0, 0, 2, 4, 0]
    assert [s["too"] for s in scores] == [0, 0, 2, 4, 0]


def test_a_metric_that_no_scorer_gave_is_said(run: Run, model: Path, data: Path) -> None:
    done = validate(run, model, data, "a.json", "--lower-is-better", "lenght")
    assert "note: --lower-is-better lenght: no scorer gave a metric of that name" in done.out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        pytest.param("fails_on_json", "raised ValueError: no idea; mend it", id="raises"),
        pytest.param("gives_nan", "returned nan for gives_nan, which is no number", id="NaN"),
        pytest.param("gives_text", "returned '0.5' for gives_text", id="text"),
        pytest.param("leaves", "raised SystemExit: 0", id="exits"),
        pytest.param("gives_two", "returned tensor([1., 1.]) for gives_two", id="two numbers"),
    ],
)
def test_a_scorer_that_fails_names_the_line_and_loses_no_answer(
    run: Run, model: Path, data: Path, scorers: Path, name: str, says: str
) -> None:
    done = validate(run, model, data, "a.json", f"--scorer={scorers}:{name}")
    line = 5 if name in ("fails_on_json", "gives_nan") else 1
    assert done.code == 1
    assert done.said.split("error: ")[1].startswith(f"{data}, line {line}: scorer {scorers}:{name}")
    assert says in done.said
    scorers.write_text(
        SCORERS.replace(f"def {name}(", f"def {name}(item, answer): return 1\ndef _(")
    )
    again = validate(run, model, data, "a.json", f"--scorer={scorers}:{name}")
    assert again.code == 0
    assert "resumes: 5 of 5 items are measured" in again.err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        pytest.param(["--metric", "lop"], "--metric lop does not exist", id="metric"),
        pytest.param(["--metric", "regex"], "no row of", id="metric without rows"),
        pytest.param(["--scorer", "mine.py"], "write FILE.py:FUNCTION", id="scorer without name"),
        pytest.param(["--scorer", "no.py:f"], "no.py is not a file", id="no scorer file"),
        pytest.param(["--scorer", "mine.py:f"], "has no function f", id="no scorer function"),
        pytest.param(["--scorer", "bad.py:f"], "cannot be imported: SyntaxError", id="no Python"),
        pytest.param(["--lower-is-better", "loop"], "for metrics of your own", id="lower"),
        pytest.param(["--tokenizer", "x"], "--tokenizer is for served models", id="tokenizer"),
        pytest.param(["--limit", "0"], "--limit 0 leaves no item", id="limit"),
        pytest.param(["--reference", "other.json"], "measured on other data", id="other data"),
        pytest.param(["--reference", "no.json"], "cannot be read", id="no reference"),
        pytest.param(["-o", "no/a.json"], "does not exist; make it first", id="no folder"),
        pytest.param(["-o", "."], "is a folder; give a file", id="a folder"),
        pytest.param(["-o", "other.json"], "has results already", id="results are there"),
        pytest.param(["--profile", "a.json"], "is --output too; give two files", id="profile"),
        pytest.param(["--max-tokens", "0"], "Invalid value for '--max-tokens'", id="no tokens"),
    ],
)
def test_what_cannot_be_right_is_exit_code_2(
    run: Run, model: Path, data: Path, scorers: Path, more: list[str], says: str
) -> None:
    item = {"id": "a", "scores": {"loop": 0.0}}
    other = {"kind": "items", "model": "m", "data": "d", "data_sha256": "0" * 64, "items": [item]}
    Path("other.json").write_text(json.dumps(other))
    Path("bad.py").write_text("def f(:")
    done = validate(run, model, data, "a.json", *more)
    assert (done.code, Path("a.json").exists()) == (2, False)
    assert says in done.said
    assert not list(Path().glob("*.journal"))


def test_keys_that_nobody_knows_are_said_once(run: Run, model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a", "topic": "x"}, {"prompt": "b", "topic": "y"}]
    done = validate(run, model, write_rows(tmp_path / "prod.jsonl", *rows), "a.json")
    assert done.err.count("key 'topic'") == 1


def test_finished_results_are_replaced_only_when_asked(run: Run, model: Path, data: Path) -> None:
    validate(run, model, data, "a.json")
    before = Path("a.json").read_bytes()
    assert validate(run, model, data, "a.json", "--limit", "1").code == 2
    assert Path("a.json").read_bytes() == before
    assert validate(run, model, data, "a.json", "--limit", "1", "--overwrite").code == 0
    assert len(json.loads(Path("a.json").read_text())["items"]) == 1


def test_what_is_read_is_not_replaced(run: Run, model: Path, data: Path) -> None:
    before = data.read_bytes()
    for place in (["x.json", "--profile", data], [data]):
        done = validate(run, model, data, *place, "--overwrite")
        assert (done.code, "which is read here; give another file" in done.said) == (2, True)
    assert data.read_bytes() == before
    Path("a.json").write_text("{}")
    done = validate(run, model, data, "a.json", "--reference", "a.json", "--overwrite")
    assert (done.code, "a.json is a.json, which is read here" in done.said) == (2, True)


def many(folder: Path) -> Path:
    rows = [{"id": f"q{i}", "prompt": f"Number {i}?", "answer": str(i)} for i in range(24)]
    return write_rows(folder / "many.jsonl", *rows)


def killed(model: Path, data: Path, out: Path, units: int, *more: str) -> None:
    """Run the command in a process of its own and kill it after some units are in the journal."""
    program = "from llmquant.cli import main; main()"
    arguments = ["validate", str(model), "--data", str(data), "-o", str(out), *FLAGS, *more]
    child = subprocess.Popen([sys.executable, "-c", program, *arguments], stderr=subprocess.DEVNULL)
    journal, until = journal_of(out), time.monotonic() + 120
    while not (journal.exists() and journal.read_text().count('"key"') >= units):
        assert child.poll() is None, "it ended before it was killed"
        assert time.monotonic() < until
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()


SLOW = """
import time
def slow(item, answer):
    time.sleep(0.05)
    return len(answer)
"""


def test_a_killed_run_resumes_and_ends_with_the_same_bytes(
    run: Run, model: Path, tmp_path: Path
) -> None:
    data, out = many(tmp_path), tmp_path / "a.json"
    (tmp_path / "slow.py").write_text(SLOW)
    more = ("--batch-size", "2", "--threads", "1", "--scorer", f"{tmp_path}/slow.py:slow")
    killed(model, data, out, 6, *more)
    assert not out.exists()
    with journal_of(out).open("a") as f:
        f.write('\n{"key": "a line that was cu')
    resumed = validate(run, model, data, str(out), *more)
    done = int(resumed.err.split("resumes: ")[1].split(" of 24")[0])
    assert (resumed.code, 2 <= done < 24) == (0, True)
    assert not journal_of(out).exists()
    assert validate(run, model, data, "whole.json", *more).code == 0
    assert out.read_bytes() == Path("whole.json").read_bytes()


@pytest.mark.parametrize(
    ("other", "more"),
    [
        pytest.param(False, ["--system", "Be brief."], id="prompts"),
        pytest.param(False, ["--max-tokens", "5"], id="options"),
        pytest.param(True, [], id="model"),
    ],
)
def test_answers_of_another_run_are_not_used(
    run: Run, model: Path, quantized: Path, data: Path, scorers: Path, other: bool, more: list[str]
) -> None:
    assert validate(run, model, data, "a.json", f"--scorer={scorers}:fails_on_json").code == 1
    second = quantized if other else model
    done = validate(run, second, data, "a.json", *more)
    assert (
        "answers of another model, other options or other prompts; they are not used" in done.said
    )
    validate(run, second, data, "whole.json", *more)
    assert Path("a.json").read_bytes() == Path("whole.json").read_bytes()


def test_two_runs_do_not_share_an_output(run: Run, model: Path, data: Path) -> None:
    import fcntl

    with journal_of(Path("a.json")).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = validate(run, model, data, "a.json")
    assert done.code == 2
    assert "is in use by another run" in done.said


def test_restart_deletes_what_an_unfinished_run_left(
    run: Run, model: Path, data: Path, scorers: Path
) -> None:
    validate(run, model, data, "a.json", f"--scorer={scorers}:fails_on_json")
    assert journal_of(Path("a.json")).exists()
    done = validate(run, model, data, "a.json", "--restart")
    assert (done.code, "resumes" in done.err) == (0, False)


def test_an_interrupted_run_says_what_is_kept(
    run: Run, model: Path, data: Path, scorers: Path
) -> None:
    scorers.write_text("def stops(item, answer):\n    raise KeyboardInterrupt")
    done = validate(run, model, data, "a.json", f"--scorer={scorers}:stops")
    assert done.code == 130
    assert "interrupted; answers so far are kept, and the same command resumes" in done.err
    assert journal_of(Path("a.json")).exists()


def test_a_gguf_file_is_a_model_too(run: Run, model: Path, data: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "small.gguf"
    assert run("convert", model, "--to", "gguf", "-o", gguf).code == 0
    assert validate(run, gguf, data, "a.json").code == 0
    validate(run, model, data, "b.json")
    ours, theirs = (json.loads(Path(f).read_text())["items"] for f in ("a.json", "b.json"))
    assert [i["answer"] for i in ours] == [i["answer"] for i in theirs]


def test_misbehaving_items_are_named(run: Run, tmp_path: Path) -> None:
    from chat_server import chatting

    said = {"a": "no " * 30, "b": "YEL被", "c": "Fine, thank you."}
    rows = [{"id": k, "prompt": f"Say something, {k}"} for k in said]
    with chatting(lambda b: {"content": said[b["messages"][-1]["content"][-1]]}) as server:
        done = run("validate", server.url, "--data", write_rows(tmp_path / "p.jsonl", *rows), "-o", "a")  # fmt: skip
    assert "\nloop: a\n" in done.out
    assert "\nlanguage_switch: b\n" in done.out
    assert "\nrefusal: " not in done.out
