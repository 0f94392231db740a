"""What the words for dtypes and devices mean, and what ``auto`` means on each kind of processor."""

from __future__ import annotations

import sys

import pytest
import torch

from llmquant.errors import UsageError
from llmquant.runtime import devices
from llmquant.runtime.devices import (
    CALIBRATION,
    ChosenDtype,
    auto_dtype,
    dtype_for,
    parse_device,
    parse_dtype,
)
from llmquant.runtime.processor import Processor, processor_of

AVX2 = ("avx2", "fma", "f16c")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def x86(*sets: str, **environment: str) -> Processor:
    return processor_of("x86_64", "some", frozenset(sets), environment)


def arm(*sets: str) -> Processor:
    return processor_of("aarch64", "some", frozenset(sets), {})


AMX = x86(*AVX2, "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
SLOW = "bfloat16 can be up to 100 times slower on this processor"


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The ratio that the probe finds; empty: it must not be asked."""
    ratios: list[float] = []
    monkeypatch.setattr(devices, "probe", lambda: ratios[0])
    return ratios


@pytest.mark.parametrize(
    ("processor", "dtype", "reason"),
    [
        pytest.param(AMX, BF16, "AMX tiles (amx_bf16)", id="Sapphire Rapids"),
        pytest.param(x86(*AVX2), FP32, f"{SLOW} (AVX2, no bf16 instructions)", id="Zen 3"),
        pytest.param(x86(*AVX2, "avx_vnni"), FP32, SLOW, id="Alder Lake"),
        pytest.param(x86(), FP32, f"{SLOW} (no AVX2, no bf16 instructions)", id="older"),
        pytest.param(
            processor_of(
                "x86_64", "some", frozenset(AMX.instruction_sets), {"ATEN_CPU_CAPABILITY": "avx2"}
            ),
            FP32,
            "(AVX2, no bf16 instructions, held to that by ATEN_CPU_CAPABILITY=avx2)",
            id="Sapphire Rapids held to AVX2",
        ),
    ],
)
def test_where_instruction_sets_tell_nothing_is_measured(processor, dtype, reason, measured):
    chosen = dtype_for(processor)
    assert chosen.dtype is dtype
    assert reason in chosen.reason


@pytest.mark.parametrize(
    "processor",
    [
        pytest.param(x86(*AVX2, "avx512f"), id="AVX-512 without bf16"),
        pytest.param(x86(*AVX2, "avx512f", "avx512_bf16"), id="AVX-512 with bf16, no AMX"),
        pytest.param(arm("neon", "dotprod"), id="ARM without bf16"),
        pytest.param(processor_of("x86_64", "", None, {}), id="x86 that cannot be read"),
        pytest.param(processor_of("riscv64", "", None, {}), id="RISC-V"),
    ],
)
@pytest.mark.parametrize(
    ("ratio", "dtype", "reason"),
    [
        pytest.param(0.5, BF16, "bfloat16 takes 0.5 of float32's time", id="clearly faster"),
        pytest.param(
            0.75,
            FP32,
            "bfloat16 is not clearly faster on this processor: 0.75 of",
            id="about as fast",
        ),
        pytest.param(1.02, FP32, "bfloat16 is not clearly faster", id="the same, but for noise"),
        pytest.param(12.0, FP32, "bfloat16 takes 12 times as long as float32", id="slower"),
    ],
)
def test_where_they_do_not_tell_a_probe_does(processor, ratio, dtype, reason, measured):
    measured.append(ratio)
    chosen = dtype_for(processor)
    assert chosen.dtype is dtype
    assert reason in chosen.reason
    assert "(measured)" in chosen.reason


@pytest.mark.parametrize(
    ("platform", "dtype"),
    [
        pytest.param("linux", BF16, id="Graviton 3"),
        pytest.param("darwin", FP32, id="Apple: measured"),
    ],
)
def test_arm_with_bf16(platform, dtype, measured, monkeypatch):
    measured.append(1.5)
    monkeypatch.setattr(sys, "platform", platform)
    assert dtype_for(arm("neon", "dotprod", "i8mm", "bf16")).dtype is dtype


def test_the_probe_times_both_dtypes_in_turn(monkeypatch):
    """One after the other, what disturbs the machine meanwhile would decide."""
    seen, linear = [], devices.F.linear
    monkeypatch.setattr(devices.F, "linear", lambda x, w: seen.append(x.dtype) or linear(x, w))
    devices.probe()
    assert len(seen) > 4
    assert seen == [FP32, BF16] * (len(seen) // 2)


def test_the_probe_runs_on_one_thread_and_leaves_the_others_as_they_were(monkeypatch):
    """On two busy cores, of ten probes on two threads some found bfloat16 60 times as slow, and
    one a third faster: a thread waits for the one that the system keeps from its core."""
    before, seen, linear = torch.get_num_threads(), set(), devices.F.linear
    monkeypatch.setattr(
        devices.F, "linear", lambda x, w: seen.add(torch.get_num_threads()) or linear(x, w)
    )
    torch.set_num_threads(2)
    try:
        devices.probe()
        assert seen == {1}
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_probe_measures_this_processor_and_auto_asks_once(monkeypatch):
    assert devices.probe() > 0
    calls = []
    monkeypatch.setattr(
        devices, "dtype_for", lambda processor: calls.append(processor) or ChosenDtype(FP32, "so")
    )
    devices._cpu_dtype.cache_clear()
    try:
        assert {parse_dtype(word).reason for word in ("auto", None, "auto")} == {"so"}
        assert len(calls) == 1
    finally:
        devices._cpu_dtype.cache_clear()


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        ("bf16", BF16),
        ("bfloat16", BF16),
        ("fp16", FP16),
        ("float16", FP16),
        ("half", FP16),
        ("fp32", FP32),
        ("float32", FP32),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
def test_a_dtype_that_is_asked_for_is_obeyed(word, dtype):
    assert parse_dtype(word) == ChosenDtype(dtype, None)
    assert parse_dtype(word).name == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("word", ["auto", None], ids=str)
def test_auto_of_calibration_is_float32(word):
    assert parse_dtype(word, auto=CALIBRATION) is CALIBRATION
    assert parse_dtype("bf16", auto=CALIBRATION).dtype is BF16


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("float16", FP16),
        ("bfloat16", BF16),
        (FP32, FP32),
        (None, BF16),
        ("float8_e4m3fn", BF16),
        (torch.int8, BF16),
    ],
    ids=str,
)
def test_on_a_gpu_auto_is_the_checkpoints_own(stored, dtype):
    chosen = auto_dtype(torch.device("cuda"), stored)
    assert chosen.dtype is dtype
    assert "cuda" in chosen.reason


@pytest.mark.parametrize("stored", ["float16", "bfloat16", None], ids=str)
def test_on_a_cpu_what_is_stored_does_not_matter(stored):
    assert parse_dtype("auto", "cpu", stored=stored) == parse_dtype("auto", "cpu")


@pytest.mark.parametrize(
    ("word", "told"),
    [
        pytest.param(
            "int4", "dtype 'int4' does not exist; choose auto, bfloat16, bf16", id="no such word"
        ),
        pytest.param("", "dtype '' does not exist", id="empty"),
        pytest.param(torch.int8, "not a floating-point type", id="integers"),
    ],
)
def test_a_dtype_that_cannot_be(word, told):
    with pytest.raises(UsageError, match=told):
        parse_dtype(word)


@pytest.mark.parametrize(
    ("word", "cuda", "device"),
    [
        ("auto", False, "cpu"),
        (None, False, "cpu"),
        ("auto", True, "cuda"),
        (None, True, "cuda"),
        ("cpu", True, "cpu"),
    ],
    ids=lambda v: str(v),
)
def test_devices(word, cuda, device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    assert parse_device(word) == torch.device(device)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        pytest.param(
            "toaster",
            "device toaster cannot be used here.*choose auto, cpu, cuda",
            id="no such word",
        ),
        pytest.param("meta", "device meta holds no numbers", id="meta"),
        pytest.param("cuda:99", "device cuda:99 cannot be used here", id="not there"),
    ],
)
def test_a_device_that_cannot_be(word, told):
    with pytest.raises(UsageError, match=told):
        parse_device(word)
