"""What the engine table says of a CPU with and without AVX-512, and that every command says it of
the machine it means.

Whether the table is right is for the suite of the real vLLM (``tests/vllm``); here the machine is
made up.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_models import save

from llmquant import inspect
from llmquant.cli import main
from llmquant.conversion import convert
from llmquant.errors import UsageError
from llmquant.formats import Scheme, engines
from llmquant.formats.engines import VLLM_AVX512, VLLM_NO_AVX512, refusals, vllm_here, why_not
from llmquant.formats.rules import Beside
from llmquant.planning.allocation.candidates import choices_of
from llmquant.planning.allocation.options import AllocateOptions
from llmquant.quantization.options import Events
from llmquant.quantization.prepare import prepare
from llmquant.quantization.run import quantize
from llmquant.recipe import Recipe
from llmquant.runtime.processor import Processor
from llmquant.spec import QuantSpec

ZEN3 = Processor("x86_64", "AMD EPYC 7763", ("avx2", "fma", "f16c"))
ICE_LAKE = Processor(
    "x86_64", "Intel Xeon 8370C", ("avx512_vnni", "avx512f", "avx2", "fma", "f16c")
)
HELD = Processor(
    "x86_64",
    "Intel Xeon 8370C",
    ("avx2",),
    held_back=("avx512f",),
    held_by=("ATEN_CPU_CAPABILITY=avx2",),
)
GRAVITON = Processor("aarch64", "Neoverse V1", ("bf16", "neon"))
UNKNOWN = Processor("x86_64", "x86_64", (), known=False)

W4, W4A, W3 = Scheme(QuantSpec(4, 32)), Scheme(QuantSpec(4, 32, False)), Scheme(QuantSpec(3, 32))
W8A8 = Scheme(QuantSpec(8, None), activations="int8-dynamic")

UseMachine = Callable[[Processor], None]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> UseMachine:
    return lambda processor: monkeypatch.setattr(engines, "this_processor", lambda: processor)


@pytest.mark.parametrize(
    ("processor", "engine"),
    [
        pytest.param(ZEN3, VLLM_NO_AVX512, id="AVX2"),
        pytest.param(ICE_LAKE, VLLM_AVX512, id="AVX-512"),
        pytest.param(
            HELD, VLLM_AVX512, id="AVX-512, torch held to AVX2: vLLM does not look at that"
        ),
        pytest.param(GRAVITON, None, id="ARM"),
        pytest.param(UNKNOWN, None, id="unknown"),
    ],
)
def test_which_vllm_a_processor_has(
    machine: UseMachine, processor: Processor, engine: str | None
) -> None:
    assert vllm_here(processor) == engine
    machine(processor)
    assert vllm_here() == engine


@pytest.mark.parametrize("text", [True, False], ids=["the text part's", "its own"])
def test_vllms_cpu_build_runs_no_model_with_states(text: bool) -> None:
    config = {"linear_conv_kernel_dim": 4}
    model = Beside.of({"text_config": config} if text else config, ())
    told = {e: why_not(e, "gptq", W4, "a", model) for e in (VLLM_AVX512, VLLM_NO_AVX512)}
    assert all(reason and "carries states" in reason for reason in told.values())
    assert why_not(VLLM_AVX512, "gptq", W4, "a", Beside.of({"conv_L_cache": None}, ())) is None


@pytest.mark.parametrize(
    ("layout", "scheme", "with_it", "without_it"),
    [
        pytest.param("compressed-tensors", W4, None, "need AVX-512", id="compressed-tensors W4"),
        pytest.param(
            "compressed-tensors", W4A, None, "need AVX-512", id="compressed-tensors W4 asym"
        ),
        pytest.param("gptq", W4, None, "need AVX-512", id="gptq W4"),
        pytest.param("awq", W4A, None, "need AVX-512", id="awq W4 asym"),
        pytest.param("int-quantized", W8A8, None, None, id="W8A8"),
        # A reason that AVX-512 would not take away comes first, and nothing promises that it would.
        pytest.param(
            "gptq_v2",
            W4A,
            "asymmetric weights only as",
            "asymmetric weights only as",
            id="gptq W4 asym",
        ),
        pytest.param("compressed-tensors", W3, "2 or 3 bits", "2 or 3 bits", id="W3"),
    ],
)
def test_avx512_is_asked_for_where_it_is_what_is_missing(
    layout: str, scheme: Scheme, with_it: str | None, without_it: str | None
) -> None:
    for engine, words in ((VLLM_AVX512, with_it), (VLLM_NO_AVX512, without_it)):
        reason = why_not(engine, layout, scheme)
        assert (reason is None) == (words is None)
        assert words is None or words in str(reason)


def test_both_answers_are_there_on_any_machine(machine: UseMachine) -> None:
    said = []
    for processor in (ZEN3, ICE_LAKE, GRAVITON):
        machine(processor)
        said.append(refusals("compressed-tensors", {"a": W4, "b": W8A8}))
    assert said[0] == said[1] == said[2]
    assert said[0][VLLM_AVX512] == ()
    assert len(said[0][VLLM_NO_AVX512]) == 1


def test_reasons_have_one_order() -> None:
    """Plan walks a model's tensors and inspect a folder's, and both list the same."""
    schemes = {"a": W4, "b": W3, "c": replace(W4, g_idx=True)}
    backwards = dict(reversed(schemes.items()))
    both = [refusals("compressed-tensors", s) for s in (schemes, backwards)]
    assert both[0] == both[1]
    assert any(len(reasons) > 1 for reasons in both[0].values())


def told(model: Path, output: Path, recipe: Recipe) -> tuple[list[str], list[str]]:
    warnings: list[str] = []
    notes: list[str] = []
    quantize(model, output, recipe, events=Events(on_warning=warnings.append, on_note=notes.append))
    return warnings, notes


def test_quantize_notes_what_this_machine_alone_lacks(
    machine: UseMachine, model: Path, rtn: Recipe, tmp_path: Path
) -> None:
    machine(ZEN3)
    warnings, [note] = told(model, tmp_path / "a", rtn)
    assert warnings == []
    assert note.startswith(
        "vLLM on a CPU without AVX-512, as this one is, will refuse this model: its kernels for 4-bit weights"
    )
    assert "on a CPU that has it they take this" in note
    assert told(model, tmp_path / "b", rtn.updated({"weights.bits": 3}))[1] == []
    machine(ICE_LAKE)
    assert told(model, tmp_path / "c", rtn) == ([], [])


def test_quantize_warns_of_a_model_type_that_transformers_alone_fills_with_random_numbers(
    machine: UseMachine, rtn: Recipe, tmp_path: Path
) -> None:
    machine(ICE_LAKE)
    for kind, words in (("gpt2", "its own code"), ("granitemoe", "put random numbers")):
        folder = save(kind, tmp_path / kind)
        warnings, _ = told(folder, tmp_path / f"{kind}-w4", rtn.updated({"weights.group_size": 16}))
        [warning] = [w for w in warnings if w.startswith("transformers alone cannot read")]
        assert words in warning


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: object) -> str:
    monkeypatch.setattr(sys, "argv", ["llmquant", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "200")
    try:
        main()
    except SystemExit as e:
        assert not e.code, capsys.readouterr().err  # noqa: PT017 - the code is what is asserted
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("processor", "here"),
    [
        pytest.param(ZEN3, VLLM_NO_AVX512, id="AVX2"),
        pytest.param(ICE_LAKE, VLLM_AVX512, id="AVX-512"),
    ],
)
def test_inspect_and_plan_answer_for_both_and_say_which_is_here(
    machine: UseMachine, model: Path, quantized: Path, processor: Processor, here: str,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    machine(processor)
    for command in (
        ("inspect", quantized),
        ("plan", model, "--method", "rtn", "--group-size", "32"),
    ):
        lines = run(capsys, monkeypatch, *command).splitlines()
        for engine, answer in (
            (VLLM_AVX512, "takes it"),
            (VLLM_NO_AVX512, "refuses it: its kernels for 4-bit weights need"),
        ):
            (line,) = (line for line in lines if line.startswith(engine))
            assert answer in line
            assert ("(like this machine)" in line) == (engine == here)
        said = json.loads(run(capsys, monkeypatch, *command, "--json"))["engines"]
        assert said[VLLM_AVX512] == []
        assert len(said[VLLM_NO_AVX512]) == 1


def test_what_is_taken_with_other_numbers_is_said(
    machine: UseMachine, model: Path, tmp_path: Path
) -> None:
    recipe = Recipe(method="rtn").updated(
        {"weights.bits": 8, "weights.group_size": -1, "weights.activations": "int8-dynamic"}
    )
    machine(ZEN3)
    warnings, [note] = told(model, tmp_path / "a", recipe)
    assert warnings == []
    assert (
        "as this one is, takes this model: without VNNI instructions its int8 sums overflow" in note
    )
    assert inspect(tmp_path / "a").engines[VLLM_NO_AVX512] == ()
    assert list(inspect(tmp_path / "a").cautions) == [VLLM_NO_AVX512]
    machine(ICE_LAKE)
    assert told(model, tmp_path / "b", recipe) == ([], [])


def test_convert_warns_of_this_machine(
    machine: UseMachine, quantized: Path, tmp_path: Path
) -> None:
    machine(ZEN3)
    assert any(
        w.startswith(f"{VLLM_NO_AVX512} will not take it")
        for w in convert(quantized, "gptq", tmp_path / "a").warnings
    )
    machine(ICE_LAKE)
    assert not any(
        w.startswith("vllm") for w in convert(quantized, "gptq", tmp_path / "b").warnings
    )


def test_an_allocation_for_a_cpu_that_takes_nothing_is_refused(
    machine: UseMachine, model: Path, gptq: Recipe
) -> None:
    import torch

    prepared = prepare(model, gptq, torch.device("cpu"), "float32")
    machine(ZEN3)
    with pytest.raises(UsageError, match="nothing to choose; --engine vllm-cpu-avx512"):
        choices_of(prepared, AllocateOptions(4.5, engine="vllm-cpu"))
    wanted = choices_of(prepared, AllocateOptions(4.5, engine="vllm-cpu-avx512"))
    machine(ICE_LAKE)
    assert choices_of(prepared, AllocateOptions(4.5, engine="vllm-cpu")) == wanted
