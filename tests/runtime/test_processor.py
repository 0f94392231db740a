"""The processor as read from recorded texts, and as held down by what torch is held to."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from llmquant.runtime import host, processor
from llmquant.runtime.processor import (
    INSTRUCTION_SETS,
    Processor,
    processor_of,
    read_cpuinfo,
    this_processor,
)

# Flags as Linux lists them, shortened to those that a reader could mistake for another.
_X86 = "fpu de pse tsc mmx fxsr sse sse2 ht syscall nx pni pclmulqdq ssse3 fma cx16 sse4_1 sse4_2 popcnt aes xsave avx f16c avx2"
ZEN_3 = (
    "AMD EPYC 7763 64-Core Processor",
    f"{_X86} bmi1 bmi2 erms sha_ni vaes vpclmulqdq rdpid fsrm",
)
SKYLAKE_X = (
    "Intel(R) Xeon(R) Platinum 8175M CPU @ 2.50GHz",
    f"{_X86} avx512f avx512dq avx512cd avx512bw avx512vl pku",
)
SAPPHIRE_RAPIDS = (
    "Intel(R) Xeon(R) Platinum 8488C",
    f"{_X86} avx512f avx512dq avx512ifma avx512cd avx512bw avx512vl avx_vnni avx512_bf16 avx512vbmi avx512_vbmi2 gfni vaes "
    "avx512_vnni avx512_bitalg avx512_vpopcntdq amx_bf16 avx512_fp16 amx_tile amx_int8",
)
ALDER_LAKE = (
    "12th Gen Intel(R) Core(TM) i7-12700",
    f"{_X86} avx_vnni gfni vaes vpclmulqdq waitpkg serialize hybrid_cpu",
)
GRAVITON_3 = """\
processor	: 0
BogoMIPS	: 2100.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm jscvt fcma lrcpc dcpop sha3 sm3 sm4 \
asimddp sha512 sve asimdfhm dit uscat ilrcpc flagm ssbs paca pacg dcpodp svei8mm svebf16 i8mm bf16 dgh rng
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x1
CPU part	: 0xd40
"""
RASPBERRY_PI_4 = """\
processor	: 0
Features	: fp asimd evtstrm crc32 cpuid
CPU implementer	: 0x41
CPU part	: 0xd08
"""
APPLE_M2 = """\
machdep.cpu.brand_string: Apple M2
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_I8MM: 1
hw.optional.arm.FEAT_DotProd: 1
hw.optional.arm.FEAT_SME: 0
"""
OLD_MAC = """\
machdep.cpu.brand_string: Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz
machdep.cpu.features: FPU SSE SSE2 FMA AVX1.0 F16C
machdep.cpu.leaf7_features: BMI1 AVX2 BMI2
"""


def cpuinfo(kind: tuple[str, str], *more: str) -> str:
    """The text of a machine with two processors; ``more`` gives the second one other flags."""
    name, flags = kind
    blocks = (
        f"processor\t: {i}\nmodel name\t: {name}\nflags\t\t: {f}\nbugs\t\t:\n"
        for i, f in enumerate([flags, *(more or (flags,))])
    )
    return "\n".join(blocks)


AVX2 = ["avx2", "fma", "f16c"]


@pytest.mark.parametrize(
    ("text", "name", "sets"),
    [
        pytest.param(cpuinfo(ZEN_3), ZEN_3[0], AVX2, id="Zen 3"),
        pytest.param(
            cpuinfo(SKYLAKE_X),
            SKYLAKE_X[0],
            ["avx512f", *AVX2],
            id="Skylake-X: AVX-512 without bf16",
        ),
        pytest.param(
            cpuinfo(SAPPHIRE_RAPIDS),
            SAPPHIRE_RAPIDS[0],
            ["amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", *AVX2],
            id="Sapphire Rapids: AMX",
        ),
        pytest.param(
            cpuinfo(ALDER_LAKE), ALDER_LAKE[0], ["avx_vnni", *AVX2], id="Alder Lake: avx_vnni"
        ),
        pytest.param(
            cpuinfo(ALDER_LAKE, _X86), ALDER_LAKE[0], AVX2, id="cores that differ: what all have"
        ),
        pytest.param(
            GRAVITON_3, "Neoverse V1", ["bf16", "i8mm", "dotprod", "neon"], id="Graviton 3"
        ),
        pytest.param(RASPBERRY_PI_4, "", ["neon"], id="Raspberry Pi 4"),
    ],
)
def test_cpuinfo(text, name, sets):
    found, has = read_cpuinfo(text)
    assert (found, sorted(has)) == (name, sorted(sets))


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("processor : 0\nhart : 0\nisa : rv64gc\n", id="RISC-V"),
    ],
)
def test_cpuinfo_that_does_not_tell_is_unknown(text):
    assert read_cpuinfo(text)[1] is None


@pytest.mark.parametrize(
    ("text", "name", "sets"),
    [
        pytest.param(APPLE_M2, "Apple M2", {"bf16", "i8mm", "dotprod", "neon"}, id="Apple M2"),
        pytest.param(OLD_MAC, "Intel(R) Core(TM) i9-9980HK CPU @ 2.40GHz", set(AVX2), id="Intel"),
        pytest.param("", "", None, id="sysctl cannot be asked"),
    ],
)
def test_macos(text, name, sets):
    assert processor._macos(text) == (name, sets)


def seen(kind: tuple[str, str], **environment: str) -> Processor:
    name, has = read_cpuinfo(cpuinfo(kind))
    return processor_of("x86_64", name, has, environment)


@pytest.mark.parametrize(
    ("environment", "sets"),
    [
        pytest.param(
            {},
            ["amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx_vnni", *AVX2],
            id="free",
        ),
        pytest.param(
            {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}, AVX2, id="both AVX2"
        ),
        pytest.param({"ATEN_CPU_CAPABILITY": "avx2"}, ["avx_vnni", *AVX2], id="torch AVX2"),
        pytest.param({"ATEN_CPU_CAPABILITY": "default"}, [], id="torch default"),
        pytest.param(
            {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}, ["avx512f", *AVX2], id="oneDNN AVX512_CORE"
        ),
        pytest.param(
            {"ONEDNN_MAX_CPU_ISA": "avx512_core_vnni"},
            ["avx512_vnni", "avx512f", *AVX2],
            id="small letters",
        ),
        pytest.param(
            {"DNNL_MAX_CPU_ISA": "AVX512_CORE_BF16"},
            ["avx512_bf16", "avx512_vnni", "avx512f", *AVX2],
            id="old name",
        ),
    ],
)
def test_what_torch_is_held_to_holds_the_processor_down(environment, sets):
    free, held = seen(SAPPHIRE_RAPIDS), seen(SAPPHIRE_RAPIDS, **environment)
    assert list(held.instruction_sets) == sets
    assert set(held.held_back) == set(free.instruction_sets) - set(sets)
    assert held.held_by == tuple(f"{k}={v}" for k, v in environment.items()) or not held.held_back


def test_held_to_avx2_an_avx512_machine_looks_like_one_with_avx2():
    held = seen(SAPPHIRE_RAPIDS, ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2")
    assert held.instruction_sets == seen(ZEN_3).instruction_sets


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"ATEN_CPU_CAPABILITY": "avx512"}, id="more than it has"),
        pytest.param({"ONEDNN_MAX_CPU_ISA": "ALL"}, id="ALL"),
        pytest.param({"ONEDNN_MAX_CPU_ISA": "AVX1024"}, id="a word that oneDNN does not know"),
        pytest.param({"ATEN_CPU_CAPABILITY": ""}, id="empty"),
        pytest.param({"ATEN_CPU_CAPABILITY": "avx2"}, id="exactly what it has"),
    ],
)
def test_what_holds_nothing_back_is_not_named(environment):
    held = seen(ZEN_3, **environment)
    assert (list(held.instruction_sets), held.held_back, held.held_by) == (AVX2, (), ())


def test_arm_is_not_held_by_words_for_x86():
    name, has = read_cpuinfo(GRAVITON_3)
    held = processor_of(
        "aarch64", name, has, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    )
    assert held.has("bf16", "neon")
    assert not held.held_by


def test_has_refuses_a_name_that_is_none():
    assert seen(ZEN_3).has("avx2", "fma")
    assert not seen(ZEN_3).has("avx2", "avx512f")
    with pytest.raises(KeyError, match="avx512-bf16"):
        seen(ZEN_3).has("avx512-bf16")


@pytest.mark.parametrize(
    ("files", "processors"),
    [
        pytest.param({"/sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5, id="version 2"),
        pytest.param(
            {"/proc/self/cgroup": "0::/a/b", "/sys/fs/cgroup/a/b/cpu.max": "50000 100000"},
            0.5,
            id="own group",
        ),
        pytest.param(
            {"/proc/self/cgroup": "0::/a", "/sys/fs/cgroup/cpu.max": "200000 100000"},
            2.0,
            id="mounted as the root",
        ),
        pytest.param({"/sys/fs/cgroup/cpu.max": "max 100000"}, None, id="no limit"),
        pytest.param(
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "400000",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            4.0,
            id="version 1",
        ),
        pytest.param(
            {
                "/sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "/sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            None,
            id="version 1 without a limit",
        ),
        pytest.param({}, None, id="no control groups"),
        pytest.param({"/proc/self/cgroup": "nonsense"}, None, id="nonsense"),
    ],
)
def test_a_containers_limit(files, processors, monkeypatch):
    monkeypatch.setattr(host, "text", lambda path: files.get(str(path), ""))
    assert host.cpu_quota() == processors


GIB = 2**30
V2 = {"memory.max": str(4 * GIB), "memory.current": str(3 * GIB)}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        pytest.param({}, 8 * GIB, id="no control groups"),
        pytest.param({**V2, "memory.max": "max"}, 8 * GIB, id="no limit"),
        pytest.param(V2, GIB, id="version 2"),
        pytest.param(
            {**V2, "memory.stat": f"anon 1\ninactive_file {2 * GIB}\nslab 5"},
            3 * GIB,
            id="pages of files can be dropped",
        ),
        pytest.param({**V2, "memory.current": str(5 * GIB)}, 0, id="nothing left"),
        pytest.param({**V2, "memory.max": str(100 * GIB)}, 8 * GIB, id="a limit above the machine"),
        pytest.param(
            {
                "memory/memory.limit_in_bytes": str(4 * GIB),
                "memory/memory.usage_in_bytes": str(2 * GIB),
            },
            2 * GIB,
            id="version 1",
        ),
    ],
)
def test_what_a_container_may_still_have(files, expected, monkeypatch):
    found = {f"/sys/fs/cgroup/{name}": text for name, text in files.items()}
    monkeypatch.setattr(host, "text", lambda path: found.get(str(path), ""))
    monkeypatch.setattr(
        host.psutil, "virtual_memory", lambda: SimpleNamespace(available=8 * GIB, total=16 * GIB)
    )
    assert host.available_bytes() == expected


def test_this_processor():
    here = this_processor()
    assert here.architecture
    assert here.threads >= 1
    assert here.memory_bytes > 2**20
    assert set(here.instruction_sets) <= set(INSTRUCTION_SETS)
    assert not (here.is_x86 and here.is_arm)


def test_it_is_read_without_torch():
    code = "import sys; from llmquant.runtime.processor import this_processor; this_processor(); print('torch' in sys.modules)"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False"
    )
