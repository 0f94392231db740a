"""The command line as a user meets it: what it prints where, its exit codes, and an error in words
for every mistake.

Commands run in this process through ``main``, so an exception that would be a traceback fails the
test; what only a real process shows (signals, pipes, what ``--help`` imports) runs in one.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from children import Ended, Run, heeding_interrupts, interrupts
from safetensors.torch import load_file, save_file

from llmquant.checkpoint.reader import SINGLE, CheckpointReader
from llmquant.checkpoint.writer import CheckpointWriter
from llmquant.cli.method import parse_method
from llmquant.cli.sizes import parse_size
from llmquant.errors import CheckpointError, ProofError, UsageError
from llmquant.recipe import Recipe, load_recipe

ROOT = Path(__file__).resolve().parents[2]


RTN = ("--method", "rtn", "--group-size", "32")
GPTQ = ("--group-size", "32", "--nsamples", "4", "--seqlen", "32")


# --- what is printed where --------------------------------------------------


def test_quantize_tells_people_what_it_did(run: Run, model: Path, text: Path) -> None:
    ran = run("quantize", model, "-o", "out", *GPTQ, "--calibration", f"file:{text}")
    assert ran.code == 0
    assert f"calibration  file:{text}" in ran.err
    assert re.search(r"windows  4 of \d+ available, exactly 32 tokens each", ran.err)
    for fact in (
        "down_proj  W4 g32 sym      2",
        "left alone  lm_head",
        "4.500 bits per quantized weight",
        "proved  ",
    ):
        assert fact in ran.out
    assert load_recipe("out/recipe.yaml").calibration.nsamples == 4


def test_json_is_one_object_and_nothing_else(run: Run, model: Path, text: Path) -> None:
    ran = run("quantize", model, "-o", "out", *GPTQ, "--calibration", f"file:{text}", "--json")
    assert ran.code == 0
    assert ran.out.count("\n") == 1
    told = json.loads(ran.out)
    assert ran.err == ""
    assert (told["path"], told["bits_per_weight"], len(told["modules"])) == ("out", 4.5, 14)
    assert told["recipe"] == load_recipe("out/recipe.yaml").model_dump(mode="json")
    assert told["calibration"]["windows"] == 4
    for command in (
        ("inspect", "out"),
        ("inspect", "out", "--verify"),
        ("plan", model, "--group-size", "32"),
        ("recipes",),
    ):
        answered = run(*command, "--json")
        assert (answered.code, answered.err, answered.out.count("\n")) == (0, "", 1)
        assert isinstance(json.loads(answered.out), dict)


TRAINED = """
qat: {size: codes, steps: 2, batch_size: 2, micro_batch: 1, seqlen: 32, heldout: 2, checks: 1}
"""


def test_a_recipe_that_trains_is_planned_as_one_and_says_nothing_but_its_result(
    run: Run, model: Path, text: Path
) -> None:
    Path("short.yaml").write_text(TRAINED)
    command = ("--recipe", "short.yaml", *GPTQ, "--calibration", f"file:{text}")
    planned = json.loads(run("plan", model, *command, "--json").out)
    weights = sum(m["shape"][0] * m["shape"][1] for m in planned["modules"])
    assert planned["training"] == {"size": "codes", "steps": 2, "bytes": 20 * weights}
    said = run("plan", model, *command).out
    assert re.search(r"training +2 steps follow, which memory, disk and time here leave out", said)
    assert json.loads(run("plan", model, *GPTQ, "--json").out)["training"] is None
    ran = run("quantize", model, "-o", "out", *command, "--json")
    assert (ran.code, "Loading" in ran.err) == (0, False)
    assert json.loads(ran.out)["qat"]["steps"] == 2
    again = run("verify", "out", "--rerun", "--model", model, "--quiet")
    assert (again.code, again.err) == (0, "")


TUNED = ("--method", "gptq+tune", "--recipe", "short.yaml", *GPTQ)
SHORT = "tune: {steps: 4, checks: 2, lr: 0.01, batch_size: 2}\n"


def test_a_tuned_run_tells_of_every_block_and_repeats_to_the_byte(
    run: Run, model: Path, text: Path
) -> None:
    Path("short.yaml").write_text(SHORT)
    ran = run("quantize", model, "-o", "one", *TUNED, "--calibration", f"file:{text}")
    assert ran.code == 0
    assert re.search(r"tuned +block error before +after +ratio +kept step", ran.out)
    assert re.search(r"model\.layers\.1 .* \d of 4\n", ran.out)
    told = json.loads(
        run("quantize", model, "-o", "two", *TUNED, "--calibration", f"file:{text}", "--json").out
    )
    assert list(told["tuned"]) == ["model.layers.0", "model.layers.1"]
    for name in (SINGLE, "manifest.json", "recipe.yaml"):
        assert Path("one", name).read_bytes() == Path("two", name).read_bytes()
    kept = json.loads(Path("one", "manifest.json").read_text())["tuned"]
    for name, block in told["tuned"].items():
        assert block["after"] <= block["before"]
        assert kept[name] == {k: v for k, v in block.items() if k != "seconds"}


@pytest.mark.parametrize(
    ("method", "recipe", "steps", "tuned"),
    [
        pytest.param("gptq+tune", SHORT, "gptq+tune", 4, id="the recipe's settings"),
        pytest.param("rtn+tune", "", "rtn+tune", 200, id="the defaults where the recipe has none"),
        pytest.param("gptq", SHORT, "gptq", None, id="off though the recipe has it"),
    ],
)
def test_the_method_switches_tuning(
    method: str, recipe: str, steps: str, tuned: int | None, tmp_path: Path
) -> None:
    (tmp_path / "r.yaml").write_text(recipe)
    chosen = parse_method(method).applied_to(load_recipe(tmp_path / "r.yaml"))
    assert (chosen.steps, chosen.tune.steps if chosen.tune else None) == (steps, tuned)


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("smooth", "smooth+rtn"),
        ("smooth+gptq", "smooth+gptq"),
        ("smoothquant+rtn+tune", "smooth+rtn+tune"),
        ("awq+gptq", None),
        ("rtn", "rtn"),
    ],
)
def test_the_method_switches_smoothing(method: str, steps: str | None) -> None:
    int8 = {
        "weights.bits": 8,
        "weights.group_size": -1,
        "weights.activations": "int8-dynamic",
        "smooth": {"alpha": 0.7},
    }
    chosen = parse_method(method).applied_to(Recipe().updated(int8))
    assert chosen.steps == (steps or method)
    assert (chosen.smooth.alpha if chosen.smooth else None) == (0.7 if "smooth" in method else None)


def test_awq_tells_what_was_scaled_and_what_was_left_alone(
    run: Run, model: Path, text: Path
) -> None:
    options = ("--method", "awq+gptq", *GPTQ, "--calibration", f"file:{text}")
    ran = run("quantize", model, "-o", "one", *options)
    assert ran.code == 0
    table = ran.out.partition("scaled for")[2].splitlines()[1:]
    assert table[0].startswith("self_attn.q_proj, self_attn.k_proj,")
    assert "down_proj" in "".join(table[:6])
    told = json.loads(run("quantize", model, "-o", "two", *options, "--json").out)
    assert told["recipe"]["awq"] == {"grid": 20, "duo_scaling": "both", "steps": 16}
    kept = json.loads(Path("one", "manifest.json").read_text())["scaled"]
    assert kept == {
        b: [{k: v for k, v in p.items() if k != "seconds"} for p in pairs]
        for b, pairs in told["scaled"].items()
    }
    assert [len(pairs) for pairs in kept.values()] == [4, 4]
    assert Path("one", SINGLE).read_bytes() == Path("two", SINGLE).read_bytes()
    assert run("inspect", "one", "--verify").code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("quantize {m} -o x --calibration a --calibration b", "--calibration is given twice"),
        ("eval {m} --text file:a --text=file:b --text file:c", "--text is given 3 times"),
        ("eval {m} --reference a --reference {m}", "--reference is given twice"),
        ("validate {m} --data a --data b -o c", "--data is given twice"),
        ("quantize {m} -o x --method gptq --bits 3 --method rtn --bits 4", None),
        ("quantize {m} -o x --method rtn --ignore lm_head --ignore lm_head", None),
    ],
)
def test_an_option_of_one_text_or_model_is_given_once(
    run: Run, model: Path, words: str, says: str | None
) -> None:
    """The last would have been taken, and the others dropped without a word."""
    done = run(*words.format(m=model).split())
    told = f"{says} and takes one value; give it once" in done.said
    assert (done.code, told) == ((0, False) if says is None else (2, True)), done.err


def test_quiet_says_nothing(run: Run, model: Path, text: Path) -> None:
    assert run(
        "quantize", model, "-o", "out", *GPTQ, "--calibration", f"file:{text}", "--quiet"
    ) == Ended(0, "", "")
    assert (Path("out") / SINGLE).is_file()


def test_a_warning_is_said_even_so(run: Run, model: Path) -> None:
    ran = run("quantize", model, "-o", "out", *RTN, "--bits", "3", "--quiet")
    assert (ran.code, ran.out) == (0, "")
    assert ran.err.startswith(
        "warning: vLLM on a CPU will refuse this model: it has no kernel for 2 or 3 bits"
    )


def test_the_plan_is_the_result(run: Run, model: Path) -> None:
    plan = json.loads(run("plan", model, "--group-size", "32", "--json").out)
    result = json.loads(run("quantize", model, "-o", "out", *RTN, "--json").out)
    assert plan["bytes_on_disk"] == Path("out", SINGLE).stat().st_size
    assert plan["bits_per_weight"] == result["bits_per_weight"]
    assert plan["skipped"] == result["skipped"]
    assert [m["name"] for m in plan["modules"]] == sorted(m["name"] for m in result["modules"])


def test_inspect_counts_what_is_there(run: Run, quantized: Path) -> None:
    ran = run("inspect", quantized, "--verify", "--modules")
    assert ran.code == 0
    for fact in (
        "14 of 15 quantized",
        "4.500 bits per quantized weight",
        "every file and every packed weight",
        "sha256",
    ):
        assert fact in ran.out
    assert ran.out.count("W4 g32 sym") == 1 + 14
    assert run("inspect", quantized).out.count("W4 g32 sym") == 1 + 7


def test_inspect_finds_a_tampered_file(run: Run, tampered: Path) -> None:
    data = bytearray((tampered / SINGLE).read_bytes())
    data[-1] ^= 1
    (tampered / SINGLE).write_bytes(data)
    assert run("inspect", tampered).code == 0
    ran = run("inspect", tampered, "--verify")
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.startswith(f"error: {tampered / SINGLE} is not the file that was written")


def test_recipes_are_listed_and_shown(run: Run) -> None:
    listed = run("recipes")
    assert re.search(r"^gptq-w4g128 +GPTQ with static act-order, INT4", listed.out, re.MULTILINE)
    shown = run("recipes", "gptq-w4g128")
    Path("r.yaml").write_text(shown.out, encoding="utf-8")
    assert load_recipe("r.yaml") == load_recipe("gptq-w4g128")
    assert json.loads(run("recipes", "gptq-w4g128", "--json").out) == load_recipe(
        "gptq-w4g128"
    ).model_dump(mode="json")


def test_generate_replies(run: Run, quantized: Path) -> None:
    ran = run("generate", quantized, "hello", "--max-new-tokens", "5")
    assert ran.code == 0
    assert re.fullmatch(
        r"\d tokens? in \d+\.\d s; \w+ on \w+(:\d+)?, \d+ threads?, kernel \w+ for 14 linears; \w+ because .+\n",
        ran.err,
    )
    assert ran.out.strip()
    told = json.loads(run("generate", quantized, "hello", "--max-new-tokens", "5", "--json").out)
    assert told["new_tokens"] <= 5
    assert told["text"].strip() == ran.out.strip()
    assert sum(told["kernels"].values()) == 14
    assert told["computing"]["dtype_reason"]
    raw = json.loads(
        run("generate", quantized, "hello", "--raw", "--max-new-tokens", "5", "--json").out
    )
    assert raw["prompt_tokens"] < told["prompt_tokens"]


def test_a_sampled_reply_is_its_seeds(run: Run, quantized: Path) -> None:
    def reply(seed: int) -> str:
        ran = run(
            "generate",
            quantized,
            "hello",
            "--max-new-tokens",
            8,
            "--temperature",
            1,
            "--seed",
            seed,
            "--json",
        )
        return str(json.loads(ran.out)["text"])

    assert reply(1) == reply(1)
    assert len({reply(seed) for seed in range(4)}) > 1


def test_settings_of_the_folder_change_no_reply(run: Run, quantized: Path, tmp_path: Path) -> None:
    """No penalty and no filter that the options do not name, nor transformers' own top-k of 50."""
    told = Path(shutil.copytree(quantized, tmp_path / "told"))
    settings = told / "generation_config.json"
    strange = {"repetition_penalty": 9.0, "do_sample": True, "top_k": 1, "num_beams": 2}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | strange))
    for options in ((), ("--temperature", 1.5, "--seed", 3)):
        plain, other = (
            run("generate", folder, "hello", "--max-new-tokens", 12, *options)
            for folder in (quantized, told)
        )
        assert (other.code, other.out) == (0, plain.out), options


def test_positions_of_a_text_part_are_counted() -> None:
    from transformers import Gemma3Config

    from llmquant.cli.commands.generate import _refuse_too_long

    config = Gemma3Config(text_config={"max_position_embeddings": 8})
    with pytest.raises(UsageError, match="more than the model's 8 positions"):
        _refuse_too_long(4, 5, config)


def test_the_prompt_can_come_from_a_pipe(
    run: Run, quantized: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello"), encoding="utf-8"))
    piped = run("generate", quantized, "-", "--max-new-tokens", "5")
    named = run("generate", quantized, "hello", "--max-new-tokens", "5")
    assert (piped.code, piped.out) == (0, named.out)  # stderr has the time


@pytest.mark.parametrize("options", [(), ("--temperature", "1")], ids=["greedy", "drawn"])
def test_a_model_of_no_numbers_makes_no_text(
    run: Run, model: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    """Of NaN the likeliest token is a token too."""
    broken = Path(shutil.copytree(model, tmp_path / "nan"))
    tensors = load_file(broken / SINGLE)
    tensors["model.layers.0.mlp.up_proj.weight"][:] = float("nan")
    save_file(tensors, broken / SINGLE, metadata={"format": "pt"})
    ran = run("generate", broken, "hello", "--max-new-tokens", "5", *options)
    assert (ran.code, ran.out) == (1, "")
    assert "computed the logit nan after" in ran.said
    assert "its weights are damaged" in ran.said


def test_names_with_brackets_and_colons_are_printed_as_they_are(
    run: Run, model: Path, text: Path
) -> None:
    """rich would take [/b] for markup and :train: for a locomotive."""
    source = Path(shutil.copyfile(text, "x:train:[b].txt")).resolve()
    ran = run(
        "quantize",
        model,
        "-o",
        "a[/b]:train:",
        *GPTQ,
        "--calibration",
        f"file:{source}",
        "--ignore",
        "[!m]*",
    )
    assert ran.code == 0
    assert f"calibration  file:{source}" in ran.err
    assert "a[/b]:train:" in ran.out
    assert "a[/b]:train:" in run("inspect", "a[/b]:train:").out


# --- options over recipes ---------------------------------------------------

FILE = """
method: rtn
weights: {bits: 8, group_size: 32}
ignore: [lm_head, o_proj]
seed: 3
"""


def recipe_after(run: Run, model: Path, *options: str) -> Recipe:
    Path("r.yaml").write_text(FILE, encoding="utf-8")
    ran = run("quantize", model, "-o", "out", "--recipe", "r.yaml", *options, "--json")
    assert ran.code == 0, ran.err
    return load_recipe("out/recipe.yaml")


OPTIONS = [
    ((), {}),
    (("--bits", "4"), {"weights.bits": 4}),
    (("--asym", "--group-size", "-1"), {"weights.symmetric": False, "weights.group_size": -1}),
    (("--seed", "5"), {"seed": 5}),
    (("--ignore", "down_proj"), {"ignore": ("lm_head", "o_proj", "down_proj")}),
    (("--include", "*.mlp.*"), {"include": ("*.mlp.*",)}),
    (
        ("--include", "lm_head", "--include", "o_proj"),
        {"include": ("lm_head", "o_proj"), "ignore": ()},
    ),
    (("--format", "gptq_v2"), {"format": "gptq_v2"}),
]


@pytest.mark.parametrize(
    ("options", "changes"), OPTIONS, ids=[" ".join(o) or "none" for o, _ in OPTIONS]
)
def test_options_win_over_the_recipe_file(
    run: Run, model: Path, options: tuple[str, ...], changes: dict[str, Any]
) -> None:
    used = recipe_after(run, model, *options)
    assert used == load_recipe("r.yaml").updated(changes)


def test_naming_the_head_quantizes_it(run: Run, model: Path) -> None:
    told = json.loads(
        run(
            "quantize", model, "-o", "out", *RTN, "--include", "*", "--include", "lm_head", "--json"
        ).out
    )
    assert len(told["modules"]) == 15
    assert "lm_head.weight" not in CheckpointReader("out")


# --- mistakes ---------------------------------------------------------------

Q = ("quantize", "{m}", "-o", "out")
MISTAKES = [
    ("no output", ("quantize", "{m}"), 2, "Missing option '--output'"),
    ("unknown option", (*Q, "--bogus"), 2, "No such option: --bogus"),
    ("unknown command", ("quantise", "{m}"), 2, "No such command 'quantise'"),
    (
        "tune alone",
        (*Q, "--method", "tune"),
        2,
        "'tune' is not one of rtn, rtn+tune, gptq, gptq+tune, awq+rtn",
    ),
    (
        "bits of embeddings that there are not",
        (*Q, "--embeddings", "3"),
        2,
        "Invalid value for '--embeddings': '3' is not one of '8', '4', 'none'",
    ),
    ("tune twice", (*Q, "--method", "gptq+tune+tune"), 2, "'gptq+tune+tune' is not one of"),
    (
        "tune without text",
        (*Q, "--method", "rtn+tune", "--group-size", "32"),
        2,
        "method rtn+tune needs a calibration text",
    ),
    (
        "unknown method",
        (*Q, "--method", "magic"),
        2,
        "'magic' is not one of rtn, rtn+tune, gptq, gptq+tune, awq+rtn",
    ),
    (
        "smooth without int8",
        (*Q, "--method", "smooth+rtn"),
        2,
        "no linear has any; set weights.activations: int8-dynamic",
    ),
    ("bits a word", (*Q, "--bits", "four"), 2, "Invalid value for '--bits'"),
    ("5 bits", (*Q, "--bits", "5"), 2, "bits=5 is not supported; choose one of 2, 3, 4, 8"),
    ("group of 0", (*Q, "--group-size", "0"), 2, "group_size=0 must be a positive divisor"),
    (
        "group of 48",
        (*Q, "--method", "rtn", "--group-size", "48"),
        2,
        "group_size=48 does not divide its 64 input columns",
    ),
    (
        "group of 128",
        (*Q, "--method", "rtn", "--group-size", "128"),
        2,
        "sizes that do: 8, 16, 32, or -1",
    ),
    (
        "no calibration",
        (*Q, "--group-size", "32"),
        2,
        "method gptq needs a calibration text: --calibration file:PATH",
    ),
    ("no such text", (*Q, *GPTQ, "--calibration", "file:nope"), 2, "nope cannot be read"),
    (
        "no such scheme",
        (*Q, *GPTQ, "--calibration", "zip:nope"),
        2,
        "is neither an existing file nor a source",
    ),
    ("empty text", (*Q, *GPTQ, "--calibration", "file:{empty}"), 2, "contains no row of text"),
    (
        "too little text",
        (
            *Q,
            "--group-size",
            "32",
            "--calibration",
            "file:{t}",
            "--nsamples",
            "9999",
            "--seqlen",
            "32",
        ),
        2,
        "windows",
    ),
    (
        "window too long",
        (*Q, "--group-size", "32", "--calibration", "file:{t}", "--seqlen", "4096"),
        2,
        "128",
    ),
    ("no samples", (*Q, "--nsamples", "0"), 2, "calibration.nsamples"),
    (
        "seed below 0",
        (*Q, *RTN, "--seed", "-1"),
        2,
        "seed: Input should be greater than or equal to 0",
    ),
    (
        "seed beyond int64",
        (*Q, *RTN, "--seed", "9" * 30),
        2,
        "seed: Input should be less than or equal to",
    ),
    ("eval text alone", (*Q, *RTN, "--eval-text", "file:{t}"), 2, "--eval-text file:"),
    (
        "order of rtn",
        (*Q, *RTN, "--act-order", "group"),
        2,
        "--act-order applies only to GPTQ, but the method is rtn",
    ),
    (
        "order of one group",
        (*Q, "--act-order", "group", "--group-size", "-1"),
        2,
        "act_order: group needs a group size",
    ),
    ("unknown dtype", (*Q, *RTN, "--dtype", "int4"), 2, "dtype 'int4' does not exist; choose auto"),
    ("unknown device", (*Q, *RTN, "--device", "toaster"), 2, "device toaster cannot be used here"),
    ("meta device", (*Q, *RTN, "--device", "meta"), 2, "device meta holds no numbers"),
    ("tiny shards", (*Q, *RTN, "--max-shard-size", "5"), 2, "must be at least 1000000"),
    (
        "include nothing",
        (*Q, *RTN, "--include", "nope"),
        2,
        "pattern 'nope' matches none of the model's 15 linears",
    ),
    ("ignore nothing", (*Q, *RTN, "--ignore", "nope"), 2, "pattern 'nope' matches none"),
    ("ignore all", (*Q, *RTN, "--ignore", "*"), 2, "the recipe selects none"),
    ("empty pattern", (*Q, *RTN, "--include", ""), 2, "a module pattern is empty"),
    ("half a fused layer", (*Q, *RTN, "--ignore", "q_proj"), 2, "engines fuse these linears"),
    (
        "unknown format",
        (*Q, *RTN, "--format", "zip"),
        2,
        "format 'zip' does not exist; choose one of compressed-tensors",
    ),
    (
        "layout cannot hold",
        (*Q, *RTN, "--format", "awq", "--bits", "3"),
        2,
        "format awq cannot hold W3 g32 sym",
    ),
    (
        "no such recipe",
        (*Q, "--recipe", "nope"),
        2,
        "no recipe 'nope': not a file, and the shipped ones are",
    ),
    ("recipe a folder", (*Q, "--recipe", "{m}"), 2, "not a file, and the shipped ones are"),
    ("recipe with a typo", (*Q, "--recipe", "{typo}"), 2, "wieghts: there is no such key"),
    ("output taken", ("quantize", "{m}", "-o", "{q}", *RTN), 2, "already exists and is not empty"),
    (
        "output the model",
        ("quantize", "{m}", "-o", "{m}", *RTN, "--overwrite"),
        2,
        "is the model itself",
    ),
    ("output a file", ("quantize", "{m}", "-o", "{t}", *RTN), 2, "is a file; choose a folder"),
    ("output in a file", ("quantize", "{m}", "-o", "{t}/out", *RTN), 2, "is a file, so"),
    (
        "output no model",
        ("quantize", "{m}", "-o", "{folder}", *RTN, "--overwrite"),
        2,
        "is not a model folder",
    ),
    (
        "quantized twice",
        ("quantize", "{q}", "-o", "out", *RTN),
        2,
        "is already quantized (compressed-tensors)",
    ),
    (
        "model a file",
        ("quantize", "{m}/config.json", "-o", "out", *RTN),
        2,
        "is a file; give the model folder",
    ),
    (
        "model misspelt",
        ("quantize", "no such model", "-o", "out", *RTN),
        2,
        "neither a folder nor a hub name",
    ),
    (
        "model not there",
        ("quantize", "org/nope-nope", "-o", "out", *RTN),
        2,
        "org/nope-nope is no folder here",
    ),
    ("model empty", ("quantize", "", "-o", "out", *RTN), 2, "was a variable empty?"),
    (
        "model at nobody's",
        ("quantize", "~nobody-x/m", "-o", "out", *RTN),
        2,
        "neither a folder nor a hub name",
    ),
    (
        "model no model",
        ("quantize", "{folder}", "-o", "out", *RTN),
        2,
        "config.json is missing; is",
    ),
    ("plan: quantized", ("plan", "{q}"), 2, "is already quantized (compressed-tensors)"),
    ("plan: indivisible", ("plan", "{m}", "--group-size", "128"), 2, "does not divide"),
    ("inspect: no model", ("inspect", "{folder}"), 2, "config.json is missing"),
    (
        "inspect: no record",
        ("inspect", "{m}", "--verify"),
        2,
        "has no manifest.json, so it cannot be checked",
    ),
    ("recipes: unknown", ("recipes", "nope"), 2, "no recipe 'nope'"),
    ("generate: no prompt", ("generate", "{q}", "  "), 2, "the prompt is empty"),
    ("generate: bytes", ("generate", "{q}", "\udcff"), 2, "the prompt is not UTF-8 text"),
    (
        "generate: too long",
        ("generate", "{q}", "hello", "--max-new-tokens", "1000"),
        2,
        "more than the model's 128 positions",
    ),
    (
        "generate: kernel",
        ("generate", "{q}", "hello", "--kernel", "warp", "--max-new-tokens", "1"),
        2,
        "kernel 'warp' does not",
    ),
    (
        "generate: seed",
        ("generate", "{q}", "hello", "--seed", "9" * 30),
        2,
        "Invalid value for '--seed'",
    ),
    (
        "generate: no tokenizer",
        ("generate", "{mute}", "hello"),
        2,
        "has no tokenizer that transformers can read",
    ),
    (
        "generate: bad template",
        ("generate", "{untold}", "hello"),
        2,
        "chat template cannot be used",
    ),
    (
        "convert: no layout",
        ("convert", "{q}", "--to", "zip", "-o", "out"),
        2,
        "--to 'zip' does not exist; choose one of compressed-tensors, int-quantized, gptq, gptq_v2, awq, dense, gguf",
    ),
    (
        "convert: dense source",
        ("convert", "{m}", "--to", "gptq", "-o", "out"),
        2,
        "is not quantized",
    ),
]


@pytest.fixture(scope="session")
def places(
    model: Path, quantized: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """What the table calls {m}, {q}, {t} …"""
    made = tmp_path_factory.mktemp("places")
    (made / "folder").mkdir()
    (made / "folder" / "thesis.tex").write_text("", encoding="utf-8")
    (made / "empty.txt").write_text(" \n", encoding="utf-8")
    (made / "typo.yaml").write_text("wieghts: {bits: 4}", encoding="utf-8")
    shutil.copytree(model, made / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (made / "mute" / name).unlink()
    shutil.copytree(model, made / "untold")
    (made / "untold" / "chat_template.jinja").write_text("{% if %}", encoding="utf-8")
    named = {name: made / name for name in ("folder", "mute", "untold")}
    return {
        "m": model,
        "q": quantized,
        "t": text,
        "empty": made / "empty.txt",
        "typo": made / "typo.yaml",
        **named,
    }


@pytest.mark.parametrize(
    ("args", "code", "words"), [pytest.param(*row[1:], id=row[0]) for row in MISTAKES]
)
def test_a_mistake_is_told_in_words(
    run: Run, places: dict[str, Path], args: tuple[str, ...], code: int, words: str
) -> None:
    ran = run(*(a if not a.startswith("{") else a.format(**places) for a in filled(args, places)))
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert words in ran.err
    assert "Traceback" not in ran.err
    assert "Error:" in ran.err or (ran.err.startswith("error: ") and ran.err.endswith("\n"))
    assert not any(Path.cwd().iterdir())


def filled(args: tuple[str, ...], places: dict[str, Path]) -> list[str]:
    """The row with its places put in."""
    for name, path in places.items():
        args = tuple(a.replace(f"{{{name}}}", str(path)) for a in args)
    return list(args)


def test_a_full_disk_is_told_in_words_and_the_same_command_continues(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> NoReturn:
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patched:
        patched.setattr("llmquant.checkpoint.shards.ShardWriter.finish", full)
        ran = run("quantize", model, "-o", "a/b/out", *RTN)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err[ran.err.index("error:") :] == (
        f"error: writing to {Path.cwd()}/a/b/.out.partial failed: No space left on device; free some space and run again: 2 of 2 "
        "blocks are saved next to out; run the same command to resume, or add --restart to start over; up to 1 MB more are "
        f"needed in {Path.cwd()}/a/b\n"
    )
    ran = run("quantize", model, "-o", "a/b/out", *RTN, "--json")
    assert (ran.code, json.loads(ran.out)["resumed_blocks"]) == (0, 2)
    assert sorted(p.name for p in Path("a/b").iterdir()) == ["out", "out.quantize.log.jsonl"]


def test_a_failed_proof_is_told_in_words(
    run: Run, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = CheckpointWriter.finish_weights

    def corrupt(self: CheckpointWriter) -> None:
        finish(self)
        data = bytearray((self.partial / SINGLE).read_bytes())
        data[-1] ^= 1
        (self.partial / SINGLE).write_bytes(data)

    monkeypatch.setattr(CheckpointWriter, "finish_weights", corrupt)
    ran = run("quantize", model, "-o", "out", *RTN)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.splitlines()[-1].startswith("error: ")
    assert [p.name for p in Path.cwd().iterdir()] == ["out.quantize.log.jsonl"]


# --- what only a process shows ----------------------------------------------


def process(*args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    code = "from llmquant.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        text=True,
        capture_output=True,
        check=False,
        **options,
    )


def test_help_does_not_pay_for_torch() -> None:
    code = (
        "import sys\nfrom llmquant.cli import main\nsys.argv = ['llmquant', 'quantize', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'datasets'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert "--group-size" in ran.stdout


def test_a_plan_does_not_wait_for_the_library_of_datasets(model: Path) -> None:
    code = (
        f"import sys\nfrom llmquant.cli import main\nsys.argv = ['llmquant', 'plan', {str(model)!r}, '--group-size', '32']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(sorted({'datasets', 'pandas', 'pyarrow'} & sys.modules.keys()))"
    )
    ran = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"


def test_a_closed_pipe_and_a_full_stdout_are_no_tracebacks() -> None:
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        ran = subprocess.run(
            [sys.executable, "-c", "from llmquant.cli import main; main()", "recipes"],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert "Traceback" not in ran.stderr
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-c", "from llmquant.cli import main; main()", "recipes"],
        stdout=write, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(write)
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("closed", "words"),
    [
        ("<&-", "chat {model}"),
        (">&-", "inspect {model}"),
        ("2>&-", "plan /nowhere"),
        ("<&- >&- 2>&-", "recipes"),
    ],
    ids=["stdin", "stdout", "stderr", "all"],
)
def test_closed_streams_are_no_tracebacks(model: Path, closed: str, words: str) -> None:
    command = f'exec "$0" -m llmquant {words.format(model=model)} {closed}'
    ran = subprocess.run(
        ["sh", "-c", command, sys.executable],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == (2 if "nowhere" in words else 0), ran.stderr
    assert "Traceback" not in ran.stderr


def test_a_terminal_without_arrows_gets_question_marks(model: Path) -> None:
    ran = process(
        "plan", model, "--group-size", "32", env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (ran.returncode, ran.stderr) == (0, "")
    assert re.search(r"MB \? [\d.]+ MB of weight files", ran.stdout)


@pytest.mark.parametrize(
    "becomes",
    [ValueError, CheckpointError, ProofError, None],
    ids=["error", "damage", "proof", "lost"],
)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupt_that_native_code_takes_for_an_error_is_still_one(
    run: Run,
    model: Path,
    text: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    becomes: type[Exception] | None,
) -> None:
    read = CheckpointReader.read

    def interrupted(self: CheckpointReader, name: str) -> torch.Tensor:
        if name == "model.layers.1.self_attn.q_proj.weight":
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt:
                if becomes is not None:
                    raise becomes(
                        "could not determine the shape of object type 'torch.storage.UntypedStorage'"
                    ) from None
        return read(self, name)

    options = ("quantize", model, "-o", "out", *GPTQ, "--calibration", f"file:{text}")
    with interrupts(ignored=False), monkeypatch.context() as patched:
        before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        patched.setattr(CheckpointReader, "read", interrupted)
        ran = run(*options)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before
    assert ran.code == 130
    finished = 2 if becomes is None else 1
    assert (
        f"interrupted; {finished} of 2 blocks are saved next to out; run the same command to resume"
        in ran.err
    )
    assert (
        json.loads(Path("out.quantize.log.jsonl").read_text().splitlines()[-1])["event"]
        == "interrupted"
    )
    assert f"resuming after block {finished} of 2" in run(*options).err


def test_in_the_background_ctrl_c_stays_ignored(
    run: Run, model: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shell's ``llmquant quantize … &`` is not stopped by a Ctrl-C that is meant for another
    command."""
    read, sent = CheckpointReader.read, []

    def interrupted(self: CheckpointReader, name: str) -> torch.Tensor:
        signal.raise_signal(signal.SIGINT)
        sent.append(name)
        return read(self, name)

    with interrupts(ignored=True):
        monkeypatch.setattr(CheckpointReader, "read", interrupted)
        ran = run("quantize", model, "-o", "out", *GPTQ, "--calibration", f"file:{text}")
    assert (ran.code, Path("out").is_dir()) == (0, True), ran.err
    assert sent


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_interrupted_it_says_how_to_continue(tmp_path: Path, number: signal.Signals) -> None:
    """In the middle of the walk, at a size that takes some seconds; what continuing gives is in
    test_resume.py."""
    example = ROOT / "examples" / "tiny-llama"
    args = [
        "quantize",
        example,
        "-o",
        tmp_path / "a" / "out",
        "--calibration",
        f"file:{example / 'calibration.txt'}",
        "--nsamples",
        "64",
        "--seqlen",
        "512",
    ]
    command = [sys.executable, "-c", "from llmquant.cli import main; main()", *map(str, args)]
    pipe = subprocess.PIPE
    running = subprocess.Popen(heeding_interrupts(command), stdout=pipe, stderr=pipe, text=True)
    deadline, log = time.monotonic() + 120, tmp_path / "a" / "out.quantize.log.jsonl"
    while running.poll() is None and time.monotonic() < deadline:
        if log.is_file() and '"event": "block"' in log.read_text(encoding="utf-8"):
            break
        time.sleep(0.05)
    running.send_signal(number)
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    assert re.search(
        r"interrupted; \d of 6 blocks are saved next to out; run the same command to resume",
        err,
    )
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        ".out.partial",
        ".out.resume",
        "out.quantize.log.jsonl",
    ]
    assert '"event": "interrupted"' in log.read_text(encoding="utf-8").splitlines()[-1]


SIZES = [("8GB", 8 * 10**9), ("1.5 GiB", 3 * 2**29), ("800m", 800 * 10**6), ("4096", 4096)]


@pytest.mark.parametrize(("text", "size"), SIZES, ids=[text for text, _ in SIZES])
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size("--max-memory", text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1", "8 XB", "1e9", "0x10"])
def test_what_is_no_size_is_told(run: Run, model: Path, text: str) -> None:
    ran = run("quantize", model, "-o", "out", *RTN, f"--max-memory={text}")
    assert (ran.code, ran.out) == (2, "")
    assert f"--max-memory {text!r} is not a size; write bytes" in ran.err
