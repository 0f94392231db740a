"""`llmquant eval` from the command line to the Report: on models from disk, through the public
API."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import llmquant
from llmquant.errors import (
    CheckpointError,
    LlmquantError,
    QuantizationError,
    SourceError,
    UsageError,
)
from llmquant_eval.cli import register
from llmquant_eval.models.resolve import other_dtype
from llmquant_eval.report.schema import Report, read_report
from llmquant_eval.run.evaluate import evaluate
from llmquant_eval.run.plan import make_plan
from llmquant_eval.run.request import Request

WINDOW = 64


def command_line() -> typer.Typer:
    app = typer.Typer()
    app.callback()(lambda: None)
    register(app)
    return app


def run(*arguments: object) -> Any:
    """The command's result; an error of ours is raised, as llmquant's own entry point would see
    it."""
    outcome = CliRunner().invoke(command_line(), ["eval", *map(str, arguments)])
    if isinstance(outcome.exception, LlmquantError):
        raise outcome.exception
    return outcome


def test_a_candidate_against_its_reference(
    base_model: Path, altered: Callable[..., Path], words: Path, tmp_path: Path
) -> None:
    candidate = altered("coarse", lambda w: (w * 32).round() / 32)
    output = tmp_path / "report.json"
    stages: list[tuple[str, int, int]] = []
    request = Request(
        (str(candidate),), str(words), reference=str(base_model), window=WINDOW, cost=False
    )
    report = evaluate(request, lambda *step: stages.append(step))
    output.write_text(report.to_json(), encoding="utf-8")
    assert read_report(output) == report
    reference, coarse = report.models
    assert [(m.label, m.role) for m in report.models] == [
        ("base", "reference"),
        ("coarse", "candidate"),
    ]
    assert report.protocols == ["ppl/gptq-64", "kl/top-64"]
    assert (report.text.tokens, report.text.windows, report.text.window) == (700, 10, 64)
    assert set(reference.metrics) == {"perplexity"}
    assert set(coarse.metrics) == {
        "perplexity",
        "perplexity_ratio",
        "kl_mean",
        "kl_median",
        "kl_p90",
        "kl_p99",
        "kl_p99.9",
        "kl_max",
        "top1_agreement",
        "rms_delta_p",
    }
    values = {name: m.value for name, m in coarse.metrics.items()}
    assert values["perplexity_ratio"] == pytest.approx(
        values["perplexity"] / reference.metrics["perplexity"].value, rel=1e-9
    )
    assert (
        values["kl_median"]
        <= values["kl_p90"]
        <= values["kl_p99"]
        <= values["kl_p99.9"]
        <= values["kl_max"]
    )
    assert all(m.tokens == 10 * 63 and m.windows == 10 for m in coarse.metrics.values())
    assert reference.weights_sha256 != coarse.weights_sha256
    assert reference.tokenizer_sha256 == coarse.tokenizer_sha256
    assert report.noise_floor is not None
    auto = llmquant.parse_dtype("auto")
    assert (report.settings.dtype, report.settings.dtype_reason) == (auto.name, auto.reason)
    assert report.hardware.instruction_sets == list(llmquant.this_processor().instruction_sets)
    assert report.noise_floor.other_dtype == other_dtype(auto.name)
    assert 0 < report.noise_floor.kl_mean.value < values["kl_mean"]
    assert stages[-1] == ("ppl/gptq-64 and KL", 10, 10)
    assert {stage for stage, _, _ in stages} == {"noise floor", "ppl/gptq-64 and KL"}


def test_the_model_itself_under_another_name_has_no_loss(
    base_model: Path, altered: Callable[..., Path], words: Path
) -> None:
    same = altered("same", lambda w: w)
    request = Request(
        (str(same),), str(words), reference=str(base_model), window=WINDOW, cost=False
    )
    metrics = evaluate(request).models[1].metrics
    assert metrics["perplexity_ratio"].value == 1.0
    assert metrics["kl_max"].value == 0.0
    assert metrics["top1_agreement"].value == 1.0


def test_a_packed_model_is_scored_as_loaded_from_disk(
    base_model: Path, words: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(base_model.parent / "llmcompressor-w4-sym", packed)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(base_model / name, packed / name)
    request = Request(
        (str(packed),),
        str(words),
        reference=str(base_model),
        window=WINDOW,
        dtype="float32",
        cost=False,
    )
    reference, result = evaluate(request).models
    assert reference.kernels == {}
    assert sum(result.kernels.values()) == result.quantized_linears > 0
    assert result.scheme.startswith("W4")
    assert result.bits_per_weight is not None
    assert 4 < result.bits_per_weight < 5
    assert result.bytes_on_disk < reference.bytes_on_disk
    assert result.metrics["kl_mean"].value > 0


def test_without_a_reference_there_is_perplexity_alone(base_model: Path, words: Path) -> None:
    report = evaluate(Request((str(base_model),), str(words), cost=False, max_windows=2))
    assert report.text.window == 256  # the model's context
    assert (report.reference, report.noise_floor, report.protocols) == (
        None,
        None,
        ["ppl/gptq-256"],
    )
    assert set(report.models[0].metrics) == {"perplexity"}


def test_json_is_all_that_stdout_gets(base_model: Path, words: Path) -> None:
    outcome = run(
        base_model, "--text", words, "--window", WINDOW, "--max-windows", 2, "--no-cost", "--json"
    )
    assert outcome.exit_code == 0
    report = Report.from_json(outcome.stdout)
    assert report.text.windows == 2
    assert "━" not in outcome.stderr


def test_the_table_card_and_report_of_one_run_agree(
    base_model: Path, altered: Callable[..., Path], words: Path, tmp_path: Path
) -> None:
    candidate, output = altered("coarse", lambda w: (w * 32).round() / 32), tmp_path / "r.json"
    outcome = run(
        candidate,
        "--reference",
        base_model,
        "--text",
        words,
        "--window",
        WINDOW,
        "--no-cost",
        "--no-noise-floor",
        "--quiet",
        "--card",
        "--output",
        output,
    )
    assert outcome.exit_code == 0
    assert outcome.stderr == ""
    report = read_report(output)
    card = (candidate / "README.md").read_text(encoding="utf-8")
    kl = f"{report.model('coarse').metrics['kl_mean'].value:.4f}"
    assert kl[:5] in outcome.stdout
    assert kl[:5] in card
    assert report.command in card
    assert not (base_model / "README.md").exists()


def test_the_recorded_command_repeats_the_run(
    base_model: Path, words: Path, altered: Callable[..., Path]
) -> None:
    candidate = altered("coarse and spaced", lambda w: (w * 32).round() / 32)
    first = evaluate(
        Request(
            (str(candidate),),
            str(words),
            reference=str(base_model),
            window=WINDOW,
            max_windows=3,
            dtype="float32",
            device="cpu",
            batch_size=2,
            cost=False,
            noise_floor=False,
        )
    )
    program, subcommand, *arguments = shlex.split(first.command)
    assert (program, subcommand) == ("llmquant", "eval")
    again = Report.from_json(run(*arguments, "--json").stdout)
    assert again.command == first.command
    assert [m.metrics for m in again.models] == [m.metrics for m in first.models]


def test_several_protocols_in_one_run(
    base_model: Path, words: Path, altered: Callable[..., Path]
) -> None:
    candidate = altered("coarse", lambda w: (w * 32).round() / 32)
    outcome = run(
        candidate,
        "--reference",
        base_model,
        "--text",
        words,
        "--protocol",
        "ppl/gptq",
        "--protocol",
        "ppl/strided-64-16,ppl/word",
        "--window",
        32,
        "--no-cost",
        "--no-noise-floor",
        "--json",
    )
    report = Report.from_json(outcome.stdout)
    names = ["gptq-32", "strided-64-16", "word-32"]
    assert [p.perplexity for p in report.passes] == [f"ppl/{name}" for name in names]
    assert report.protocols == [
        "ppl/gptq-32",
        "kl/top-32",
        "ppl/strided-64-16",
        "kl/top-strided-64-16",
        "ppl/word-32",
        "kl/top-word-32",
    ]
    assert [(p.windows, p.windows_available, p.scored) for p in report.passes] == [
        (21, 21, 21 * 31), (41, 41, 699), (22, 22, 700),
    ]  # fmt: skip
    metrics = report.model("coarse").metrics
    for name, kind in (
        ("perplexity", "ppl/"),
        ("perplexity_ratio", "ppl/"),
        ("kl_mean", "kl/top-"),
    ):
        assert metrics[name].tokens == 21 * 31
        assert metrics[f"{name}@{kind}strided-64-16"].tokens == 699
    assert {
        metrics["kl_mean"].error_method,
        metrics["kl_mean@kl/top-strided-64-16"].error_method,
    } == {
        "by window",
        "block bootstrap",
    }
    assert metrics["word_perplexity"].protocol == "ppl/word-32"
    assert metrics["kl_mean@kl/top-word-32"].tokens == 700
    parts = report.model("coarse").breakdowns
    assert [(b.protocol, b.by) for b in parts] == [
        (f"kl/top-{name}", by) for name in ("32", *names[1:]) for by in ("confidence", "context")
    ]
    totals = [sum(b.tokens for b in part.buckets) for part in parts]
    assert totals == [21 * 31] * 2 + [699] * 2 + [700] * 2
    again = Report.from_json(run(*shlex.split(report.command)[2:], "--json").stdout)
    assert again.models == report.models


def test_each_protocol_alone_gives_what_it_gives_in_company(base_model: Path, words: Path) -> None:
    def values(protocol: str) -> dict[str, float]:
        request = Request(
            (str(base_model),), str(words), protocol=protocol, cost=False, dtype="float32"
        )
        return {m.protocol: m.value for m in evaluate(request).models[0].metrics.values()}

    together = values("ppl/gptq-32,ppl/strided-64-16")
    assert together == values("ppl/gptq-32") | values("ppl/strided-64-16")


def test_what_the_main_table_has_no_room_for_is_shown_below(base_model: Path, words: Path) -> None:
    outcome = run(
        base_model,
        "--text",
        words,
        "--protocol",
        "ppl/gptq-32,ppl/word-32",
        "--no-cost",
        "--max-windows",
        5,
        "--quiet",
    )
    for part in (
        "ppl/word-32",
        "byte perplexity",
        "bits per byte",
        "ppl/word-32: the first 5 of 22 windows, 160 tokens",
    ):
        assert part in outcome.stdout, part
    assert "block bootstrap" in outcome.stdout  # 5 windows are few


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "llmquant eval a b --text file:t"),
        (
            {
                "reference": "c",
                "protocol": "ppl/word,ppl/gptq-64",
                "cache": "my cache",
                "cache_form": "top-9",
            },
            "llmquant eval a b --text file:t --reference c --protocol ppl/word,ppl/gptq-64 --cache 'my cache' --cache-form top-9",
        ),
        (
            {
                "tasks": "x=f.jsonl,y",
                "limit": 3,
                "include_path": "t",
                "log_samples": "s",
                "tokenizer": "z",
            },
            "llmquant eval a b --text file:t --tokenizer z --tasks x=f.jsonl,y --include-path t --limit 3 "
            "--log-samples s",
        ),
        (
            {"reference": "a model", "window": 64},
            "llmquant eval a b --text file:t --reference 'a model' --window 64",
        ),
        (
            {"max_windows": 3, "batch_size": 2},
            "llmquant eval a b --text file:t --max-windows 3 --batch-size 2",
        ),
        (
            {"cost": False, "noise_floor": False},
            "llmquant eval a b --text file:t --no-cost --no-noise-floor",
        ),
        (
            {"dtype": "float32", "kernel": "dense"},
            "llmquant eval a b --text file:t --dtype float32 --kernel dense",
        ),
    ],
    ids=[
        "defaults left out",
        "protocols and cache",
        "tasks",
        "quoted",
        "numbers",
        "switches",
        "names",
    ],
)
def test_the_command_line_of_a_request(options: dict[str, Any], expected: str) -> None:
    assert Request(("a", "b"), "file:t", **options).command() == expected


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        pytest.param(
            ["--window", 257],
            UsageError,
            "257 tokens is longer than the 256 that base takes",
            id="context",
        ),
        pytest.param(["--window", 1], UsageError, "nothing to predict", id="window of one"),
        pytest.param(
            ["--protocol", "ppl/words"], UsageError, "'ppl/words' is not known", id="protocol"
        ),
        pytest.param(
            ["--protocol", "ppl/gptq-64", "--window", 64], UsageError, "give one of them", id="both"
        ),
        pytest.param(
            ["--protocol", "ppl/gptq,ppl/gptq-256"],
            UsageError,
            "one protocol twice",
            id="protocol twice",
        ),
        pytest.param(
            ["--protocol", "ppl/word-300"],
            UsageError,
            "longer than the 256",
            id="context of a protocol",
        ),
        pytest.param(["--max-windows", 0], UsageError, "--max-windows 0", id="no windows"),
        pytest.param(["--batch-size", 0], UsageError, "--batch-size 0", id="no batch"),
        pytest.param(["--dtype", "int4"], UsageError, "dtype 'int4' does not exist", id="dtype"),
        pytest.param(
            ["--device", "abacus"], UsageError, "device abacus cannot be used", id="device"
        ),
        pytest.param(["--reference", "{base}"], UsageError, "the only model", id="reference alone"),
        pytest.param(
            ["--reference", "{base}/."], UsageError, "given twice", id="one model, two spellings"
        ),
        pytest.param(["--text", "{empty}"], SourceError, "empty", id="empty text"),
        pytest.param(["--text", "{short}"], SourceError, "less than one window", id="short text"),
        pytest.param(["--text", "file:no/such"], SourceError, "no/such", id="no text"),
        pytest.param(
            ["--output", "no/such/r.json"], UsageError, "does not exist", id="output folder"
        ),
        pytest.param(
            ["--text", "{short}", "--output", "{short}"],
            UsageError,
            "would be overwritten",
            id="output the text",
        ),
        pytest.param(
            ["--card", "someone/some-model"],
            UsageError,
            "some-model is not one",
            id="card of a hub name",
        ),
        pytest.param(["{empty_folder}"], CheckpointError, "nothing-here", id="not a model"),
    ],
)
def test_misuse(
    options: list[str],
    error: type[LlmquantError],
    message: str,
    base_model: Path,
    words: Path,
    tmp_path: Path,
) -> None:
    (tmp_path / "empty.txt").write_text("", encoding="utf-8")
    (tmp_path / "short.txt").write_text("w3 w4 w5", encoding="utf-8")
    (tmp_path / "nothing-here").mkdir()
    names = {"base": base_model, "empty": tmp_path / "empty.txt", "short": tmp_path / "short.txt",
             "empty_folder": tmp_path / "nothing-here"}  # fmt: skip
    text = [] if "--text" in options else ["--text", words]
    with pytest.raises(error, match=message):
        run(base_model, *text, "--no-cost", *(str(o).format(**names) for o in options))


def test_tokenizers_that_differ_are_refused_before_a_weight_is_read(
    base_model: Path, words: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(base_model, other)
    (other / "model.safetensors").unlink()
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["w10"], vocabulary["w11"] = vocabulary["w11"], vocabulary["w10"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UsageError, match="other does not tokenize the text as base does"):
        make_plan(Request((str(other),), str(words), reference=str(base_model), window=WINDOW))


def test_a_model_of_nan_is_named(
    base_model: Path, altered: Callable[..., Path], words: Path
) -> None:
    sick = altered("sick", lambda w: torch.full_like(w, torch.nan))
    with pytest.raises(QuantizationError, match="sick gave a NaN"):
        evaluate(
            Request((str(sick),), str(words), reference=str(base_model), window=WINDOW, cost=False)
        )


def test_the_noise_floors_dtype() -> None:
    assert [other_dtype(d) for d in ("bfloat16", "float16", "float32")] == [
        "float32",
        "float32",
        "bfloat16",
    ]


def test_registering_the_command_loads_no_torch() -> None:
    code = (
        "import sys, typer; from llmquant_eval.cli import register; app = typer.Typer(); register(app); "
        "print([m for m in ('torch', 'transformers', 'numpy', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.quality
def test_tiny_llama_has_its_known_perplexity(tiny_llama: Path) -> None:
    """fp32, first 120 windows of 512: 37.336 by a plain transformers loop over the same windows."""
    text = f"file:{tiny_llama / 'heldout.txt'}"
    request = Request(
        (str(tiny_llama),), text, window=512, max_windows=120, dtype="float32", cost=False
    )
    report = evaluate(request)
    metric = report.models[0].metrics["perplexity"]
    assert report.text.tokens == 124_008
    assert metric.value == pytest.approx(37.336, abs=0.005)
    assert (metric.tokens, metric.windows, metric.protocol) == (120 * 511, 120, "ppl/gptq-512")
