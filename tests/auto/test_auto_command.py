"""``llmquant auto`` on a small random model: what it chooses, what it keeps, what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from children import heeding_interrupts, run_here
from folder_kit import links_to

import llmquant
from llmquant_eval.auto.schema import AutoReport

WINDOWS = (
    "--window",
    "48",
    "--max-windows",
    "24",
    "--nsamples",
    "6",
    "--seqlen",
    "32",
    "--dtype",
    "float32",
)
RUNGS = ("--rung", "rtn-w4g128", "--rung", "gptq-w3g32", "--rung", "gptq-w8")


@pytest.fixture(scope="module")
def model(make_model) -> Path:
    """Large enough beside its embeddings that bits can be told from its size."""
    return make_model(hidden_size=128, intermediate_size=384, tie_word_embeddings=True)


def search(model: Path, text: Path, output: Path, *more: str, rungs=RUNGS) -> list[str]:
    data = ["--data", f"file:{text}"]
    return ["auto", str(model), "-o", str(output), *data, *WINDOWS, *rungs, *more]


def report_of(output: Path) -> AutoReport:
    path = output.with_name(f"{output.name}.auto") / "report.json"
    return AutoReport.model_validate_json(path.read_text(encoding="utf-8"))


def told(report: AutoReport) -> list[tuple[Any, ...]]:
    """What a search found, without what differs from run to run."""
    return [
        (r.name, r.outcome, r.why, r.measured and r.measured.model and r.measured.model.metrics)
        for r in report.rungs
    ]


@pytest.fixture(scope="module")
def losses(model, text, tmp_path_factory) -> dict[str, tuple[float, float]]:
    """Rung → its KL and the limit, with nothing refused: all three rungs are measured."""
    output = tmp_path_factory.mktemp("all") / "out"
    ended = run_here(*search(model, text, output, "--max-kl", "1e-9"))
    assert ended.code == 3, ended.err
    assert not output.exists()
    return {
        r.name: (r.checks[0].value, r.checks[0].upper) for r in report_of(output).rungs if r.checks
    }


@pytest.fixture(scope="module")
def chosen(model, text, losses, tmp_path_factory) -> Path:
    """A search that chose eight bits; read-only."""
    output = tmp_path_factory.mktemp("chosen") / "out"
    bound = (losses["gptq-w8"][1] + losses["rtn-w4g128"][0]) / 2
    ended = run_here(*search(model, text, output, "--max-kl", str(bound)))
    assert ended.code == 0, ended.err
    return output


def test_an_impossible_bound_keeps_the_original(losses):
    assert set(losses) == {"rtn-w4g128", "gptq-w3g32", "gptq-w8"}
    assert losses["gptq-w8"][1] < losses["rtn-w4g128"][0]


def test_a_tight_bound_climbs(chosen):
    report = report_of(chosen)
    assert report.chosen == "gptq-w8"
    assert [r.outcome for r in report.rungs] == ["not met", "not met", "met"]
    assert llmquant.inspect(chosen).scheme.startswith("W8")


def test_a_loose_bound_takes_the_smallest(model, text, tmp_path):
    ended = run_here(*search(model, text, tmp_path / "out", "--max-kl", "100"))
    report = report_of(tmp_path / "out")
    assert (ended.code, report.chosen) == (0, "gptq-w3g32")
    assert report.rungs[2].outcome == "skipped"
    assert "not be smaller" in report.rungs[2].why


def test_the_folder_is_proved_and_its_card_has_the_numbers(chosen, run):
    assert run("verify", chosen).code == 0
    card = (chosen / "README.md").read_text(encoding="utf-8")
    assert report_of(chosen).evaluate in card


def test_only_the_chosen_folder_is_left(chosen):
    work = chosen.with_name("out.auto")
    assert list(work.rglob("*.safetensors")) == list((work / "reference").rglob("*.safetensors"))
    assert sorted(p.name for p in work.glob("report.*")) == [
        "report.html",
        "report.json",
        "report.md",
    ]


def test_the_printed_command_repeats_the_numbers(chosen, run):
    report = report_of(chosen)
    assert report.evaluate is not None
    words = report.evaluate.replace("'", "").split()[1:]
    measured = json.loads(run(*words, "--json").out)
    mine = report.rungs[2].measured
    assert mine is not None
    assert mine.model is not None
    found = next(m for m in measured["models"] if m["role"] == "candidate")
    kept = json.loads(mine.model.model_dump_json())
    assert found["metrics"] == kept["metrics"]
    assert found["weights_sha256"] == kept["weights_sha256"]


def test_the_held_out_part_is_in_no_recipe(chosen):
    report = report_of(chosen)
    recipe = (chosen / "recipe.yaml").read_text(encoding="utf-8")
    assert "calibration.jsonl" in recipe
    assert "heldout" not in recipe
    assert report.split.calibration.rows_sha256 != report.split.heldout.rows_sha256
    manifest = json.loads((chosen / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["calibration"]["source_sha256"] == report.split.calibration.rows_sha256


def copied(chosen: Path, folder: Path) -> Path:
    """The result and its work folder elsewhere; paths in records are relative to nothing."""
    shutil.copytree(chosen.parent, folder)
    return folder / "out"


def bound_of(report: AutoReport) -> str:
    return str(report.rungs[0].checks[0].bound)


@pytest.fixture
def again(chosen, tmp_path) -> tuple[Path, str]:
    return copied(chosen, tmp_path / "again"), bound_of(report_of(chosen))


def test_a_second_run_measures_nothing_and_keeps_the_folder(model, text, again):
    output, bound = again
    before = (output / "model.safetensors").stat()
    ended = run_here(*search(model, text, output, "--max-kl", bound))
    assert ended.code == 0, ended.err
    assert "measuring" not in ended.err
    assert "quantizing" not in ended.err
    assert ended.err.count("cached") == 3
    assert (output / "model.safetensors").stat().st_mtime_ns == before.st_mtime_ns


def test_another_bound_uses_what_was_measured(model, text, again):
    output, _ = again
    ended = run_here(*search(model, text, output, "--max-kl", "100", "--overwrite"))
    assert ended.code == 0, ended.err
    report = report_of(output)
    assert (report.chosen, "measuring" in ended.err) == ("gptq-w3g32", False)
    assert llmquant.inspect(output).scheme.startswith("W3")  # it had been deleted: made again


def test_another_bound_does_not_replace_the_folder_unasked(model, text, again):
    output, _ = again
    ended = run_here(*search(model, text, output, "--max-kl", "100"))
    assert ended.code == 2
    assert "already exists" in ended.said


@pytest.mark.parametrize(
    ("change", "measured"),
    [
        pytest.param(["--window", "40"], 3, id="another window"),
        pytest.param(["--nsamples", "5"], 2, id="another calibration leaves rounding as it is"),
    ],
)
def test_changed_inputs_are_measured_again(model, text, again, change, measured):
    output, bound = again
    ended = run_here(*search(model, text, output, "--max-kl", bound, "--overwrite", *change))
    assert ended.code in (0, 3), ended.err
    assert ended.err.count("quantizing block 2/2") == measured


def test_another_text_is_measured_again(model, text, again, tmp_path):
    output, bound = again
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    ended = run_here(*search(model, other, output, "--max-kl", bound, "--overwrite"))
    assert "cached" not in ended.err


@pytest.mark.parametrize(
    ("said", "more"),
    [
        pytest.param("rtn-w4g128: measuring", (), id="measuring the first"),
        pytest.param("gptq-w3g32: quantizing block 2/2", (), id="quantizing the second"),
        pytest.param("gptq-w8: proving", (), id="proving the third"),
        pytest.param("original: reference", (), id="measuring the original"),
    ],
)
def test_a_killed_search_resumes_and_chooses_the_same(model, text, chosen, tmp_path, said, more):
    wanted = report_of(chosen)
    output = tmp_path / "out"
    command = search(model, text, output, "--max-kl", bound_of(wanted), *more)
    killed_at(said, command)
    assert not output.exists()
    ended = run_here(*command)
    assert ended.code == 0, ended.err
    report = report_of(output)
    assert (report.chosen, told(report)) == (wanted.chosen, told(wanted))
    for name in ("model.safetensors", "config.json"):
        assert (output / name).read_bytes() == (chosen / name).read_bytes()


def test_an_interrupt_says_what_is_kept(model, text, tmp_path):
    command = search(model, text, tmp_path / "out", "--max-kl", "100")
    said = killed_at("rtn-w4g128: quantizing", command, signal.SIGINT, 130)
    assert "interrupted; finished rungs are kept in" in said
    assert "run the same command to resume" in said


def killed_at(
    said: str, command: list[str], number: signal.Signals = signal.SIGKILL, code: int | None = None
) -> str:
    """Run a search in a process of its own, and kill it when it says something; what it said."""
    process = subprocess.Popen(
        heeding_interrupts([sys.executable, "-m", "llmquant", *command]),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(said):
            process.send_signal(number)
            break
    lines += process.stderr.readlines()
    process.stderr.close()
    assert process.wait() == (-number if code is None else code), "".join(lines)
    return "".join(lines)


def test_a_kill_between_the_note_and_the_rename_publishes_at_the_next_run(model, text, again):
    output, bound = again
    rung = output.with_name("out.auto") / "rungs" / "gptq-w8"
    output.rename(rung / "out")
    ended = run_here(*search(model, text, output, "--max-kl", bound))
    assert ended.code == 0, ended.err
    assert "quantizing" not in ended.err
    assert llmquant.inspect(output).scheme.startswith("W8")


def test_two_searches_do_not_share_a_work_folder(model, text, again):
    output, bound = again
    lock = llmquant.lock_folder(output.with_name("out.auto"))
    try:
        ended = run_here(*search(model, text, output, "--max-kl", bound))
    finally:
        os.close(lock)
    assert ended.code == 2
    assert "another llmquant process" in ended.said


def test_the_time_budget_stops_and_a_larger_one_resumes(model, text, tmp_path):
    command = search(model, text, tmp_path / "out", "--max-kl", "100")
    ended = run_here(*command, "--time-budget", "0.01s")
    assert ended.code == 3, ended.err
    assert "The same command with a larger --time-budget resumes it." in " ".join(ended.out.split())
    ended = run_here(*command, "--time-budget", "1h")
    assert ended.code == 0, ended.err


def test_json_is_the_report_and_nothing_else(model, text, again):
    output, bound = again
    ended = run_here(*search(model, text, output, "--max-kl", bound, "--json"))
    assert AutoReport.model_validate_json(ended.out).chosen == "gptq-w8"
    assert ended.err == ""


def test_sizes_exclude_before_any_work(model, text, tmp_path):
    command = search(model, text, tmp_path / "out", "--max-kl", "100", "--max-bytes", "1KB")
    ended = run_here(*command)
    assert ended.code == 3
    assert {r.outcome for r in report_of(tmp_path / "out").rungs} == {"excluded"}
    assert "quantizing" not in ended.err


def test_memory_to_run_in_excludes_too(model, text, tmp_path):
    plan = llmquant.make_plan(model, llmquant.load_recipe("gptq-w8"), "auto")
    sizes = []
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        loaded = llmquant.loaded_bytes(plan, dtype)
        sizes.append(llmquant.running_bytes(model, loaded, dtype=dtype))
        for limit, excluded in ((sizes[-1], False), (sizes[-1] - 1, True)):
            out = tmp_path / f"{name}-{limit}"
            more = ("--max-kl", "100", "--fit", str(limit), "--dtype", name)
            assert run_here(*search(model, text, out, *more)).code == 0
            outcomes = {r.name: r.outcome for r in report_of(out).rungs}
            assert (outcomes["gptq-w8"] == "excluded") == excluded
    assert sizes[0] > sizes[1]  # embeddings, keys and values take more in float32


def test_an_engine_excludes_what_it_refuses(model, text, tmp_path):
    command = search(model, text, tmp_path / "out", "--max-kl", "100", "--engine", "vllm")
    assert run_here(*command).code == 0
    report = report_of(tmp_path / "out")
    assert report.rungs[1].outcome == "excluded"
    assert report.rungs[1].why.startswith("vllm refuses it")
    assert report.chosen == "rtn-w4g128"


def test_a_mix_of_widths_is_a_rung(model, text, tmp_path):
    command = search(model, text, tmp_path / "out", "--max-kl", "100", rungs=("--rung", "mixed:5"))
    ended = run_here(*command)
    assert ended.code == 0, ended.err
    bits = report_of(tmp_path / "out").rungs[0].measured.model.bits_per_weight
    assert 4 < bits <= 5


def test_the_fastest_has_its_speed_measured(model, text, tmp_path):
    command = search(model, text, tmp_path / "out", "--max-kl", "100", "--fastest", rungs=RUNGS[:2])
    ended = run_here(*command)
    assert ended.code == 0, ended.err
    report = report_of(tmp_path / "out")
    assert report.rungs[0].measured.model.cost.decode_tokens_per_second > 0
    assert report.baseline.cost is not None
    assert "tokens/s" in report.why


def test_calibration_from_a_source_of_its_own(model, text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(text.read_text(encoding="utf-8")[:9000], encoding="utf-8")
    rungs = ("--rung", "gptq-w8")
    calibration = ("--calibration", f"file:{other}")
    command = search(model, text, tmp_path / "out", "--max-kl", "100", *calibration, rungs=rungs)
    assert run_here(*command).code == 0
    report = report_of(tmp_path / "out")
    assert report.split.calibration.source == f"file:{other}"
    overlap = report.rungs[0].measured.overlap
    assert overlap == pytest.approx(1.0, abs=0.05)  # the same words, though not the same document
    assert "of the calibration windows" in (tmp_path / "out.auto" / "report.md").read_text()


def test_chats_are_judged_by_their_answers(model, text, tmp_path):
    talking = tmp_path / "talking"
    shutil.copytree(model, talking)
    (talking / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    words = text.read_text(encoding="utf-8").split()
    pieces = [" ".join(words[i : i + 8]) for i in range(0, 60 * 8, 8)]
    chats = tmp_path / "chats.jsonl"
    with chats.open("w") as file:
        for piece in pieces:
            turns = [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": piece}]
            file.write(json.dumps({"messages": turns}) + "\n")
    data = ["--data", f"jsonl:{chats}#messages", "--max-kl", "100", "--rung", "gptq-w8"]
    ended = run_here("auto", str(talking), "-o", str(tmp_path / "out"), *data, *WINDOWS)
    assert ended.code == 0, ended.err
    report = report_of(tmp_path / "out")
    assert report.split.chats
    assert report.split.calibration.documents + report.split.heldout.documents == len(set(pieces))
    measured = report.rungs[0].measured
    assert measured is not None
    metric = measured.model.metrics["kl_mean"]
    assert (metric.protocol, metric.error_method) == ("kl/top-chat-48", "by chat")
    assert "--protocol ppl/chat" in report.evaluate


@pytest.mark.parametrize(
    ("more", "message"),
    [
        pytest.param([], "say what the model may lose", id="no bound"),
        pytest.param(["--max-kl", "much"], "--max-kl 'much' is not a number", id="no number"),
        pytest.param(["--max-ppl-increase", "2"], "200% is not between", id="a percent forgotten"),
        pytest.param(["--max-kl", "1", "--rung", "no-such"], "--rung no-such", id="no such rung"),
        pytest.param(
            ["--max-kl", "1", "--rung", "gptq-w8"], "gptq-w8 is given twice", id="a rung twice"
        ),
        pytest.param(["--max-kl", "1", "--max-bytes", "big"], "--max-bytes 'big'", id="no size"),
        pytest.param(["--max-kl", "1", "--time-budget", "soon"], "is not a time", id="no time"),
        pytest.param(
            ["--max-kl", "1", "--fit", "1GB", "--max-bytes", "1GB"], "give one of them", id="both"
        ),
        pytest.param(
            ["--max-kl", "1", "--window", "100", "--nsamples", "1", "--max-windows", "3"],
            "3 windows of 100 tokens, and 4 are the fewest",
            id="too few windows",
        ),
        pytest.param(
            ["--max-kl", "1", "--window", "200"], "longer than the 128", id="beyond the context"
        ),
        pytest.param(["--max-kl", "1", "--seqlen", "999"], "seqlen=999", id="calibration beyond"),
        pytest.param(["--max-kl", "1", "--nsamples", "9999"], "too little", id="too many samples"),
        pytest.param(["--max-kl", "1", "--data", "file:none"], "none cannot be read", id="no file"),
        pytest.param(["--max-task-drop", "1%"], "give both or neither", id="no tasks"),
    ],
)
def test_misuse_is_named(model, text, tmp_path, more, message):
    ended = run_here(*search(model, text, tmp_path / "out", *more))
    assert ended.code == 2, ended.err
    assert message in ended.said
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_refused_at_once(model, text, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x", encoding="utf-8")
    ended = run_here(*search(model, text, tmp_path / "out", "--max-kl", "1"))
    assert ended.code == 2
    assert "already exists" in ended.said
    assert not (tmp_path / "out.auto").exists()


def test_the_model_itself_is_refused_as_output(model, text):
    ended = run_here(*search(model, text, model, "--max-kl", "1", "--overwrite"))
    assert ended.code == 2
    assert "is the model itself" in ended.said


def test_an_output_that_holds_what_is_read_is_refused(model, text, tmp_path):
    out = shutil.copytree(model, tmp_path / "out")
    inside, links = shutil.copy(text, out), links_to(out, tmp_path / "links")
    bound = ("--max-kl", "1", "--overwrite")
    for given in (search(links, text, out, *bound), search(model, inside, out, *bound)):
        ended = run_here(*given)
        assert ended.code == 2
        assert "which --overwrite would delete" in ended.said
    assert not (tmp_path / "out.auto").exists()


def test_empty_data_is_refused(model, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("\n", encoding="utf-8")
    ended = run_here(*search(model, empty, tmp_path / "out", "--max-kl", "1"))
    assert ended.code == 2
    assert "no row of text" in ended.said


def test_data_without_windows_is_refused(model, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("One line.\n\nAnother line.", encoding="utf-8")
    ended = run_here("auto", model, "-o", tmp_path / "out", "--max-kl", "1", "--data", short)
    assert ended.code == 2
    assert "the calibration text is too short" in ended.said


def test_a_rung_that_trains_is_measured_and_kept(model, text, tmp_path):
    recipe = tmp_path / "trained.yaml"
    recipe.write_text(
        "method: rtn\nweights: {bits: 3, group_size: 32}\nscales: {steps: 0}\n"
        "qat: {steps: 4, batch_size: 4, checks: 2, lr: 0.005, norms: 'on'}\n",
        encoding="utf-8",
    )
    plain = tmp_path / "plain.yaml"
    plain.write_text(recipe.read_text().rpartition("qat:")[0], encoding="utf-8")
    rungs = ("--rung", str(plain), "--rung", str(recipe))
    command = search(model, text, tmp_path / "out", "--max-kl", "1e-9", rungs=rungs)
    assert run_here(*command).code == 3
    first, second = report_of(tmp_path / "out").rungs
    assert (first.stage, second.stage) == ("rtn", "qat")
    kl = [r.measured.model.metrics["kl_mean"].value for r in (first, second)]
    assert kl[1] < kl[0]
    assert run_here(*command).code == 3
    again = report_of(tmp_path / "out").rungs
    assert all(r.cached for r in again)
    assert told(report_of(tmp_path / "out"))[1][3] == second.measured.model.metrics
