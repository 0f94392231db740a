"""Options that commands share: the same words everywhere, the same refusals, and one effect."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import EXAMPLE

import llmquant
from llmquant.cli import main
from llmquant.runtime.processor import this_processor

Run = Callable[..., tuple[object, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.chdir(tmp_path)

    def run_(*args: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["llmquant", *map(str, args)])
        code: object = 0
        try:
            main()
        except SystemExit as e:
            code = e.code
        told = capsys.readouterr()
        return code, told.out, told.err

    return run_


@pytest.fixture(autouse=True)
def put_back() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# Command, and what it needs before options are looked at.
COMPUTING = [
    pytest.param(
        ("quantize", "{m}", "-o", "out", "--method", "rtn", "--group-size", "32"), id="quantize"
    ),
    pytest.param(
        ("allocate", "{m}", "--target-bpw", "4.5", "-o", "r.yaml", "--calibration", "file:{t}"),
        id="allocate",
    ),
    pytest.param(("plan", "{m}", "--method", "rtn", "--group-size", "32"), id="plan"),
    pytest.param(("generate", "{m}", "hello"), id="generate"),
    pytest.param(("eval", "{m}", "--text", "file:{t}"), id="eval"),
    pytest.param(("serve", "{m}", "--port", "0"), id="serve"),
    pytest.param(("chat", "{m}"), id="chat"),
]
WITH_THREADS = [
    *COMPUTING,
    pytest.param(("convert", "{m}", "--to", "dense", "-o", "out"), id="convert"),
    pytest.param(("verify", "{m}"), id="verify"),
    pytest.param(("doctor",), id="doctor"),
]


def filled(command: tuple[str, ...], model: Path, text: Path) -> list[str]:
    return [word.format(m=model, t=text) for word in command]


@pytest.mark.parametrize("threads", ["0", "-1", "many"])
@pytest.mark.parametrize("command", WITH_THREADS)
def test_threads_that_cannot_be(command, threads, run: Run, model: Path, text: Path) -> None:
    code, out, err = run(*filled(command, model, text), "--threads", threads)
    assert (code, out) == (2, "")
    assert "--threads" in err
    assert not any(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("option", "word", "told"),
    [
        pytest.param(
            "--dtype",
            "int4",
            "dtype 'int4' does not exist; choose auto, bfloat16, bf16",
            id="dtype",
        ),
        pytest.param("--device", "toaster", "device toaster cannot be used here", id="device"),
        pytest.param("--device", "meta", "device meta holds no numbers", id="meta"),
    ],
)
@pytest.mark.parametrize("command", COMPUTING)
def test_words_that_are_none(
    command, option, word, told, run: Run, model: Path, text: Path
) -> None:
    code, _, err = run(*filled(command, model, text), option, word)
    assert code == 2
    assert told in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "word", ["auto", "bf16", "bfloat16", "fp16", "float16", "half", "fp32", "float32"]
)
def test_every_word_for_a_dtype_is_taken_alike(word, run: Run, model: Path) -> None:
    own = json.loads(
        run("generate", model, "hello", "--max-new-tokens", 1, "--json", "--dtype", word)[1]
    )["computing"]
    assert own["dtype"] == llmquant.parse_dtype(word).name
    assert (own["dtype_reason"] is None) is (word != "auto")
    planned = json.loads(
        run("plan", model, "--method", "rtn", "--group-size", 32, "--json", "--dtype", word)[1]
    )
    assert planned["computing"]["dtype"] == ("float32" if word == "auto" else own["dtype"])
    assert planned["kernels_for"]["dtype"] == llmquant.parse_dtype("auto").name


def test_threads_are_used_recorded_and_part_of_what_a_run_is(run: Run, model: Path) -> None:
    many = this_processor().threads + 1
    code, out, err = run(
        "quantize",
        model,
        "-o",
        "out",
        "--method",
        "rtn",
        "--group-size",
        32,
        "--json",
        "--threads",
        many,
    )
    assert code == 0
    assert f"--threads {many} is more than" in err
    assert json.loads(out)["computing"]["threads"] == many == torch.get_num_threads()
    assert json.loads(Path("out/manifest.json").read_text(encoding="utf-8"))["threads"] == many


def test_the_screen_says_what_was_computed_with(run: Run, model: Path) -> None:
    _, out, _ = run(
        "quantize", model, "-o", "out", "--method", "rtn", "--group-size", 32, "--threads", 1
    )
    told = " ".join(out.split())
    assert "computed float32 on " in told
    assert "1 thread; float32 because weights are rounded in float32" in told
    _, out, _ = run("plan", model, "--method", "gptq", "--group-size", 32)
    assert "float32 because calibration passes are float32" in " ".join(out.split())
    _, out, _ = run("plan", model, "--method", "rtn", "--group-size", 32)
    told = " ".join(out.split())
    assert "float32 because weights are rounded in float32" in told
    assert "quantizing float32 on " in told
    auto = llmquant.parse_dtype("auto")
    assert f"running {auto.name} on cpu" in told
    assert str(auto.reason) in told


EMPTY = [
    ("quantize", "m", "-o", ""),
    ("quantize", "m", "-o", "out", "--calibration", ""),
    ("quantize", "m", "-o", "out", "--log", ""),
    ("allocate", "m", "-o", "", "--target-bpw", "4"),
    ("qat", "m", "-o", "", "--data", "d"),
    ("convert", "m", "--to", "gptq", "-o", ""),
    ("import", "", "-o", "out"),
    ("verify", ""),
    ("eval", "m", "--text", ""),
    ("eval", "m", "--text", "t", "-o", ""),
    ("eval", "m", "--text", "t", "--plots", ""),
    ("validate", "m", "--data", "", "-o", "r"),
    ("bench", "m", "-o", ""),
    ("auto", "m", "--max-kl", "0.1", "-o", "out", "--data", "mine.txt", "--data", ""),
    ("leaderboard", ""),
    ("monitor", "log", "--plot", ""),
]


@pytest.mark.parametrize("options", EMPTY, ids=" ".join)
def test_an_empty_path_or_text_is_refused(options: tuple[str, ...], run: Run) -> None:
    """As a path it would be the folder that the user is in, and --overwrite would replace it."""
    given = options[options.index("") - 1]
    of_argument = {"import": "FILE|DIR", "verify": "FOLDER", "leaderboard": "DIR", "-o": "--output"}
    code, out, err = run(*options)
    assert (code, out) == (2, "")
    assert err == f"error: {of_argument.get(given, given)} is empty; was a variable empty?\n"
    assert not list(Path().iterdir())


def test_an_empty_output_does_not_replace_the_folder_one_is_in(run: Run) -> None:
    llmquant.quantize(EXAMPLE, "here", llmquant.load_recipe("rtn-w4g128"))
    before = sorted(Path("here").iterdir())
    with contextlib.chdir("here"):
        rtn = ("--recipe", "rtn-w4g128", "--overwrite")
        code, _, err = run("quantize", EXAMPLE, "-o", "", *rtn)
    assert (code, err) == (2, "error: --output is empty; was a variable empty?\n")
    assert sorted(Path("here").iterdir()) == before


@pytest.mark.parametrize("command", ["quantize", "qat"])
def test_a_log_that_cannot_be_written_is_refused(command: str, run: Run) -> None:
    told = "give a file in a folder that exists"
    needs = ("--data", "d") if command == "qat" else ("--method", "rtn")
    for log, problem in ((".", "is a folder"), ("a/log", "is in a folder that does not exist")):
        code, _, err = run(command, "m", "-o", "out", *needs, "--log", log)
        assert (code, err) == (2, f"error: --log {log} {problem}; {told}\n")


def test_an_interruption_is_told_by_commands_that_keep_nothing(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("llmquant_eval.cli._evaluate", interrupted)
    code, out, err = run("eval", EXAMPLE, "--text", f"file:{EXAMPLE / 'heldout.txt'}", "-q")
    assert (code, out) == (130, "")
    assert err == "interrupted; no incomplete output remains\n"


def test_the_seconds_of_a_run_that_chooses_schemes_are_those_of_all_of_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmquant.cli.commands import quantize

    choose, clock = quantize._allocated, SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now

    def slowly(*given: Any) -> Any:
        clock.now += 30
        return choose(*given)

    monkeypatch.setattr(quantize, "time", clock)
    monkeypatch.setattr(quantize, "_allocated", slowly)
    text = f"file:{EXAMPLE / 'calibration.txt'}"
    small = ("--nsamples", 2, "--seqlen", 32)
    code, out, err = run(
        "quantize",
        EXAMPLE,
        "-o",
        "out",
        "--target-bpw",
        4.5,
        "--calibration",
        text,
        *small,
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["seconds"] == 30


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (("allocate", EXAMPLE, "--target-bpw", "4.5"), "recipe"),
        (("convert", "{packed}", "--to", "gguf"), "GGUF file"),
        (("export", "{packed}", "--to", "gguf"), "GGUF file"),
    ],
    ids=["allocate", "convert", "export"],
)
def test_overwrite_replaces_a_file_of_the_same_kind_only(
    command: tuple[object, ...], kind: str, run: Run
) -> None:
    llmquant.quantize(EXAMPLE, "packed", llmquant.load_recipe("rtn-w4g128"))
    options = [str(o).format(packed="packed") for o in command]
    if options[0] == "allocate":
        options += [
            "--calibration",
            f"file:{EXAMPLE / 'calibration.txt'}",
            "--sensitivity",
            "block",
        ]
        options += ["--nsamples", "2", "--seqlen", "32", "--probe-tokens", "32", "--widths", "4,8"]
    Path("notes").write_text("what I learned\n")
    code, _, err = run(*options, "-o", "notes", "--overwrite")
    assert code == 2, err
    assert f"notes exists and is no {kind} of llmquant's, so it is not written over" in err
    assert Path("notes").read_text() == "what I learned\n"
    for overwrite in ((), ("--overwrite",)):
        code, _, err = run(*options, "-o", "made", *overwrite)
        assert code == 0, err
