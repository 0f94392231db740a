"""Whole training runs over small random models: better and never worse, the same bytes after any
interruption, and nothing written that was not trained."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from children import Run
from training_kit import SHORT, Train, in_two_processes

import llmquant
from llmquant.checkpoint.atomic import lock_folder
from llmquant.checkpoint.manifest import read_manifest, verify
from llmquant.checkpoint.packed import PackedCheckpoint
from llmquant.checkpoint.reader import CheckpointReader, sha256_file
from llmquant.errors import ProofError, QuantizationError, UsageError
from llmquant.recipe import Recipe
from llmquant.recipe_sections import QAT
from llmquant.training.layers.latent import LatentLinear
from llmquant.training.layers.linear import TrainedLinear
from llmquant.training.options import QatEvents, QatOptions, TrainingStep
from llmquant.training.stage import quantize, rerun
from llmquant.training.state.saved import Course, SavedTraining, moments, put_moments


def hashes(folder: Path) -> dict[str, str]:
    return {p.name: sha256_file(p) for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("size", ["scales", "codes", "lora"])
def test_the_result_is_nearer_and_proved(train: Train, tmp_path: Path, size: str) -> None:
    log, plot = tmp_path / "log.jsonl", tmp_path / "curve.png"
    done = train(tmp_path / "out", size=size, options=QatOptions(log=log, plot=plot))
    assert done.record.after < done.record.before
    assert verify(tmp_path / "out").qat == done.record
    assert not list(tmp_path.glob(".out.*"))
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert (events.count("step"), events.count("heldout"), events[-1]) == (6, 4, "done")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "trained" in (tmp_path / "out" / "README.md").read_text()


def test_scales_leave_codes_alone_and_codes_do_not(
    train: Train, tmp_path: Path, quantized: Path
) -> None:
    train(tmp_path / "scales")
    told = train(tmp_path / "codes", size="codes", codes_lr=0.04).record
    start, scales, codes = (
        PackedCheckpoint(CheckpointReader(f))
        for f in (quantized, tmp_path / "scales", tmp_path / "codes")
    )
    same = [torch.equal(start.weight(n).codes, scales.weight(n).codes) for n in start.schemes]
    other = [torch.equal(start.weight(n).codes, codes.weight(n).codes) for n in start.schemes]
    assert all(same)
    assert not all(other)
    pairs = [(start.weight(n).codes, codes.weight(n).codes) for n in start.schemes]
    assert told.codes == sum(a.numel() for a, _ in pairs)
    assert told.codes_changed == sum(int((a != b).sum()) for a, b in pairs)
    assert read_manifest(tmp_path / "scales").qat.codes_changed == 0
    assert not any(
        torch.equal(start.weight(n).scales, scales.weight(n).scales) for n in start.schemes
    )


@pytest.mark.parametrize(
    ("size", "rate"),
    [
        pytest.param("codes", "codes_lr", id="codes"),
        pytest.param("lora", "lora_lr", id="lora"),
        pytest.param("scales", "codes_lr", id="scales"),
    ],
)
def test_codes_that_should_have_changed_and_did_not_are_told(
    train: Train, tmp_path: Path, size: str, rate: str
) -> None:
    done = train(tmp_path / "out", size=size, steps=2, checks=1, **{rate: 1e-9})
    assert done.record.codes_changed == 0
    assert any("no code changed" in w for w in done.warnings) == (size != "scales")


def test_the_loaded_folder_has_the_held_out_kl_that_was_recorded(
    train: Train, tmp_path: Path, model: Path, text: Path
) -> None:
    from llmquant.models.from_folder import load_tokenizer
    from llmquant.training.teacher.text import read_text

    done = train(tmp_path / "out", top_k=0)
    section = QAT.model_validate({**SHORT, "source": f"file:{text}"})
    found = read_text(
        section, f"file:{text}", load_tokenizer(model), seed=0, vocab_size=4096, max_positions=128
    )
    pair = [llmquant.load(f, dtype="float32") for f in (model, tmp_path / "out")]
    total = []
    for window in found.heldout:
        p, q = (m(window.ids[None]).logits[0, :-1].double().log_softmax(-1) for m in pair)
        total.append((p.exp() * (p - q)).sum(-1).mean())
    assert float(torch.stack(total).mean()) == pytest.approx(done.record.after, rel=1e-4)


def test_gradient_checkpointing_changes_no_byte(train: Train, tmp_path: Path) -> None:
    for wanted in (True, False):
        train(tmp_path / str(wanted), options=QatOptions(checkpointing=wanted))
    assert hashes(tmp_path / "True") == hashes(tmp_path / "False")


def test_products_in_bfloat16_train_float32_masters(train: Train, tmp_path: Path) -> None:
    done = train(tmp_path / "out", options=QatOptions(dtype="bfloat16"), steps=3, checks=1)
    assert (done.record.dtype, done.computing.dtype) == ("bfloat16", "bfloat16")
    assert done.record.after < done.record.before


def test_other_losses_are_of_the_steps_alone(train: Train, tmp_path: Path) -> None:
    plain = train(tmp_path / "plain", steps=2, checks=1)
    more = train(tmp_path / "more", steps=2, checks=1, hidden_loss=1.0, next_token_loss=0.1)
    assert more.record.before == plain.record.before
    assert more.record.after != plain.record.after


def test_asymmetric_grids_train_norms_too(
    train: Train, tmp_path: Path, model: Path, rtn: Recipe
) -> None:
    start = tmp_path / "asym"
    quantize(model, start, rtn.updated({"weights.symmetric": False, "weights.bits": 3}))
    done = train(tmp_path / "out", start, lr=0.003)
    assert done.record.step > 0
    assert done.record.norms == 5
    kept = train(tmp_path / "kept", start, steps=1, lr=1e-12)
    name = "model.norm.weight"
    before, after = (CheckpointReader(f).read(name) for f in (start, tmp_path / "out"))
    assert torch.equal(CheckpointReader(kept.path).read(name), before)
    assert before.dtype == after.dtype
    assert not torch.equal(before, after)
    train(tmp_path / "alone", start, norms="off")
    assert torch.equal(CheckpointReader(tmp_path / "alone").read(name), before)


@pytest.mark.parametrize("layout", ["gptq", "awq", "int-quantized"])
def test_other_layouts_begin_and_end_as_they_were(
    train: Train, tmp_path: Path, model: Path, rtn: Recipe, layout: str
) -> None:
    symmetric = layout != "awq"
    bits = 8 if layout == "int-quantized" else 4
    grid = {"weights.symmetric": symmetric, "format": layout, "weights.bits": bits}
    if bits == 8:
        grid |= {"weights.group_size": -1, "weights.activations": "int8-dynamic"}
    quantize(model, tmp_path / "start", rtn.updated(grid))
    for file in ("manifest.json", "recipe.yaml"):  # as another tool leaves it
        (tmp_path / "start" / file).unlink()
    done = train(tmp_path / "out", tmp_path / "start", lr=0.02)
    assert done.record.after <= done.record.before
    assert verify(tmp_path / "out").recipe_sha256 is None
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    start = json.loads((tmp_path / "start" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == start["quant_method"]


def interrupting(step: int) -> QatEvents:
    """Stops the run after a step, at the latest moment before it is saved."""

    def stop(now: TrainingStep) -> None:
        if now.step == step:
            raise KeyboardInterrupt

    return QatEvents(on_step=stop)


@pytest.mark.parametrize("size", ["scales", "codes", "lora"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    train: Train, tmp_path: Path, size: str
) -> None:
    train(tmp_path / "whole", size=size)
    for step in (1, 3, 6):
        with pytest.raises(KeyboardInterrupt, match="steps are saved"):
            train(tmp_path / "out", size=size, events=interrupting(step))
    assert train(tmp_path / "out", size=size).resumed == 4
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


KILLED = """
import json, os, signal, sys
from pathlib import Path
from llmquant.recipe_sections import QAT
from llmquant.training.options import QatEvents
from llmquant.training.run import qat
job = json.loads(sys.argv[1])
def kill(step):
    if step.step == job["step"]:
        os.kill(os.getpid(), signal.SIGKILL)
qat(job["start"], job["output"], QAT.model_validate(job["section"]), reference=job["model"],
    events=QatEvents(on_step=kill))
"""


def test_a_killed_run_ends_with_the_same_bytes(
    train: Train, tmp_path: Path, model: Path, quantized: Path, text: Path
) -> None:
    threads = torch.get_num_threads()
    train(tmp_path / "whole")
    section = {**SHORT, "source": f"file:{text}"}
    job = {"start": quantized, "output": tmp_path / "out", "model": model, "step": 5}
    arguments = json.dumps({**{k: str(v) for k, v in job.items()}, "step": 5, "section": section})
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    code = subprocess.run([sys.executable, "-c", KILLED, arguments], env=environment, check=False)
    assert code.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    state = tmp_path / ".out.qat" / "teacher.bin"
    state.write_bytes(state.read_bytes()[:-7])  # as a power loss may leave it
    assert train(tmp_path / "out").resumed == 4
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_two_processes_do_what_one_does_up_to_rounding(
    train: Train, tmp_path: Path, model: Path, quantized: Path, text: Path
) -> None:
    alone = train(tmp_path / "alone", steps=4)
    section = {**SHORT, "steps": 4, "source": f"file:{text}"}
    ended = in_two_processes(tmp_path, quantized, model, section)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "Warning" not in ended.stderr
    after = [float(x) for x in re.findall(r"AFTER ([\d.]+)", ended.stdout)]  # two may share a line
    assert len(after) == 2
    assert after[0] == after[1] == pytest.approx(alone.record.after, rel=1e-2)
    assert read_manifest(tmp_path / "out").qat.processes == 2
    verify(tmp_path / "out")
    assert not list(tmp_path.glob(".out.*"))


def test_two_processes_share_a_mixture(tmp_path: Path, text: Path, rtn: Recipe) -> None:
    """Steps in which an expert gets no token, more than one, and unequal held-out parts."""
    original = tiny_models.save("mixtral", tmp_path / "moe", vocab_size=4096)
    for name in tiny_models.TOKENIZER:
        shutil.copyfile(tiny_models.EXAMPLE / name, original / name)
    start = quantize(original, tmp_path / "start", rtn.updated({"weights.bits": 3})).path
    few = {"steps": 4, "batch_size": 3, "seqlen": 8, "heldout": 3, "source": f"file:{text}"}
    ended = in_two_processes(tmp_path, start, original, {**SHORT, **few})
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.count("AFTER") == 2
    record = read_manifest(tmp_path / "out").qat
    assert (record.steps, record.processes, record.stopped) == (4, 2, None)
    verify(tmp_path / "out")


def test_an_optimizer_is_saved_whole(tmp_path: Path) -> None:
    """Also where a parameter had no gradient yet, and others had fewer than the steps taken."""
    parameters = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    for step in range(3):
        for i, parameter in enumerate(parameters[:2]):
            parameter.grad = torch.full((3,), float(step)) if step >= i else None
        optimizer.step()
    saved, names = SavedTraining(tmp_path / "out"), ["a", "b", "c"]
    saved.begin({}, restart=False)
    saved.save(Course(step=3), moments(optimizer, names))
    course, parts = saved.load() or pytest.fail("nothing was saved")
    other = torch.optim.AdamW(parameters, lr=0.1)
    put_moments(other, names, parts)
    assert course.step == 3
    for i, parameter in enumerate(parameters):
        for key, value in optimizer.state[parameter].items():
            assert torch.equal(other.state[parameter][key], value)
        assert len(other.state[parameter]) == (3 if i < 2 else 0)


def test_another_run_is_not_resumed(train: Train, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", events=interrupting(3))
    with pytest.raises(UsageError, match=r"qat lr was 0\.01 and is 0\.02"):
        train(tmp_path / "out", lr=0.02)
    train(tmp_path / "out", lr=0.02, options=QatOptions(restart=True))


def test_two_runs_do_not_write_one_result(train: Train, tmp_path: Path) -> None:
    lock = lock_folder(tmp_path / ".out.qat")
    for restart in (False, True):
        with pytest.raises(UsageError, match="another llmquant process"):
            train(tmp_path / "out", options=QatOptions(restart=restart))
    os.close(lock)


def test_the_start_is_kept_where_nothing_is_better(
    train: Train, tmp_path: Path, quantized: Path
) -> None:
    done = train(tmp_path / "out", lr=1.0, clip=1e9, patience=2, steps=6)
    assert done.record.step == 0
    assert "smaller --lr, or more tokens a step" in str(done.record.stopped)
    assert any("no state was better" in w for w in done.warnings)
    start, out = (PackedCheckpoint(CheckpointReader(f)) for f in (quantized, tmp_path / "out"))
    assert all(start.weight(n).digest() == out.weight(n).digest() for n in start.schemes)


def test_a_loss_that_is_nan_ends_with_the_last_good_state(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmquant.training.loop as loop

    real, calls = loop.divergence, []

    def broken(*args: Any) -> torch.Tensor:
        calls.append(args)
        kl = real(*args)
        return kl * float("nan") if torch.is_grad_enabled() and len(calls) > 24 else kl

    monkeypatch.setattr(loop, "divergence", broken)
    done = train(tmp_path / "out")
    assert "the loss of step" in str(done.record.stopped)
    assert "was nan" in str(done.record.stopped)
    assert 0 < done.record.step < 6
    assert verify(tmp_path / "out").qat == done.record


def test_a_gradient_that_is_nan_is_told_as_one(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmquant.training.loop as loop

    real = loop.divergence

    def broken(*args: Any) -> torch.Tensor:
        kl = real(*args)
        if kl.requires_grad:
            kl.register_hook(lambda g: g * float("nan"))
        return kl

    monkeypatch.setattr(loop, "divergence", broken)
    done = train(tmp_path / "out")
    assert "the gradient of step 1 was nan; the state of step 0" in str(done.record.stopped)


def test_a_curve_that_cannot_be_drawn_is_a_note(train: Train, tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "curve.png").mkdir()
    options = QatOptions(plot=tmp_path / "curve.png")
    done = train(tmp_path / "out", events=QatEvents(on_note=notes.append), options=options, steps=1)
    assert verify(done.path).qat == done.record
    assert any("no loss curve was drawn" in n and "curve.png" in n for n in notes)
    assert not (tmp_path / ".out.qat").exists()


def test_a_start_that_gives_nan_is_refused(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmquant.training.loop as loop

    monkeypatch.setattr(loop, "divergence", lambda t, q, *_: q.sum(-1) * float("nan"))
    with pytest.raises(QuantizationError, match="NaN or infinite"):
        train(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [TrainedLinear, LatentLinear], ids=["scales", "codes"])
def test_a_weight_that_is_not_what_was_trained_is_not_published(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[TrainedLinear]
) -> None:
    real = TrainedLinear.scales
    # What trains sees scales of full precision, and what is packed portable ones.
    monkeypatch.setattr(
        kind,
        "weight",
        lambda self, scales=None: self.times(
            self.steps(), self.get_buffer("start_scales") * self.factor.detach()
        ),
    )
    assert kind.scales is real
    with pytest.raises(ProofError, match="does not dequantize to the weight that was trained"):
        train(tmp_path / "out", size="scales" if kind is TrainedLinear else "codes")
    assert not (tmp_path / "out").exists()


def test_a_teacher_with_other_tokens_is_refused(
    train: Train, tmp_path: Path, make_model: Callable[..., Path], model: Path
) -> None:
    larger = make_model(vocab_size=4100)
    with pytest.raises(UsageError, match="has 4,100 tokens"):
        train(tmp_path / "out", reference=larger)
    other = Path(shutil.copytree(model, tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text(encoding="utf-8"))
    words = tokenizer["model"]["vocab"]
    first, second = list(words)[300:302]
    words[first], words[second] = words[second], words[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(UsageError, match="has another tokenizer"):
        train(tmp_path / "out", reference=other)


def test_a_recipe_that_trains_is_both_steps_and_can_be_repeated(
    train: Train, tmp_path: Path, model: Path, gptq: Recipe, text: Path
) -> None:
    quantize(model, tmp_path / "start", gptq)
    train(tmp_path / "two", tmp_path / "start")
    recipe = gptq.updated({"qat": {**SHORT, "source": f"file:{text}"}})
    done = quantize(model, tmp_path / "one", recipe)
    assert done.trained is not None
    # The card and the manifest tell the two apart by nothing.
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    assert rerun(tmp_path / "one", model).same
    assert not list(tmp_path.glob(".one.*"))


def test_a_recipe_that_trains_resumes_in_the_step_it_was_in(
    tmp_path: Path, model: Path, gptq: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llmquant.training.stage as stage

    recipe = gptq.updated({"qat": SHORT})
    events = interrupting(4)
    with pytest.raises(KeyboardInterrupt):
        quantize(model, tmp_path / "out", recipe, training=(QatOptions(), events))
    monkeypatch.setattr(stage, "round_only", None)  # it must not be asked again
    done = quantize(model, tmp_path / "out", recipe)
    assert done.trained is not None
    assert len(done.modules) == 14
    assert read_manifest(tmp_path / "out").qat == done.trained


def test_the_command(run: Run, model: Path, quantized: Path, text: Path) -> None:
    short = [
        "--steps", "4", "--batch-size", "4", "--seqlen", "32", "--heldout", "4", "--checks", "2",
        "--lr", "0.01", "--data", f"file:{text}",
    ]  # fmt: skip
    told = run("qat", quantized, "-o", "out", "--reference", model, *short)
    assert told.code == 0, told.err
    assert "held-out KL" in told.out
    assert Path("out.qat.png").is_file()
    assert Path("out.qat.log.jsonl").is_file()
    assert run("verify", "out", "--rerun", "--model", model, "--quiet").code == 0
    missing = run("qat", quantized, "-o", "other", *short)
    assert (missing.code, "--reference" in missing.err) == (2, True)
    facts = json.loads(
        run("qat", model, "-o", "whole", "--recipe", "rtn-w4g128", *short, "--json").out
    )
    assert facts["qat"]["after"] <= facts["qat"]["before"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        pytest.param(["--steps", "0"], "--steps", id="no steps"),
        pytest.param(["--micro-batch", "9"], "micro_batch is more", id="micro-batch"),
        pytest.param(["--dtype", "float16"], "float16", id="float16"),
        pytest.param(["--seqlen", "4096"], "positions", id="context"),
        pytest.param(["--max-cache", "10KB"], "--top-k", id="disk"),
        pytest.param(["--max-cache", "much"], "is not a size", id="no size"),
        pytest.param(["--format", "none"], "does not exist", id="layout"),
        pytest.param(["--recipe", "gptq-w4g128"], "no qat section", id="recipe"),
    ],
)
def test_what_cannot_be_is_misuse(
    run: Run, model: Path, quantized: Path, text: Path, options: list[str], told: str
) -> None:
    command = ["qat", quantized, "-o", "out", "--reference", model, "--data", f"file:{text}"]
    ended = run(*command, "--seqlen", "32", *options)
    assert ended.code == 2
    assert told in ended.err
    assert not list(Path().glob("*out*"))
