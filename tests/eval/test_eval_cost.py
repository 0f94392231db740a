"""Cost is measured in a process of its own, and a process that fails says why."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmquant import peak_resident_bytes, resident_bytes
from llmquant.errors import LlmquantError, UsageError
from llmquant_eval.report.machine import hardware, versions
from llmquant_eval.run.cost import CostRun, measure_cost
from llmquant_eval.speed import process
from llmquant_eval.speed.process import Clock, generate_once, main


def test_a_model_is_measured_apart(base_model: Path) -> None:
    run = CostRun("float32", prompt_tokens=32, new_tokens=5, repeats=1)
    cost = measure_cost(base_model, run)
    assert (cost.prompt_tokens, cost.new_tokens, cost.repeats, cost.device_peak_bytes) == (
        32,
        5,
        1,
        None,
    )
    assert cost.load_seconds > 0
    assert cost.prefill_tokens_per_second > 0
    assert cost.decode_tokens_per_second > 0
    assert 50e6 < cost.memory_floor_bytes < cost.peak_memory_bytes


SHORT = CostRun("float32", prompt_tokens=8, new_tokens=2, repeats=1)


def test_a_failed_process_is_an_error_with_its_last_words(
    base_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, fails = process.subprocess.run, "import sys; sys.exit('no more room')"
    monkeypatch.setattr(
        process.subprocess, "run", lambda command, **how: real([command[0], "-c", fails], **how)
    )
    with pytest.raises(
        LlmquantError, match=r"failed \(exit 1\)(.|\n)*no more room(.|\n)*--no-cost"
    ):
        measure_cost(base_model, SHORT)


def test_a_model_that_cannot_be_loaded_is_refused_as_without_its_cost(
    base_model: Path, tmp_path: Path
) -> None:
    """``--no-cost`` would not help it."""
    damaged, strange = (
        Path(shutil.copytree(base_model, tmp_path / name)) for name in ("damaged", "strange")
    )
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    config = json.loads((strange / "config.json").read_text())
    label = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    (strange / "config.json").write_text(json.dumps({**config, "quantization_config": label}))
    tensors = load_file(strange / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(4, 4, dtype=torch.uint8)
    save_file(tensors, strange / "model.safetensors", metadata={"format": "pt"})
    for folder, code, words in (
        (damaged, 1, "truncated, damaged or not safetensors"),
        (strange, 2, "quant_method 'modelopt' is not one llmquant reads"),
    ):
        with pytest.raises(LlmquantError, match=words) as told:
            measure_cost(folder, SHORT)
        assert (told.value.exit_code, "--no-cost" in str(told.value)) == (code, False)
        assert "measuring" not in str(told.value)


def test_the_prompt_is_shortened_to_the_context(base_model: Path) -> None:
    run = CostRun("float32", new_tokens=3, repeats=1)
    assert measure_cost(base_model, run).prompt_tokens == 256 - 3 - 1


def test_the_child_prints_json_in_the_order_of_size(
    base_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(base_model), "--dtype", "float32", "--new-tokens", "3"]
    assert main([*options, "--points", "2x40,1x8,1x64"]) == 0
    timings = json.loads(capsys.readouterr().out)["timings"]
    assert [tuple(t["point"].values()) for t in timings] == [(8, 1), (64, 1), (40, 2)]
    assert [len(t["decode_seconds"]) for t in timings] == [1, 1, 1]
    peaks = [t["peak_memory_bytes"] for t in timings]
    assert peaks == sorted(peaks)


def test_a_context_without_room_is_misuse(base_model: Path) -> None:
    with pytest.raises(UsageError, match="takes 256 tokens: too few for 256 new ones"):
        measure_cost(base_model, CostRun(new_tokens=256))


def test_prefill_ends_with_the_first_new_token_and_decode_begins_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([10.0, 12.0, 12.5, 13.0])  # prompt seen, then three tokens
    monkeypatch.setattr("llmquant_eval.speed.process.time.perf_counter", lambda: next(now))

    class Model:
        asked: dict[str, object] = {}  # noqa: RUF012

        def generate(self, streamer: Clock, **options: object) -> None:
            self.asked.update(options)
            for _ in range(1 + 3):
                streamer.put(None)

    model = Model()
    assert generate_once(model, torch.zeros(1, 4, dtype=torch.int64), 2) == (2.0, 1.0)
    assert model.asked["min_new_tokens"] == model.asked["max_new_tokens"] == 3
    assert model.asked["do_sample"] is False


def test_too_few_tokens_are_an_error_rather_than_a_speed() -> None:
    class Short:
        def generate(self, streamer: Clock, **options: object) -> None:
            streamer.put(None)
            streamer.put(None)

    with pytest.raises(LlmquantError, match="generated 1 tokens where 9 were asked for"):
        generate_once(Short(), torch.zeros(1, 4, dtype=torch.int64), 8)


def test_the_peak_of_a_child_is_not_its_parent_s() -> None:
    ballast = bytearray(400_000_000)
    ballast[::4096] = b"x" * len(ballast[::4096])
    assert peak_resident_bytes() > 400_000_000
    code = "from llmquant import peak_resident_bytes as peak; print(peak())"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(child.stdout) < 200_000_000
    del ballast


def test_machine() -> None:
    here = hardware("cpu")
    assert here.processor
    assert here.threads >= 1
    assert here.cores >= 1
    assert 0 < resident_bytes() <= here.memory_bytes
    assert (
        resident_bytes() <= peak_resident_bytes() * 1.01
    )  # the kernel counts pages in per-thread batches
    assert {"python", "torch", "transformers"} <= versions().keys()
