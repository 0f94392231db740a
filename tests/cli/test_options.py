"""Options that commands share: the same words everywhere, the same refusals, and one effect."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

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
    assert "1 thread; float32 because calibration passes are float32" in told
    _, out, _ = run("plan", model, "--method", "rtn", "--group-size", 32)
    told = " ".join(out.split())
    assert "quantizing float32 on " in told
    auto = llmquant.parse_dtype("auto")
    assert f"running {auto.name} on cpu" in told
    assert str(auto.reason) in told
